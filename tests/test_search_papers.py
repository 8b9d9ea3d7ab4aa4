"""search_papers.py: exactly the nearest, whatever the vectors look like; right ids and titles; the
vectors' own metric and query role; clear refusals.
"""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, make_paper

import embed_papers
import search_papers
from semcse import errors
from semcse.distances import nearest, nearest_streamed
from semcse.encoder import Usage
from semcse.models import Wanted, load_model
from semcse.types import Metric
from settings import Settings

Search = Callable[..., str]
METRICS: tuple[Metric, ...] = ("euclidean", "cosine")


def random(rows: int, d: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, d, generator=torch.Generator().manual_seed(seed))


def hard_candidates() -> dict[str, torch.Tensor]:
    """Vectors on which plain float32 products go wrong, or a careless loop over blocks does."""
    plain, tight = random(700, 24, 0), random(1, 24, 1) + 1e-6 * random(700, 24, 2)
    zeros = plain.clone()
    zeros[::5] = 0
    outlier = plain.clone()
    outlier[3] *= 1e4
    descending = plain * torch.linspace(50, 1, 700)[:, None]  # every block brings nearer ones
    return {
        "plain": plain,
        "near ties": tight,
        "copies": plain[torch.arange(700) % 40],
        "common offset": plain + 3000,
        "zero vectors": zeros,
        "one far away": outlier,
        "nearer and nearer": descending,
        "all equal": plain[:1].expand(700, -1).clone(),
        "tiny": plain * 1e-18,
        "huge": plain * 1e18,
        "lengths apart": plain * torch.logspace(-30, 15, 700)[:, None],
    }


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", hard_candidates())
def test_streamed_neighbours_are_those_of_float64(
    name: str, metric: Metric, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against every distance in float64, sorted; blocks of 41 rows, so that the 7 nearest come from
    many.
    """
    monkeypatch.setattr(similarity, "STREAMED", 41 * 24)
    candidates = hard_candidates()[name]
    queries = torch.cat(
        [candidates[[5, 699]], candidates[[7]] + 0.3 * candidates[[20]], torch.zeros(1, 24)]
    )
    excluded = torch.tensor([5, -1, 7, -1])
    found, rows = nearest_streamed(queries, candidates, 7, metric, excluded)
    for query, own, far, near in zip(queries, excluded, found, rows, strict=True):
        a, b = query.double(), candidates.double()
        if metric == "cosine":
            a, b = a / a.norm().clamp_min(1e-12), b / b.norm(dim=1, keepdim=True).clamp_min(1e-12)
        squares = (a - b).square().sum(dim=1)
        squares[own] = torch.inf if own >= 0 else squares[own]
        order = torch.argsort(squares, stable=True)[:7]
        assert near.tolist() == order.tolist()
        wanted = squares[order] / 2 if metric == "cosine" else squares[order].sqrt()
        torch.testing.assert_close(far, wanted, rtol=1e-12, atol=0)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    "name", ["plain", "near ties", "copies", "common offset", "zero vectors", "one far away"]
)
def test_streamed_neighbours_are_those_of_nearest(
    name: str, metric: Metric, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(similarity, "STREAMED", 100 * 24)
    candidates = hard_candidates()[name]
    own = torch.arange(30)
    one, other = (
        nearest(candidates[own], candidates, 9, metric, own),
        nearest_streamed(candidates[own], candidates, 9, metric, own),
    )
    torch.testing.assert_close(one[0], other[0], rtol=1e-9, atol=1e-18)
    assert torch.equal(one[1], other[1])


def test_fewer_candidates_than_wanted() -> None:
    found, rows = nearest_streamed(
        torch.tensor([[0.0, 0.0], [3.0, 0.0]]),
        torch.tensor([[3.0, 0.0], [0.0, 4.0]]),
        3,
        "euclidean",
        torch.tensor([-1, 0]),
    )
    assert found.tolist() == [[3, 4, torch.inf], [5, torch.inf, torch.inf]]
    assert rows.tolist() == [[0, 1, -1], [1, -1, -1]]


@pytest.fixture
def search(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Search:
    """Run the script's main with these words, in this process; returns what it prints."""
    monkeypatch.setattr(files, "log_to_stderr", lambda: None)

    def run(*words: str | Path) -> str:
        monkeypatch.setattr(sys, "argv", ["search_papers.py", *map(str, words)])
        capsys.readouterr()
        search_papers.main()
        return capsys.readouterr().out

    return run


def store(
    folder: Path,
    vectors: list[list[float]],
    titles: list[str],
    metric: str = "euclidean",
    **about: Any,
) -> Path:
    """A .npy file with its companions, written by hand: papers p0, p1, ... by a model that is not
    there.
    """
    path = folder / "v.npy"
    np.save(path, np.array(vectors, np.float32))
    path.with_name("v.npy.ids.jsonl").write_text(
        "".join(json.dumps({"id": f"p{i}", "title": one}) + "\n" for i, one in enumerate(titles)),
        encoding="utf-8",
    )
    facts = {
        "model": "nowhere/at-all/x",
        "pooling": "cls",
        "metric": metric,
        "max_length": 64,
        "query_prompt": "",
        "rows": len(vectors),
    }
    path.with_name("v.npy.json").write_text(
        json.dumps(facts | {"dimension": len(vectors[0])} | about), encoding="utf-8"
    )
    return path


def embedded(folder: Path, model: Path | str, count: int, name: str = "v.npy") -> Path:
    """Vectors of `count` made papers by embed_papers.py."""
    source = folder / "papers.jsonl"
    source.write_text(
        "".join(json.dumps(make_paper(n)) + "\n" for n in range(count)), encoding="utf-8"
    )
    command = embed_papers.checked(
        embed_papers.Command(model=str(model), input=str(source), output=str(folder / name))
    )
    embed_papers.embed(command, folder / f"{name}.parts")
    embed_papers.finish(folder / name, folder / f"{name}.parts", 1)
    return folder / name


POINTS = [[0.0, 0.0], [3.0, 4.0], [0.0, 1.0], [6.0, 8.0]]


def test_table_and_json_of_papers_by_hand(search: Search, tmp_path: Path) -> None:
    """No model is loaded for ids: there is none. Titles cannot move the cursor."""
    path = store(tmp_path, POINTS, ["origin", "five\x1b[2J\naway\u202e", "one", "ten"])
    assert search("--vectors", path, "--id", "p0", "-k", "2").splitlines() == [
        "p0",
        " rank  distance  id                    title",
        "    1    1.0000  p2                    one",
        "    2    5.0000  p1                    five [2J away ",
    ]
    rows = [
        json.loads(line)
        for line in search("--vectors", path, "--id", "p3", "--id", "p2", "--json").splitlines()
    ]
    assert [(row["query"], row["rank"], row["id"]) for row in rows] == [
        ("p3", 1, "p1"),
        ("p3", 2, "p2"),
        ("p3", 3, "p0"),
        ("p2", 1, "p0"),
        ("p2", 2, "p1"),
        ("p2", 3, "p3"),
    ]
    assert [row["distance"] for row in rows] == pytest.approx(
        [5, 85**0.5, 10, 1, 18**0.5, 85**0.5], rel=1e-12
    )
    assert rows[0]["title"] == "five\x1b[2J\naway\u202e"


def test_the_metric_is_the_vectors_own(search: Search, tmp_path: Path) -> None:
    """By cosine p1 and p3 are one direction, and zero stands half-way from all."""
    path = store(tmp_path, POINTS, list("abcd"), "cosine")
    rows = [
        json.loads(line) for line in search("--vectors", path, "--id", "p1", "--json").splitlines()
    ]
    assert [row["id"] for row in rows] == ["p3", "p2", "p0"]
    assert [row["distance"] for row in rows] == pytest.approx([0, 0.2, 0.5], abs=1e-15)


def test_texts_are_embedded_as_the_metadata_say(
    search: Search, tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Query prompt and metric of the vectors; from flags, a file and standard input alike; two
    queries in one pass.
    """
    encoder, _ = load_model(str(tiny_bert), Wanted(), Settings())
    encoder.usage = Usage("mean", "cosine", 64, query_prompt="soil soil ", document_prompt="river ")
    encoder.save(tmp_path / "model", base="tiny")
    path = embedded(tmp_path, tmp_path / "model", 12)
    texts = ["market theory", "voter 3"]
    queries = encoder.embed(texts, "soil soil ").vectors
    far, near = nearest(queries, torch.from_numpy(np.load(path)), 4, "cosine")
    wanted = [
        (text, f"paper-{row}")
        for text, rows in zip(texts, near.tolist(), strict=True)
        for row in rows
    ]
    (tmp_path / "q.txt").write_text("market theory\n\nvoter 3\n", encoding="utf-8")
    for words in (
        ("--query", texts[0], "--query", texts[1]),
        ("--queries", tmp_path / "q.txt"),
        ("--query", texts[0], "--queries", tmp_path / "r.txt"),
    ):
        (tmp_path / "r.txt").write_text("voter 3\n", encoding="utf-8")
        rows = [
            json.loads(line)
            for line in search("--vectors", path, *words, "-k", "4", "--json").splitlines()
        ]
        assert [(row["query"], row["id"]) for row in rows] == wanted
        assert [row["distance"] for row in rows] == pytest.approx(
            far.flatten().tolist(), rel=1e-6, abs=1e-9
        )
    shutil.move(tmp_path / "model", tmp_path / "moved")
    with pytest.raises(errors.UserError, match=r"no such folder.*--model"):
        search("--vectors", path, "--query", "market theory")
    assert (
        search(
            "--vectors",
            path,
            "--query",
            "market theory",
            "--model",
            tmp_path / "moved",
            "-k",
            "4",
            "--json",
        ).count("\n")
        == 4
    )


def test_a_model_of_another_dimension_is_refused(
    search: Search, tiny_bert: Path, tmp_path: Path
) -> None:
    path = store(tmp_path, POINTS, list("abcd"))
    with pytest.raises(errors.UserError, match="gives 32 numbers a text, not 2"):
        search("--vectors", path, "--query", "soil", "--model", tiny_bert)


def test_parquet_gives_the_same_answer(search: Search, tiny_bert: Path, tmp_path: Path) -> None:
    words = ("--id", "paper-3", "--query", "soil river", "--json")
    answers = [
        search("--vectors", embedded(tmp_path, tiny_bert, 20, name), *words)
        for name in ("v.npy", "v.parquet")
    ]
    assert answers[0] == answers[1]
    assert answers[0].count("\n") == 20


def test_files_that_do_not_belong_together(search: Search, tmp_path: Path) -> None:
    path = store(tmp_path, POINTS, list("abc"))
    with pytest.raises(errors.UserError, match="holds 4 vectors, but 3 ids"):
        search("--vectors", path, "--id", "p0")
    with pytest.raises(errors.UserError, match=r"no such paper"):
        search("--vectors", store(tmp_path, POINTS, list("abcd")), "--id", 'p"0')
    for wrong in ({"rows": 5}, {"dimension": 3}, {"metric": None, "rows": None}):
        with pytest.raises(errors.UserError, match=r"is not what v\.npy\.json describes"):
            search("--vectors", store(tmp_path, POINTS, list("abcd"), **wrong), "--id", "p0")
    path.with_name("v.npy.json").write_text('{"rows": 4, "dimension": 2}')
    with pytest.raises(errors.UserError, match=r"is not what v\.npy\.json describes"):
        search("--vectors", path, "--id", "p0")
    path.with_name("v.npy.json").unlink()
    with pytest.raises(errors.UserError, match=r"v\.npy\.json: no such file"):
        search("--vectors", path, "--id", "p0")
    path = store(tmp_path, POINTS, list("abcd"))
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(errors.UserError, match=r"v\.npy: cannot be read"):
        search("--vectors", path, "--id", "p0")
    store(tmp_path, POINTS, list("abcd")).rename(tmp_path / "v.parquet")
    (tmp_path / "v.npy.json").rename(tmp_path / "v.parquet.json")
    with pytest.raises(errors.UserError, match=r"v\.parquet: cannot be read"):
        search("--vectors", tmp_path / "v.parquet", "--id", "p0")


@pytest.mark.parametrize(
    "words", ["--query x", "--vectors v.npy", "--vectors v.npy --query x -k 0"]
)
def test_command_lines_that_cannot_work(words: str, search: Search) -> None:
    with pytest.raises(errors.UserError, match="missing"):
        search(*words.split())


README = (ROOT / "README.md").read_text(encoding="utf-8")
# The commands that README shows, on the sample papers and the bundled encoder.
COMMANDS = [
    line
    for line in README.splitlines()
    if line.startswith(("python embed_papers.py", "python search_papers.py"))
]


def test_the_commands_of_the_readme(
    tmp_path: Path,
    search: Search,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """On the first eight sample papers."""
    (tmp_path / "data").mkdir()
    lines = (
        (ROOT / "data" / "sample_test.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    )
    (tmp_path / "data" / "sample_test.jsonl").write_text("".join(lines[:8]), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    printed = []
    assert len(COMMANDS) == 6
    for command in COMMANDS:
        words = shlex.split(command)
        monkeypatch.setattr(sys, "argv", words[1:])
        {"embed_papers.py": embed_papers, "search_papers.py": search_papers}[words[1]].main()
        printed.append(capsys.readouterr().out)
    assert printed[1].splitlines()[2].split()[2].startswith("art-3")
    assert len(printed[2].splitlines()) == 7
    assert np.load("runs/shared.npy").shape == (8, 384)
    # other chunks, so other batches
    assert np.abs(np.load("runs/shared.npy") - np.load("runs/vectors.npy")).max() < 1e-6

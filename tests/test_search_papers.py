"""search_papers.py: the right ids and titles, the metric and the query prompt of the vectors, and
clear refusals. (test_distances.py tests the search itself.)
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
from semcse import command_line
from semcse.distances import nearest
from semcse.encoder import Usage
from semcse.errors import UserError
from semcse.model_folder import save_model
from semcse.models import load_model

Search = Callable[..., str]


@pytest.fixture
def search(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Search:
    """Runs the script's main with these words in this process and returns what it prints."""
    monkeypatch.setattr(command_line, "log_to_stderr", lambda: None)

    def run(*words: str | Path | int) -> str:
        monkeypatch.setattr(sys, "argv", ["search_papers.py", *map(str, words)])
        capsys.readouterr()
        search_papers.main()
        return capsys.readouterr().out

    return run


def json_rows(printed: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in printed.splitlines()]


POINTS = [[0.0, 0.0], [3.0, 4.0], [0.0, 1.0], [6.0, 8.0]]


def store(folder: Path, titles: list[str], **changes: Any) -> Path:
    """Writes POINTS as the .npy file of papers p0, p1, ... by a model that does not exist."""
    path = folder / "v.npy"
    np.save(path, np.array(POINTS, np.float32))
    lines = [json.dumps({"id": f"p{i}", "title": title}) for i, title in enumerate(titles)]
    Path(f"{path}.ids.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    facts = {"model": "nowhere/at-all/x", "pooling": "cls", "metric": "euclidean", "max_length": 64}
    facts |= {"query_prompt": "", "rows": 4, "dimension": 2} | changes
    Path(f"{path}.json").write_text(json.dumps(facts), encoding="utf-8")
    return path


def embedded(folder: Path, model: Path, count: int, name: str = "v.npy") -> Path:
    """Vectors of `count` made-up papers by embed_papers.py."""
    source, output = folder / "papers.jsonl", folder / name
    lines = [json.dumps(make_paper(n)) + "\n" for n in range(count)]
    source.write_text("".join(lines), encoding="utf-8")
    command = embed_papers.Command(model=str(model), input=str(source), output=str(output))
    embed_papers.embed(embed_papers.checked(command), folder / f"{name}.parts")
    embed_papers.finish(output, folder / f"{name}.parts", 1)
    return output


def test_table_and_json(search: Search, tmp_path: Path) -> None:
    """Searching by id loads no model, and titles cannot move the cursor."""
    path = store(tmp_path, ["origin", "five\x1b[2J\naway\u202e", "2020-01-01", "ten"])
    assert search("--vectors", path, "--id", "p0", "-k", 2).splitlines() == [
        "p0",
        " rank  distance  id                    title",
        "    1    1.0000  p2                    2020-01-01",
        "    2    5.0000  p1                    five\\x1b[2J\\naway\\u202e",
    ]
    rows = json_rows(search("--vectors", path, "--id", "p3", "--id", "p2", "--json"))
    found = [(row["query"], row["rank"], row["id"]) for row in rows]
    assert found[:3] == [("p3", 1, "p1"), ("p3", 2, "p2"), ("p3", 3, "p0")]
    assert found[3:] == [("p2", 1, "p0"), ("p2", 2, "p1"), ("p2", 3, "p3")]
    expected = [5, 85**0.5, 10, 1, 18**0.5, 85**0.5]
    assert [row["distance"] for row in rows] == pytest.approx(expected, rel=1e-12)
    assert rows[0]["title"] == "five\x1b[2J\naway\u202e"


def test_the_metric_is_that_of_the_vectors(search: Search, tmp_path: Path) -> None:
    """For the cosine, p1 and p3 have the same direction, and zero is equally far from all."""
    path = store(tmp_path, list("abcd"), metric="cosine")
    rows = json_rows(search("--vectors", path, "--id", "p1", "--json"))
    assert [row["id"] for row in rows] == ["p3", "p2", "p0"]
    assert [row["distance"] for row in rows] == pytest.approx([0, 0.2, 0.5], abs=1e-15)


def test_texts_are_embedded_as_the_metadata_say(
    search: Search, tiny_bert: Path, tmp_path: Path
) -> None:
    """With the query prompt and the metric of the vectors, from flags and from files."""
    encoder = load_model(str(tiny_bert))
    encoder.usage = Usage("mean", "cosine", 64, query_prompt="soil soil ", document_prompt="river ")
    save_model(encoder, tmp_path / "model", "tiny")
    path = embedded(tmp_path, tmp_path / "model", 12)
    texts = ["market theory", "voter 3"]
    queries = encoder.embed(texts, "soil soil ").vectors
    distances, neighbours = nearest(queries, torch.from_numpy(np.load(path)), 4, "cosine")
    wanted = [
        (texts[i // 4], f"paper-{row}") for i, row in enumerate(neighbours.flatten().tolist())
    ]
    (tmp_path / "both.txt").write_text("market theory\n\nvoter 3\n", encoding="utf-8")
    (tmp_path / "one.txt").write_text("voter 3\n", encoding="utf-8")
    for words in (
        ("--query", texts[0], "--query", texts[1]),
        ("--queries", tmp_path / "both.txt"),
        ("--query", texts[0], "--queries", tmp_path / "one.txt"),
    ):
        rows = json_rows(search("--vectors", path, *words, "-k", 4, "--json"))
        assert [(row["query"], row["id"]) for row in rows] == wanted
        expected = pytest.approx(distances.flatten().tolist(), rel=1e-6, abs=1e-9)
        assert [row["distance"] for row in rows] == expected
    moved = shutil.move(tmp_path / "model", tmp_path / "moved")
    query = ("--vectors", path, "--query", "market theory", "-k", "4", "--json")
    with pytest.raises(UserError, match=r"no such folder.*--model"):
        search(*query)
    assert len(json_rows(search(*query, "--model", moved))) == 4


def test_a_model_of_another_dimension_is_refused(
    search: Search, tiny_bert: Path, tmp_path: Path
) -> None:
    path = store(tmp_path, list("abcd"))
    with pytest.raises(UserError, match="makes vectors of 32 numbers, not 2"):
        search("--vectors", path, "--query", "soil", "--model", tiny_bert)


def test_parquet_gives_the_same_answer(search: Search, tiny_bert: Path, tmp_path: Path) -> None:
    words = ("--id", "paper-3", "--query", "soil river", "--json")
    one, other = (
        search("--vectors", embedded(tmp_path, tiny_bert, 20, name), *words)
        for name in ("v.npy", "v.parquet")
    )
    assert one == other
    assert len(json_rows(one)) == 20


def test_files_that_do_not_belong_together(search: Search, tmp_path: Path) -> None:
    wrong: list[dict[str, Any]] = [{"rows": 5}, {"dimension": 3}, {"metric": None, "rows": None}]
    for titles, changes in (*(("abcd", changes) for changes in wrong), ("abc", {})):
        with pytest.raises(UserError, match=r"does not belong to its companion files"):
            search("--vectors", store(tmp_path, list(titles), **changes), "--id", "p0")
    path = store(tmp_path, list("abcd"))
    with pytest.raises(UserError, match="no such paper"):
        search("--vectors", path, "--id", 'p"0')
    Path(f"{path}.json").write_text('{"rows": 4, "dimension": 2}')
    with pytest.raises(UserError, match=r"does not belong to its companion files"):
        search("--vectors", path, "--id", "p0")
    Path(f"{path}.json").unlink()
    with pytest.raises(UserError, match=r"v\.npy\.json: no such file"):
        search("--vectors", path, "--id", "p0")


def test_files_that_are_damaged(search: Search, tmp_path: Path) -> None:
    path = store(tmp_path, list("abcd"))
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(UserError, match=r"v\.npy: cannot be read"):
        search("--vectors", path, "--id", "p0")
    path = store(tmp_path, list("abcd"))
    Path(f"{path}.ids.jsonl").unlink()
    with pytest.raises(UserError, match=r"v\.npy: cannot be read"):
        search("--vectors", path, "--id", "p0")
    for end in ("", ".json"):
        store(tmp_path, list("abcd")).with_name(f"v.npy{end}").rename(tmp_path / f"v.parquet{end}")
    with pytest.raises(UserError, match=r"v\.parquet: cannot be read"):
        search("--vectors", tmp_path / "v.parquet", "--id", "p0")
    path = store(tmp_path, list("abcd"))
    np.save(path, np.array([[0, 0], [0, np.nan], [1, 1], [2, 2]], np.float32))
    with pytest.raises(UserError, match=r"v\.npy: .*NaN"):
        search("--vectors", path, "--id", "p0")


@pytest.mark.parametrize(
    "words", ["--query x", "--vectors v.npy", "--vectors v.npy --query x -k 0"]
)
def test_command_lines_that_cannot_work(words: str, search: Search) -> None:
    with pytest.raises(UserError, match="missing"):
        search(*words.split())


def test_the_commands_of_the_readme(
    tmp_path: Path,
    search: Search,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With the bundled encoder, on the first eight sample papers."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    scripts = {"embed_papers.py": embed_papers, "search_papers.py": search_papers}
    commands = [line for line in readme if line.startswith(tuple(f"python {s}" for s in scripts))]
    assert len(commands) == 6
    (tmp_path / "data").mkdir()
    sample = (ROOT / "data" / "sample_test.jsonl").read_text(encoding="utf-8").splitlines()
    (tmp_path / "data" / "sample_test.jsonl").write_text("\n".join(sample[:8]), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    printed = []
    for command in commands:
        words = shlex.split(command)[1:]
        monkeypatch.setattr(sys, "argv", words)
        scripts[words[0]].main()
        printed.append(capsys.readouterr().out)
    assert printed[1].splitlines()[2].split()[2].startswith("art-3")
    assert len(printed[2].splitlines()) == 7
    assert np.load("runs/shared.npy").shape == (8, 384)
    # The chunks, and so the batches, are not the same.
    assert np.abs(np.load("runs/shared.npy") - np.load("runs/vectors.npy")).max() < 1e-6

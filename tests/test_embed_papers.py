"""embed_papers.py: the right vectors in the right rows, the same bytes after interruptions and from
shares, and clear refusals.
"""

from __future__ import annotations

import fcntl
import gzip
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
import torch
from conftest import ROOT, make_paper, run_script

import embed_papers
from semcse import command_line, models
from semcse.encoder import Encoder, Usage
from semcse.errors import UserError
from semcse.model_folder import save_model
from semcse.models import Recipe, load_model
from semcse.papers import read_papers

Papers = Callable[..., Path]
Embed = Callable[..., None]


@pytest.fixture
def embed(tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Embed:
    """Runs the script's main in this process and in a temporary folder: embed(input, output,
    *more words), with the tiny model unless the words name another one.
    """
    monkeypatch.setattr(command_line, "log_to_stderr", lambda: None)
    monkeypatch.chdir(tmp_path)

    def run(source: str | Path, output: str | Path, *words: str | Path | int) -> None:
        argv = ["embed_papers.py", "--input", source, "--output", output, *words]
        argv += [] if "--model" in words else ["--model", tiny_bert]
        monkeypatch.setattr(sys, "argv", list(map(str, argv)))
        embed_papers.main()

    return run


@pytest.fixture
def merge(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], None]:
    """Runs `embed_papers.py --output OUTPUT --merge SHARES`."""

    def run(output: str, shares: int) -> None:
        words = ["embed_papers.py", "--output", output, "--merge", str(shares)]
        monkeypatch.setattr(sys, "argv", words)
        embed_papers.main()

    return run


def rows_of(path: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in Path(f"{path}.ids.jsonl").read_bytes().splitlines()]


def about(path: str) -> dict[str, Any]:
    """OUTPUT.json, without the time that the run took."""
    facts = json.loads(Path(f"{path}.json").read_text(encoding="utf-8"))
    assert facts.pop("seconds") > 0
    return dict(facts)


def same_bytes(one: str, other: str) -> bool:
    pairs = [(Path(one + end), Path(other + end)) for end in ("", ".ids.jsonl")]
    return all(a.read_bytes() == b.read_bytes() for a, b in pairs)


def texts_seen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every text that is embedded, after its prompt."""
    seen: list[str] = []
    run = Encoder.embed

    def note(self: Encoder, texts: list[str], prompt: str = "", label: str = "") -> Any:
        seen.extend(prompt + text for text in texts)
        return run(self, texts, prompt, label)

    monkeypatch.setattr(Encoder, "embed", note)
    return seen


def test_vectors_ids_and_metadata(
    embed: Embed, papers_file: Papers, tiny_bert: Path, tmp_path: Path
) -> None:
    """The vectors are those of the encoder, chunk by chunk; two of seven abstracts are cut."""
    rows = [make_paper(n, abstract="soil " * (100 if n in (2, 5) else n + 1)) for n in range(7)]
    words = ("--chunk", 3, "--max-length", 40, "--metric", "cosine")
    embed(papers_file(rows), "new/v.npy", *words)
    encoder = load_model(str(tiny_bert), max_length=40, metric="cosine")
    abstracts = [row["abstract"] for row in rows]
    parts = [encoder.embed(abstracts[start : start + 3]).vectors for start in (0, 3, 6)]
    np.save("wanted.npy", torch.cat(parts).numpy())
    assert Path("new/v.npy").read_bytes() == Path("wanted.npy").read_bytes()
    assert rows_of("new/v.npy") == [{"id": row["id"], "title": row["title"]} for row in rows]
    found = about("new/v.npy")
    assert found.items() >= {"rows": 7, "dimension": 32, "cut": 2, "share_cut": 2 / 7}.items()
    assert found.items() >= {"metric": "cosine", "pooling": "cls", "max_length": 40}.items()
    assert found.items() >= {"text": "abstract", "model": str(tiny_bert)}.items()
    assert found["versions"]["torch"] == torch.__version__
    assert len(list((tmp_path / "new").iterdir())) == 3


def test_parquet_and_gzip_hold_the_same(embed: Embed, papers_file: Papers) -> None:
    rows = [make_paper(n, title=f"title {n}\u2028\r with \u202e marks") for n in range(7)]
    plain = papers_file(rows)
    Path("papers.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    embed(plain, "v.npy", "--chunk", 3)
    embed("papers.jsonl.gz", "v.parquet", "--chunk", 3)
    table = pq.read_table("v.parquet")
    assert str(table.schema.field("vector").type) == "fixed_size_list<element: float>[32]"
    assert np.array_equal(np.array(table["vector"].to_pylist(), np.float32), np.load("v.npy"))
    assert table.select(["id", "title"]).to_pylist() == rows_of("v.npy")
    assert about("v.npy") == about("v.parquet")


@pytest.mark.parametrize(
    "recipe, text, wanted",
    [
        (False, None, "{abstract}"),
        (False, "title_abstract", "{title} {abstract}"),
        (False, "title", "{title}"),
        (True, None, "{title}[SEP]{abstract}"),
        (True, "abstract", "{abstract}"),
    ],
)
def test_text_is_what_the_flag_or_else_the_recipe_says(
    recipe: bool,
    text: str | None,
    wanted: str,
    embed: Embed,
    papers_file: Papers,
    tiny_bert: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    usage = Usage("cls", "euclidean", 64)
    joined = Recipe(str(shutil.copytree(tiny_bert, "hub")), usage, "a test", title_first=True)
    monkeypatch.setitem(models.RECIPES, "joined", joined)
    rows = [make_paper(n) for n in range(3)]
    seen = texts_seen(monkeypatch)
    words = ("--model", "joined") if recipe else ()
    embed(papers_file(rows), "v.npy", *words, *(("--text", text) if text else ()))
    assert seen == [wanted.format(**row) for row in rows]
    assert about("v.npy")["text"] == (text or ("title_abstract" if recipe else "abstract"))


def test_the_separator_is_one_token(tiny_bert: Path) -> None:
    tokenizer = load_model(str(tiny_bert)).tokenizer
    ids = tokenizer("soil" + tokenizer.sep_token + "river")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["[CLS]", "soil", "[SEP]", "river", "[SEP]"]


def test_papers_take_the_document_prompt(
    embed: Embed, papers_file: Papers, tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = load_model(str(tiny_bert))
    encoder.usage = Usage("mean", "cosine", 64, query_prompt="soil ", document_prompt="river ")
    save_model(encoder, Path("model"), "tiny")
    seen = texts_seen(monkeypatch)
    embed(papers_file([make_paper(1)]), "v.npy", "--model", "model")
    assert seen == [f"river {make_paper(1)['abstract']}"]
    assert about("v.npy")["query_prompt"] == "soil "


def test_lines_of_text(embed: Embed, tiny_bert: Path) -> None:
    """By file name and from standard input. The id is the line number; blank lines have no row."""
    text = "soil river\n\n  cell market  \n" + "school " * 30 + "\n"
    Path("texts.txt").write_text(text, encoding="utf-8")
    embed("texts.txt", "v.npy")
    titles = {"1": "soil river", "3": "cell market", "4": ("school " * 30)[:100]}
    assert rows_of("v.npy") == [{"id": key, "title": title} for key, title in titles.items()]
    texts = ["soil river", "cell market", ("school " * 30).strip()]
    expected = load_model(str(tiny_bert)).embed(texts).vectors.numpy()
    assert np.array_equal(np.load("v.npy"), expected)
    before = os.dup(0)
    with Path("texts.txt").open() as handle:
        os.dup2(handle.fileno(), 0)
        embed("-", "w.npy", "--format", "lines")
    os.dup2(before, 0)
    assert same_bytes("w.npy", "v.npy")


def test_memory_holds_one_chunk(
    embed: Embed, papers_file: Papers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When a chunk is embedded, no paper of a later chunk has been read."""
    read, seen = [], []
    run = Encoder.embed

    def counting(*args: Any) -> Any:
        for paper in read_papers(*args):
            read.append(paper)
            yield paper

    def note(self: Encoder, texts: list[str], prompt: str = "", label: str = "") -> Any:
        seen.append((len(texts), len(read)))
        return run(self, texts, prompt, label)

    monkeypatch.setattr(embed_papers, "read_papers", counting)
    monkeypatch.setattr(Encoder, "embed", note)
    embed(papers_file([make_paper(n) for n in range(10)]), "v.npy", "--chunk", 4)
    assert seen == [(4, 4), (4, 8), (2, 10)]


def test_a_killed_run_gives_the_same_bytes(
    embed: Embed, papers_file: Papers, tiny_bert: Path
) -> None:
    """After kill -9 at an arbitrary place."""
    source = papers_file([make_paper(n) for n in range(180)])
    embed(source, "whole.npy", "--chunk", 3)
    words: list[str | Path] = [sys.executable, ROOT / "embed_papers.py", "--model", tiny_bert]
    words += ["--input", source, "--chunk", "3", "--output", "killed.npy"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(words, env=environment, stderr=subprocess.DEVNULL)
    parts = Path("killed.npy.parts")
    while process.poll() is None and len(list(parts.glob("*.npz"))) < 4:
        time.sleep(0.001)
    process.kill()
    process.wait()
    assert 4 <= len(list(parts.glob("*.npz"))) < 60
    assert not Path("killed.npy").exists()
    embed(source, "killed.npy", "--chunk", 3)
    assert same_bytes("killed.npy", "whole.npy")
    assert not parts.exists()


def stop(*args: object) -> None:
    raise KeyboardInterrupt


def test_a_stop_while_the_output_is_put_in_place_loses_nothing(
    embed: Embed, papers_file: Papers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second run embeds nothing, because every chunk was kept until the output was there."""
    command = (papers_file([make_paper(n) for n in range(9)]), "v.npy", "--chunk", 2)
    embed(*command)
    whole = Path("v.npy").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", stop)
        with pytest.raises(KeyboardInterrupt):
            embed(*command)
    Path("v.npy").unlink()
    monkeypatch.setattr(Encoder, "embed", stop)
    embed(*command)
    assert Path("v.npy").read_bytes() == whole


def interrupted(embed: Embed, command: tuple[Any, ...], after: int) -> None:
    """Stops a run when it has saved `after` chunks."""
    run, left = Encoder.embed, [after]

    def limited(*args: Any) -> Any:
        left[0] -= 1
        return run(*args) if left[0] >= 0 else stop()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Encoder, "embed", limited)
        with pytest.raises(KeyboardInterrupt):
            embed(*command)


def test_continuing_with_other_settings_model_or_input_is_refused(
    embed: Embed, papers_file: Papers, tiny_bert: Path
) -> None:
    rows = [make_paper(n) for n in range(6)]
    source = papers_file(rows)
    interrupted(embed, (source, "v.npy", "--chunk", 2), after=1)
    with pytest.raises(UserError, match=r"other settings \(\{'max_length': 64\}\)"):
        embed(source, "v.npy", "--chunk", 2, "--max-length", 20)
    with pytest.raises(UserError, match=r"other settings \(\{'text': 'abstract'\}\)"):
        embed(source, "v.npy", "--chunk", 2, "--text", "title")
    other = load_model(str(tiny_bert))
    with torch.no_grad():
        next(other.model.parameters())[0, 0] += 1
    save_model(other, Path("other"), "tiny")
    with pytest.raises(UserError, match=r"other settings \(\{'weights': '\d"):
        embed(source, "v.npy", "--chunk", 2, "--model", "other", "--max-length", 64)
    changed = [rows[0], rows[1] | {"abstract": "another text"}, *rows[2:]]
    with pytest.raises(UserError, match="another input"):
        embed(papers_file(changed, "changed.jsonl"), "v.npy", "--chunk", 2)
    assert not Path("v.npy").exists()
    # Papers that are not embedded yet may change.
    fixed = papers_file([*rows[:4], rows[4] | {"abstract": "fixed"}], "fixed.jsonl")
    embed(fixed, "v.npy", "--chunk", 2)
    assert [row["id"] for row in rows_of("v.npy")] == [f"paper-{n}" for n in range(5)]


def test_a_damaged_chunk_is_named(embed: Embed, papers_file: Papers) -> None:
    command = (papers_file([make_paper(n) for n in range(6)]), "v.npy", "--chunk", 2)
    interrupted(embed, command, after=2)
    path = Path("v.npy.parts/00000001.npz")
    whole = path.read_bytes()
    for damaged in (whole[:-40], b"", whole[:200] + b"#" + whole[201:]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"00000001\.npz: cannot be read"):
            embed(*command)
    path.unlink()
    embed(*command)
    assert np.load("v.npy").shape == (6, 32)


def test_shares_merge_to_what_one_process_writes(
    embed: Embed, merge: Callable[[str, int], None], papers_file: Papers
) -> None:
    """6 chunks in 4 shares, two of which are made elsewhere and copied."""
    rows = [make_paper(n) for n in range(11)]
    source = papers_file(rows)
    embed(source, "whole.npy", "--chunk", 2)
    for share, place in ((1, "v.npy"), (2, "elsewhere/v.npy"), (4, "elsewhere/v.npy")):
        embed(source, place, "--chunk", 2, "--shard", f"{share}/4")
    shutil.copytree("elsewhere/v.npy.parts", "v.npy.parts", dirs_exist_ok=True)
    with pytest.raises(UserError, match=r"lacks share 3 of 4; run --shard 3/4"):
        merge("v.npy", 4)
    other = papers_file([*rows[:-1], rows[-1] | {"abstract": "other"}], "other.jsonl")
    embed(other, "v.npy", "--chunk", 2, "--shard", "3/4")
    with pytest.raises(UserError, match=r"share-3-of-4\.json: had other settings or another inp"):
        merge("v.npy", 4)
    embed(source, "v.npy", "--chunk", 2, "--shard", "3/4")
    merge("v.npy", 4)
    assert same_bytes("v.npy", "whole.npy")
    assert about("v.npy") == about("whole.npy")


def test_more_shares_than_chunks(
    embed: Embed, merge: Callable[[str, int], None], papers_file: Papers
) -> None:
    source = papers_file([make_paper(n) for n in range(3)])
    for part in (1, 2, 3):
        embed(source, "v.npy", "--shard", f"{part}/3")
    merge("v.npy", 3)
    assert np.load("v.npy").shape == (3, 32)


def test_two_runs_with_the_same_output(embed: Embed, papers_file: Papers) -> None:
    source = papers_file([make_paper(n) for n in range(3)])
    with Path(".v.npy.1-of-1.lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="in use by another run"):
            embed(source, "v.npy")
    assert not Path("v.npy.parts").exists()


def test_papers_without_the_text(embed: Embed, papers_file: Papers, tmp_path: Path) -> None:
    source = papers_file([make_paper(0), make_paper(1, abstract=" "), make_paper(2, title="")])
    with pytest.raises(UserError, match=r'papers\.jsonl:2: key "abstract" is blank'):
        embed(source, "v.npy")
    with pytest.raises(UserError, match=r'papers\.jsonl:3: key "title" is blank'):
        embed(source, "v.npy", "--text", "title")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["papers.jsonl"]
    embed(source, "v.npy", "--skip-invalid")
    assert [row["id"] for row in rows_of("v.npy")] == ["paper-0", "paper-2"]


def test_lines_that_are_not_text(embed: Embed) -> None:
    Path("t.txt").write_bytes(b"soil\n\xff\xfe\nriver\n")
    with pytest.raises(UserError, match=r"t\.txt:2: is not UTF-8"):
        embed("t.txt", "v.npy")
    embed("t.txt", "v.npy", "--skip-invalid")
    assert [row["id"] for row in rows_of("v.npy")] == ["1", "3"]
    Path("t.txt").write_bytes(b"\n \n")
    with pytest.raises(UserError, match=r"t\.txt"):
        embed("t.txt", "v.npy")


@pytest.mark.parametrize(
    "words, what",
    [
        ("--output v.csv --model m --input i", "--output v.csv"),
        ("--output v.npy --model m", "--model or --input is missing"),
        ("--output v.npy --model m --input i --shard 3/2", "--shard 3/2"),
        ("--output v.npy --shard 1/2 --merge 2", "together with --merge"),
        ("--output v.npy --model m --input i --chunk 0", "too small"),
        ("--output v.npy --model m --input i --max-length 2", "too small"),
        ("--output v.npy --model m --input i --max-length 0", "too small"),
        ("--output v.npy --model m --input i.txt.gz --text title", "given for lines"),
        ("--output v.npy --model m --input missing.jsonl", "missing.jsonl: no such file"),
        ("--output v.npy --merge 2", "lacks share 1, 2 of 2"),
    ],
)
def test_command_lines_that_cannot_work(
    words: str, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["embed_papers.py", *words.split()])
    with pytest.raises(UserError, match=what):
        embed_papers.main()
    assert not list(tmp_path.iterdir())


def test_help_loads_no_heavy_library() -> None:
    heavy = "{'torch', 'transformers', 'pyarrow'}"
    code = f"import sys, embed_papers, search_papers; print({heavy} & set(sys.modules))"
    assert run_script("-c", code).stdout.strip() == "set()"
    done = run_script("embed_papers.py", "--help")
    assert done.returncode == 0
    for flag in ("--model", "--input", "--output", "--shard", "--merge", "--text"):
        assert flag in done.stdout

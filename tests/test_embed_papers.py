"""embed_papers.py: right vectors in the right rows, the same bytes however often it was killed and
however it was shared out, and clear refusals.
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
import pytest
import torch
from conftest import ROOT, make_paper, run_script

import embed_papers
from semcse import errors, models, papers
from semcse.encoder import Encoder, Usage
from semcse.models import Recipe, Wanted, load_model
from settings import Settings

Write = Callable[..., Path]
Embed = Callable[..., None]
SUFFIXES = ("", ".ids.jsonl", ".json")


@pytest.fixture
def embed(monkeypatch: pytest.MonkeyPatch) -> Embed:
    """Run the script's main with these words, in this process."""
    monkeypatch.setattr(files, "log_to_stderr", lambda: None)

    def run(*words: str | Path) -> None:
        monkeypatch.setattr(sys, "argv", ["embed_papers.py", *map(str, words)])
        embed_papers.main()

    return run


def load(model: Path | str, **wanted: Any) -> Encoder:
    return load_model(str(model), Wanted(**wanted), Settings())[0]


def rows_of(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in Path(f"{path}.ids.jsonl").read_bytes().splitlines()]


def about(path: Path) -> dict[str, Any]:
    return dict(json.loads(Path(f"{path}.json").read_text(encoding="utf-8")))


def texts_seen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every text that reaches the model, prompt included."""
    seen: list[str] = []
    tokenize = Encoder.tokenize

    def note(self: Encoder, texts: list[str], max_length: int) -> list[list[int]]:
        seen.extend(texts if max_length < 10**9 else [])
        return tokenize(self, texts, max_length)

    monkeypatch.setattr(Encoder, "tokenize", note)
    return seen


def test_vectors_ids_and_what_is_said_of_them(
    embed: Embed, papers_file: Write, tiny_bert: Path, tmp_path: Path
) -> None:
    """Chunk by chunk what the encoder gives; the file is np.save's; of seven abstracts the two that
    are long are cut.
    """
    rows = [make_paper(n, abstract="soil " * (100 if n in (2, 5) else n + 1)) for n in range(7)]
    output = tmp_path / "new" / "v.npy"
    embed(
        "--model",
        tiny_bert,
        "--input",
        papers_file(rows),
        "--output",
        output,
        "--chunk",
        "3",
        "--max-length",
        "40",
        "--metric",
        "cosine",
    )
    encoder = load(tiny_bert, max_length=40, metric="cosine")
    wanted = torch.cat(
        [
            encoder.embed([row["abstract"] for row in rows[start : start + 3]]).vectors
            for start in (0, 3, 6)
        ]
    ).numpy()
    np.save(tmp_path / "wanted.npy", wanted)
    assert output.read_bytes() == (tmp_path / "wanted.npy").read_bytes()
    assert np.load(output, mmap_mode="r").shape == (7, 32)
    assert rows_of(output) == [{"id": row["id"], "title": row["title"]} for row in rows]
    found = about(output)
    assert {
        key: found[key]
        for key in (
            "rows",
            "dimension",
            "cut",
            "share_cut",
            "metric",
            "pooling",
            "max_length",
            "text",
            "model",
        )
    } == {
        "rows": 7,
        "dimension": 32,
        "cut": 2,
        "share_cut": 2 / 7,
        "metric": "cosine",
        "pooling": "cls",
        "max_length": 40,
        "text": "abstract",
        "model": str(tiny_bert),
    }
    assert found["seconds"] > 0
    assert found["versions"]["torch"] == torch.__version__
    assert sorted(path.name for path in output.parent.iterdir()) == [
        "v.npy",
        "v.npy.ids.jsonl",
        "v.npy.json",
    ]


def test_parquet_and_gzip_hold_the_same(
    embed: Embed, papers_file: Write, tiny_bert: Path, tmp_path: Path
) -> None:
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    plain = papers_file(
        [make_paper(n, title=f"title {n}\u2028\r with \u202e marks") for n in range(7)]
    )
    zipped = tmp_path / "papers.jsonl.gz"
    zipped.write_bytes(gzip.compress(plain.read_bytes()))
    for source, name in ((plain, "v.npy"), (zipped, "v.parquet")):
        embed("--model", tiny_bert, "--input", source, "--output", tmp_path / name, "--chunk", "3")
    table = pq.read_table(tmp_path / "v.parquet")
    assert str(table.schema.field("vector").type) == "fixed_size_list<element: float>[32]"
    assert np.array_equal(
        np.array(table["vector"].to_pylist(), np.float32), np.load(tmp_path / "v.npy")
    )
    assert table.select(["id", "title"]).to_pylist() == rows_of(tmp_path / "v.npy")
    ignored = {"seconds"}
    first, second = about(tmp_path / "v.npy"), about(tmp_path / "v.parquet")
    assert {key: value for key, value in first.items() if key not in ignored} == {
        key: value for key, value in second.items() if key not in ignored
    }


@pytest.mark.parametrize(
    "recipe, text, wanted",
    [
        (None, None, "{abstract}"),
        (None, "title_abstract", "{title} {abstract}"),
        (None, "title", "{title}"),
        ("joined", None, "{title}[SEP]{abstract}"),
        ("joined", "abstract", "{abstract}"),
    ],
)
def test_text_is_what_the_flag_or_else_the_recipe_says(
    recipe: str | None,
    text: str | None,
    wanted: str,
    embed: Embed,
    papers_file: Write,
    tiny_bert: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    place = shutil.copytree(tiny_bert, tmp_path / "hub")
    monkeypatch.setitem(
        models.RECIPES,
        "joined",
        Recipe(str(place), Usage("cls", "euclidean", 64), "a test", title_first=True),
    )
    monkeypatch.chdir(tmp_path)
    rows = [make_paper(n) for n in range(3)]
    seen = texts_seen(monkeypatch)
    embed(
        "--model",
        recipe or tiny_bert,
        "--input",
        papers_file(rows),
        "--output",
        "v.npy",
        *(("--text", text) if text else ()),
    )
    assert seen == [wanted.format(**row) for row in rows]
    assert about(tmp_path / "v.npy")["text"] == (
        text or ("title_abstract" if recipe else "abstract")
    )


def test_the_separator_is_one_token_and_no_letters(tiny_bert: Path) -> None:
    tokenizer = load(tiny_bert).tokenizer
    ids = tokenizer("soil" + tokenizer.sep_token + "river")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["[CLS]", "soil", "[SEP]", "river", "[SEP]"]


def test_recipes_that_join_title_and_abstract() -> None:
    joined = {name for name, recipe in models.RECIPES.items() if recipe.title_first}
    assert joined == {
        "SciBERT",
        "SciDeBERTa",
        "SPECTER",
        "SciNCL",
        "SPECTER2_base",
        "SPECTER2_proximity",
    }


def test_documents_take_the_document_prompt(
    embed: Embed,
    papers_file: Write,
    tiny_bert: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encoder = load(tiny_bert)
    encoder.usage = Usage("mean", "cosine", 64, query_prompt="soil ", document_prompt="river ")
    encoder.save(tmp_path / "model", base="tiny")
    seen = texts_seen(monkeypatch)
    embed(
        "--model",
        tmp_path / "model",
        "--input",
        papers_file([make_paper(1)]),
        "--output",
        tmp_path / "v.npy",
    )
    assert seen == [f"river {make_paper(1)['abstract']}"]
    assert about(tmp_path / "v.npy")["query_prompt"] == "soil "


def test_lines_of_text_by_name_and_from_standard_input(
    embed: Embed, tiny_bert: Path, tmp_path: Path
) -> None:
    """An id is the number of its line; blank lines have no row."""
    text = "soil river\n\n  cell market  \n" + "school " * 30 + "\n"
    (tmp_path / "texts.txt").write_text(text, encoding="utf-8")
    embed("--model", tiny_bert, "--input", tmp_path / "texts.txt", "--output", tmp_path / "v.npy")
    assert rows_of(tmp_path / "v.npy") == [
        {"id": "1", "title": "soil river"},
        {"id": "3", "title": "cell market"},
        {"id": "4", "title": ("school " * 30)[:100]},
    ]
    assert np.array_equal(
        np.load(tmp_path / "v.npy"),
        load(tiny_bert)
        .embed(["soil river", "cell market", ("school " * 30).strip()])
        .vectors.numpy(),
    )
    words = [
        sys.executable,
        str(ROOT / "embed_papers.py"),
        "--model",
        str(tiny_bert),
        "--input",
        "-",
        "--format",
        "lines",
        "--output",
        "w.npy",
    ]
    subprocess.run(
        words, input=text.encode(), cwd=tmp_path, check=True, timeout=120, capture_output=True
    )
    assert all(
        Path(tmp_path / f"w.npy{end}").read_bytes() == Path(tmp_path / f"v.npy{end}").read_bytes()
        for end in SUFFIXES[:2]
    )


def test_never_more_than_a_chunk_is_read_ahead(
    embed: Embed,
    papers_file: Write,
    tiny_bert: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read, sizes = [0], []
    parse, run = papers._parse, Encoder.embed

    def counting_parse(*args: Any) -> Any:
        read[0] += 1
        return parse(*args)

    def counting_embed(self: Encoder, texts: list[str], *args: Any) -> Any:
        sizes.append((len(texts), read[0]))
        return run(self, texts, *args)

    monkeypatch.setattr(load_data, "_parse", counting_parse)
    monkeypatch.setattr(Encoder, "embed", counting_embed)
    embed(
        "--model",
        tiny_bert,
        "--input",
        papers_file([make_paper(n) for n in range(10)]),
        "--output",
        tmp_path / "v.npy",
        "--chunk",
        "4",
    )
    assert sizes == [(4, 4), (4, 8), (2, 10)]


def test_killed_again_and_again_gives_the_same_bytes(
    embed: Embed, papers_file: Write, tiny_bert: Path, tmp_path: Path
) -> None:
    """kill -9 after every few chunks, wherever the process then is."""
    words = [
        "--model",
        str(tiny_bert),
        "--input",
        str(papers_file([make_paper(n) for n in range(180)])),
        "--chunk",
        "3",
        "--output",
    ]
    embed(*words, tmp_path / "whole.npy")
    parts = tmp_path / "killed.npy.parts"
    kept = [0]
    for _ in range(2):
        command = [
            sys.executable,
            str(ROOT / "embed_papers.py"),
            *words,
            str(tmp_path / "killed.npy"),
        ]
        process = subprocess.Popen(
            command,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while process.poll() is None and len(list(parts.glob("*.npz"))) < kept[-1] + 4:
            time.sleep(0.001)
        process.kill()
        process.wait()
        kept.append(len(list(parts.glob("*.npz"))))
        assert not (tmp_path / "killed.npy").exists()
    assert 0 < kept[1] < kept[2] < 60
    embed(*words, tmp_path / "killed.npy")
    for end in SUFFIXES[:2]:
        assert (
            Path(tmp_path / f"killed.npy{end}").read_bytes()
            == Path(tmp_path / f"whole.npy{end}").read_bytes()
        )
    assert not parts.exists()


def test_a_stop_while_the_output_is_put_in_place_loses_nothing(
    embed: Embed,
    papers_file: Write,
    tiny_bert: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The second run embeds nothing: every chunk was kept until the output was there."""
    words = (
        "--model",
        tiny_bert,
        "--input",
        papers_file([make_paper(n) for n in range(9)]),
        "--output",
        tmp_path / "v.npy",
        "--chunk",
        "2",
    )
    embed(*words)
    whole = (tmp_path / "v.npy").read_bytes()

    def stop(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", stop)
        with pytest.raises(KeyboardInterrupt):
            embed(*words)
    (tmp_path / "v.npy").unlink()
    monkeypatch.setattr(embed_papers, "make_chunk", stop)
    embed(*words)
    assert (tmp_path / "v.npy").read_bytes() == whole


def unfinished(
    embed: Embed, words: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch, after: int = 1
) -> None:
    """Stop a run once it has saved `after` chunks."""
    make = embed_papers.make_chunk
    left = [after]

    def limited(*args: Any) -> Any:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return make(*args)

    with monkeypatch.context() as patch:
        patch.setattr(embed_papers, "make_chunk", limited)
        with pytest.raises(KeyboardInterrupt):
            embed(*words)


def test_going_on_with_other_settings_model_or_input_is_refused_by_name(
    embed: Embed,
    papers_file: Write,
    tiny_bert: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = [make_paper(n) for n in range(6)]
    source, output = papers_file(rows), tmp_path / "v.npy"
    words = ("--model", tiny_bert, "--output", output, "--chunk", "2")
    unfinished(embed, (*words, "--input", source), monkeypatch)
    with pytest.raises(errors.UserError, match=r"max_length was 64, is 20"):
        embed(*words, "--input", source, "--max-length", "20")
    with pytest.raises(errors.UserError, match=r"text was 'abstract', is 'title'"):
        embed(*words, "--input", source, "--text", "title")
    other = load(tiny_bert)
    with torch.no_grad():
        next(other.model.parameters())[0, 0] += 1
    other.save(tmp_path / "other", base="tiny")
    with pytest.raises(errors.UserError, match=r"weights was "):
        embed("--model", tmp_path / "other", *words[2:], "--input", source, "--max-length", "64")
    changed = papers_file(
        [rows[0], rows[1] | {"abstract": "another text"}, *rows[2:]], "changed.jsonl"
    )
    with pytest.raises(errors.UserError, match="another input"):
        embed(*words, "--input", changed)
    assert not output.exists()
    # what is not embedded yet may change
    mended = papers_file([*rows[:4], rows[4] | {"abstract": "mended"}], "mended.jsonl")
    embed(*words, "--input", mended)
    assert [row["id"] for row in rows_of(output)] == [f"paper-{n}" for n in range(5)]


def test_a_damaged_chunk_is_named(
    embed: Embed,
    papers_file: Write,
    tiny_bert: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = (
        "--model",
        tiny_bert,
        "--input",
        papers_file([make_paper(n) for n in range(6)]),
        "--output",
        tmp_path / "v.npy",
        "--chunk",
        "2",
    )
    unfinished(embed, words, monkeypatch, after=2)
    path = tmp_path / "v.npy.parts" / "00000001.npz"
    whole = path.read_bytes()
    for damaged in (whole[:-40], b"", whole[:200] + b"#" + whole[201:]):
        path.write_bytes(damaged)
        with pytest.raises(errors.UserError, match=r"00000001\.npz: cannot be read"):
            embed(*words)
    path.unlink()
    embed(*words)
    assert np.load(tmp_path / "v.npy").shape == (6, 32)


def test_shares_merge_to_what_one_process_writes(
    embed: Embed, papers_file: Write, tiny_bert: Path, tmp_path: Path
) -> None:
    """11 papers in chunks of 2 for 4 shares: the last share has one chunk less. Two shares are made
    elsewhere and copied.
    """
    rows = [make_paper(n) for n in range(11)]
    words = ("--model", tiny_bert, "--input", papers_file(rows), "--chunk", "2")
    embed(*words, "--output", tmp_path / "whole.npy")
    output, elsewhere = tmp_path / "v.npy", tmp_path / "elsewhere" / "v.npy"
    for share, place in (("1/4", output), ("2/4", elsewhere), ("4/4", elsewhere)):
        embed(*words, "--output", place, "--shard", share)
    shutil.copytree(f"{elsewhere}.parts", f"{output}.parts", dirs_exist_ok=True)
    with pytest.raises(errors.UserError, match=r"lacks share 3 of 4; run --shard 3/4"):
        embed("--output", output, "--merge", "4")
    other = papers_file([*rows[:-1], rows[-1] | {"abstract": "other"}], "other.jsonl")
    embed(
        "--model", tiny_bert, "--input", other, "--chunk", "2", "--output", output, "--shard", "3/4"
    )
    with pytest.raises(
        errors.UserError, match=r"share-3-of-4\.json had other settings or another input"
    ):
        embed("--output", output, "--merge", "4")
    embed(*words, "--output", output, "--shard", "3/4")
    embed("--output", output, "--merge", "4")
    for end in SUFFIXES[:2]:
        assert (
            Path(f"{output}{end}").read_bytes()
            == Path(f"{tmp_path / 'whole.npy'}{end}").read_bytes()
        )
    one, merged = about(tmp_path / "whole.npy"), about(output)
    assert {key: one[key] for key in one if key != "seconds"} == {
        key: merged[key] for key in merged if key != "seconds"
    }


def test_more_shares_than_chunks(
    embed: Embed, papers_file: Write, tiny_bert: Path, tmp_path: Path
) -> None:
    words = (
        "--model",
        tiny_bert,
        "--input",
        papers_file([make_paper(n) for n in range(3)]),
        "--output",
        tmp_path / "v.npy",
    )
    for part in (1, 2, 3):
        embed(*words, "--shard", f"{part}/3")
    embed("--output", tmp_path / "v.npy", "--merge", "3")
    assert np.load(tmp_path / "v.npy").shape == (3, 32)


def test_two_runs_on_one_output(
    embed: Embed, papers_file: Write, tiny_bert: Path, tmp_path: Path
) -> None:
    words = (
        "--model",
        tiny_bert,
        "--input",
        papers_file([make_paper(n) for n in range(3)]),
        "--output",
        tmp_path / "v.npy",
    )
    with (tmp_path / ".v.npy.1-of-1.lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(errors.UserError, match="in use by another run"):
            embed(*words)
    assert not (tmp_path / "v.npy.parts").exists()


def test_papers_without_the_text(
    embed: Embed,
    papers_file: Write,
    tiny_bert: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    rows = [make_paper(0), make_paper(1, abstract=" "), make_paper(2, title="")]
    source = papers_file(rows)
    with pytest.raises(errors.UserError, match=r'papers\.jsonl:2: key "abstract" is blank'):
        embed("--model", tiny_bert, "--input", source, "--output", tmp_path / "v.npy")
    with pytest.raises(errors.UserError, match=r'papers\.jsonl:3: key "title" is blank'):
        embed(
            "--model",
            tiny_bert,
            "--input",
            source,
            "--output",
            tmp_path / "v.npy",
            "--text",
            "title",
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["papers.jsonl"]
    embed("--model", tiny_bert, "--input", source, "--output", tmp_path / "v.npy", "--skip-invalid")
    assert [row["id"] for row in rows_of(tmp_path / "v.npy")] == ["paper-0", "paper-2"]
    assert "left out 1 bad lines, kept 2 papers" in caplog.text


def test_lines_that_are_no_text(embed: Embed, tiny_bert: Path, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_bytes(b"soil\n\xff\xfe\nriver\n")
    words = ("--model", tiny_bert, "--input", tmp_path / "t.txt", "--output", tmp_path / "v.npy")
    with pytest.raises(errors.UserError, match=r"t\.txt:2: is not UTF-8"):
        embed(*words)
    embed(*words, "--skip-invalid")
    assert [row["id"] for row in rows_of(tmp_path / "v.npy")] == ["1", "3"]
    (tmp_path / "t.txt").write_bytes(b"\n \n")
    with pytest.raises(errors.UserError, match="holds no text"):
        embed(*words)


@pytest.mark.parametrize(
    "words, what",
    [
        ("--output v.csv --model m --input i", "neither .npy nor .parquet"),
        ("--output v.npy --model m", "--model or --input is missing"),
        ("--output v.npy --model m --input i --shard 3/2", "--shard 3/2"),
        ("--output v.npy --model m --input i --shard 0/2", "--shard 0/2"),
        ("--output v.npy --shard 1/2 --merge 2", "beside --merge"),
        ("--output v.npy --model m --input i --chunk 0", "too small"),
        ("--output v.npy --model m --input i --max-length 2", "too small"),
        ("--output v.npy --model m --input i.txt.gz --text title", "given for lines"),
        ("--output v.npy --model m --input missing.jsonl", "missing.jsonl: no such file"),
        ("--output v.npy --merge 2", "lacks share 1, 2 of 2"),
    ],
)
def test_command_lines_that_cannot_work(
    words: str, what: str, embed: Embed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(errors.UserError, match=what):
        embed(*words.split())
    assert not list(tmp_path.iterdir())


def test_help_is_quick_and_says_what_each_flag_is_for() -> None:
    started = time.monotonic()
    done = run_script("embed_papers.py", "--help")
    assert done.returncode == 0
    assert time.monotonic() - started < 20  # a busy machine; torch would show in the next line
    loaded = run_script(
        "-c",
        "import sys, embed_papers, search_papers; print({'torch', 'transformers', 'pyarrow'} &"
        " set(sys.modules))",
    )
    assert loaded.stdout.strip() == "set()"
    for flag in (
        "--model",
        "--input",
        "--output",
        "--shard",
        "--merge",
        "--skip-invalid",
        "--text",
    ):
        assert flag in done.stdout

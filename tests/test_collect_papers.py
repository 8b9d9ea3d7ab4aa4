"""collect_papers.py: the layouts of the Hub, what is left out and why, and runs that are
interrupted, all on local files.
"""

from __future__ import annotations

import gzip
import json
import logging
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from conftest import ROOT, run_script

import collect_papers
from collect_papers import Command, collect
from semcse import command_line, files
from semcse.errors import RunError, UserError
from semcse.papers import Paper, read_papers
from semcse.sources import open_split


def abstract(number: int, words: int = 50) -> str:
    return " ".join(f"word{number}x{i}" for i in range(words)) + "."


def paper(number: int, **more: Any) -> dict[str, Any]:
    return {"title": f"Title of number {number}", "abstract": abstract(number)} | more


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(rows).to_parquet(path, batch_size=4)


def write_repository(folder: Path, splits: dict[tuple[str, str], list[dict[str, Any]]]) -> None:
    """A data set repository as on the Hub: two parquet shards per split, and a card that names the
    configs.
    """
    card = ["---", "configs:"]
    for (config, split), rows in splits.items():
        for shard, part in enumerate((rows[: len(rows) // 2], rows[len(rows) // 2 :])):
            if part:
                write_parquet(folder / config / f"{split}-{shard:05d}-of-00002.parquet", part)
        if f"- config_name: {config}" not in card:
            card += [f"- config_name: {config}", "  data_files:"]
        card += [f"  - split: {split}", f"    path: {config}/{split}-*"]
    (folder / "README.md").write_text("\n".join([*card, "---", ""]), encoding="utf-8")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder; a data set in it, OWNER/NAME, is preferred to the one on the Hub."""
    datasets.disable_progress_bars()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rows_in(path: Path | str) -> list[dict[str, Any]]:
    return [found.as_row() for found in read_papers(path)]


def counts_in(caplog: pytest.LogCaptureFixture) -> dict[str, int]:
    """What the last run logged: "kept 3 of 5 papers; left out: 2 no abstract" gives {"kept": 3,
    "of": 5, "no abstract": 2}.
    """
    line = next(text for text in reversed(caplog.messages) if " left out: " in text)
    head, reasons, _ = line.split("; ")
    words = head.split()
    parts = reasons.removeprefix("left out: ").split(", ")
    counts = {reason: int(count) for count, _, reason in (part.partition(" ") for part in parts)}
    return {"kept": int(words[-4]), "of": int(words[-2])} | counts


CONFIGS = ("fos", "search", "cite_prediction")
TRAINING = {
    ("fos", "train"): [
        paper(i, corpus_id=i, labels=[1], labels_text=["Biology"]) for i in range(30)
    ],
    ("search", "train"): [
        {
            "query": "some words",
            "doc_id": "q",
            "candidates": [
                paper(i, corpus_id=i, doc_id="sha", venue="v") for i in range(first, first + 4)
            ],
        }
        for first in range(100, 140, 4)
    ],
    ("cite_prediction", "train"): [
        {
            part: paper(first + i, sha=f"sha{first + i}")
            for i, part in enumerate(("query", "pos", "neg"))
        }
        for first in range(200, 230, 3)
    ],
}


def test_scirepeval_papers_are_found_in_rows_candidates_and_triplets(
    hub: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    no_abstract = {"title": "Without", "abstract": None, "corpus_id": 900}
    again = {"query": "x", "doc_id": "q", "candidates": [paper(0, corpus_id=100), no_abstract]}
    splits = TRAINING | {("search", "train"): [*TRAINING["search", "train"], again]}
    write_repository(hub / "allenai/scirepeval", splits)
    collect(Command(output="out.jsonl", source="scirepeval", config=CONFIGS))
    found = rows_in("out.jsonl")
    numbers = {str(i): i for i in (*range(30), *range(100, 140))}
    numbers |= {f"sha{i}": i for i in range(200, 230)}
    assert {row["id"]: (row["title"], row["abstract"]) for row in found} == {
        key: (f"Title of number {i}", abstract(i)) for key, i in numbers.items()
    }
    assert Counter(row["source"] for row in found) == {
        f"allenai/scirepeval {config}": count
        for config, count in zip(CONFIGS, (30, 40, 30), strict=True)
    }
    assert counts_in(caplog) == {
        "kept": 100,
        "of": 102,
        "no abstract": 1,
        "collected already (same id)": 1,
    }


@pytest.mark.parametrize("limit", [59, 62])
def test_configs_mix_evenly_whatever_their_rows_hold(hub: Path, limit: int) -> None:
    write_repository(hub / "allenai/scirepeval", TRAINING)
    collect(Command(output="out.jsonl", source="scirepeval", config=CONFIGS, limit=limit))
    found = Counter(row["source"] for row in rows_in("out.jsonl"))
    assert found.total() == limit
    # The largest row holds 4 papers.
    assert all(abs(limit / 3 - found[f"allenai/scirepeval {config}"]) <= 4 for config in CONFIGS)


def test_scirepeval_reads_its_largest_training_tasks_by_default(hub: Path) -> None:
    tasks = ["fos", "mesh_descriptors", "cite_prediction", "search"]
    write_repository(
        hub / "allenai/scirepeval",
        {(task, "train"): [paper(i, corpus_id=i)] for i, task in enumerate(tasks)},
    )
    collect(Command(output="out.jsonl", source="scirepeval"))
    assert {row["source"] for row in rows_in("out.jsonl")} == {
        f"allenai/scirepeval {task}" for task in tasks
    }


def write_scidocs(hub: Path, labels: dict[str, int], converted: bool = False) -> None:
    """Papers "a" to "z", of which b has no abstract, c a short one that repeats the title, and e
    the abstract of d; and labels in both splits.

    `converted`: the labels have the layout of the branch refs/convert/parquet.
    """
    texts = [
        paper(ord(name), doc_id=name, corpus_id=ord(name)) for name in "abcdefghijklmnopqrstuvwxyz"
    ]
    texts[1]["abstract"] = None
    texts[2]["abstract"] = texts[2]["title"] + " and more"
    texts[4]["abstract"] = texts[3]["abstract"]
    write_repository(hub / "allenai/scirepeval", {("scidocs_mag_mesh", "evaluation"): texts})
    rows = [{"paper_id": name, "label": label} for name, label in labels.items()]
    splits = {
        ("scidocs_mag", "train"): rows[:12],
        ("scidocs_mag", "test"): rows[12:],
        ("scidocs_mesh", "train"): [{"paper_id": "z", "label": 3}] * 2,  # must not be read
    }
    folder = hub / "allenai/scirepeval_test"
    if converted:
        for (config, split), part in splits.items():
            if part:
                write_parquet(folder / config / split / "0000.parquet", part)
    else:
        write_repository(folder, splits)


@pytest.mark.parametrize("converted", [False, True], ids=["card", "parquet branch"])
def test_scidocs_joins_texts_and_labels_and_is_not_filtered(
    hub: Path, caplog: pytest.LogCaptureFixture, converted: bool
) -> None:
    caplog.set_level(logging.INFO)
    labels = {name: i for i, name in enumerate("abcdefghijklmnopqrs")}
    write_scidocs(hub, labels | {"no text": 4, "nor this": 5}, converted)
    collect(Command(output="scidocs.jsonl.gz", source="scidocs"))
    fields = {row["id"]: row["field"] for row in rows_in("scidocs.jsonl.gz")}
    assert list(fields) == list("acdefghijklmnopqrs")
    assert fields["a"] == "Art"
    assert fields["e"] == "Computer science"
    assert fields["s"] == "Sociology"
    assert len(set(fields.values())) == 18
    assert counts_in(caplog) == {"kept": 18, "of": 26, "no label": 7, "no abstract": 1}


def test_a_repository_with_a_script_is_read_from_its_parquet_branch(
    hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_scidocs(hub, {"a": 3}, converted=True)
    load, asked = datasets.load_dataset, []

    def load_dataset(name: str, *words: Any, **options: Any) -> Any:
        if name == "allenai/scirepeval_test" and "revision" not in options:
            raise RuntimeError("Dataset scripts are no longer supported, but found a script")
        asked.append((name, options.get("revision"), options.get("data_dir")))
        return load(name, *words, **options)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    write_parquet(
        hub / "allenai/scirepeval_test/scidocs_mag/test/0000.parquet",
        [{"paper_id": "z", "label": 18}],
    )
    assert collect_papers.scidocs_fields() == {"a": "Chemistry", "z": "Sociology"}
    assert asked == [("allenai/scirepeval_test", "refs/convert/parquet", "scidocs_mag")]
    with pytest.raises(UserError, match="Dataset scripts are no longer supported"):
        open_split("allenai/scirepeval_test", "", "train")  # would mix all configs


def test_a_folder_is_read_like_a_data_set_and_ids_and_summaries_may_have_any_shape(
    hub: Path,
) -> None:
    rows = [
        paper(1, key=17, notes=["One.", None, " Two  words. "]),
        paper(2, key=None, notes=[]),
        paper(3, key=None, notes=None, abstract=None),
        paper(4, key=-1, notes=["Same."]) | {"abstract": abstract(4).replace(" ", "\n\t ")},
    ]
    write_parquet(hub / "library/part.parquet", rows)
    collect(Command(output="out.jsonl", input="library", id="key", summaries="notes"))
    found = rows_in("out.jsonl")
    assert [row.get("summaries") for row in found] == [["One.", "Two words."], None, ["Same."]]
    assert [found[0]["id"], found[2]["id"]] == ["17", "-1"]
    assert found[2]["abstract"] == abstract(4)
    collect(Command(output="again.jsonl", input="library", id="", summaries="notes"))
    hashed = [row["id"] for row in rows_in("again.jsonl")]
    assert hashed[1] == found[1]["id"]
    assert len(set(hashed)) == 3
    assert all(len(one) == 16 for one in hashed)


KNOWN = {"id": "known", **paper(1)}
SCREENED: list[tuple[str | None, dict[str, Any]]] = [
    (None, KNOWN),
    ("no abstract", {"id": "a", **paper(2), "abstract": None}),
    ("no abstract", {"id": "b", **paper(3), "abstract": " \n"}),
    ("no title", {"id": "c", **paper(4), "title": ""}),
    ("short abstract", {"id": "d", **paper(5), "abstract": abstract(5, 39)}),
    (None, {"id": "e", **paper(6), "abstract": abstract(6, 40)}),
    (
        "abstract repeats the title",
        {
            "id": "f",
            "title": "On Rivers: and Seas",
            "abstract": f"{abstract(7)} ON rivers and   seas. {abstract(8)}",
        },
    ),
    # three words may stand there by chance
    (None, {"id": "g", "title": "On Rivers and", "abstract": f"{abstract(9)} on rivers and seas"}),
    # not the same last word
    (
        None,
        {"id": "h", "title": "On rivers and sea", "abstract": f"{abstract(10)} on rivers and seas"},
    ),
    ("collected already (same id)", {"id": "known", **paper(11)}),
    ("collected already (same title)", {"id": "i", **paper(12), "title": "TITLE of  number 1."}),
    (
        "collected already (same abstract)",
        {"id": "j", **paper(13), "abstract": abstract(1) + " One more sentence."},
    ),
    ("in an excluded file (same id)", {"id": "evaluation", **paper(14)}),
    ("in an excluded file (same title)", {"id": "k", **paper(15), "title": "title OF number 800"}),
    ("in an excluded file (same abstract)", {"id": "l", **paper(16), "abstract": abstract(900)}),
    (None, {"id": "m", **paper(17)}),
]


def test_papers_are_left_out_for_the_right_reason_and_counted(
    papers_file: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    excluded = [
        papers_file([{"id": "evaluation", **paper(800)}], "one.jsonl"),
        papers_file([{"id": "other", **paper(900)}], "two.jsonl"),
    ]
    source, output = papers_file([row for _, row in SCREENED]), tmp_path / "out.jsonl"
    collect(Command(output=str(output), input=str(source), exclude=tuple(map(str, excluded))))
    assert [row["id"] for row in rows_in(output)] == [
        row["id"] for reason, row in SCREENED if reason is None
    ]
    reasons = Counter(reason for reason, _ in SCREENED if reason)
    assert counts_in(caplog) == {
        "kept": len(SCREENED) - reasons.total(),
        "of": len(SCREENED),
        **reasons,
    }


def offered_until(
    monkeypatch: pytest.MonkeyPatch,
    run: Callable[[], None],
    place: int = 0,
    stop: Callable[[], None] = lambda: None,
) -> list[str]:
    """Calls `run`, and `stop` after `place` papers were offered. Returns the ids of all papers."""
    offer, offered = collect_papers.CollectedPapers.offer, []

    def noted(self: collect_papers.CollectedPapers, paper: Paper) -> None:
        offer(self, paper)
        offered.append(paper.id)
        if len(offered) == place:
            stop()

    with monkeypatch.context() as patch:
        patch.setattr(collect_papers.CollectedPapers, "offer", noted)
        run()
    return offered


class Killed(BaseException):
    """Stands for kill -9: none of our code runs after it."""


def kill() -> None:
    raise Killed


def write_streams(hub: Path, which: str) -> Command:
    """40 papers, one of them a duplicate and one without an abstract, as two configs of parquet
    shards, JSON lines, a CSV table, or a JSON list with a limit.
    """
    rows = [{"id": f"{i}", **paper(i)} for i in range(40)]
    rows[12] |= {"abstract": None}
    rows[31] |= {"title": rows[2]["title"]}
    if which == "parquet":
        deep = [{"id": "-", "deep": {"er": rows[i : i + 3]}} for i in range(20, 39, 3)]
        write_repository(hub / "owner/name", {("x", "train"): rows, ("y", "train"): deep})
        return Command(output="out.jsonl.gz", input="owner/name", config=("x", "y"))
    text = {"jsonl": "\n".join(map(json.dumps, rows)), "json": json.dumps(rows)}
    text["csv"] = "\n".join(
        ["id,title,abstract", *(",".join(str(cell or "") for cell in row.values()) for row in rows)]
    )
    (hub / f"in.{which}").write_text(text[which], encoding="utf-8")
    return Command(output="out.jsonl", input=f"in.{which}", limit=33 if which == "json" else 0)


@pytest.mark.parametrize(
    "which, how",
    [
        ("parquet", "killed"),
        ("parquet", "interrupted"),
        ("jsonl", "killed while saving"),
        ("jsonl", "terminated"),
        ("csv", "killed"),
        ("json", "killed"),
    ],
)
def test_an_interrupted_run_resumes_and_writes_the_same_file(
    hub: Path, monkeypatch: pytest.MonkeyPatch, which: str, how: str
) -> None:
    signals = {"interrupted": signal.SIGINT, "terminated": signal.SIGTERM}
    monkeypatch.setattr(collect_papers, "CHECKPOINT_ROWS", 4)
    command = write_streams(hub, which)
    output, partial = Path(command.output), Path(f".{command.output}.partial")
    everything = offered_until(monkeypatch, lambda: collect(command))
    whole = output.read_bytes()
    output.unlink()

    def stopped() -> None:
        if how in signals:
            assert command_line.run_command(lambda: collect(command)) == 128 + signals[how]
        else:
            with pytest.raises(Killed):
                collect(command)

    def stop() -> None:
        if how not in signals:
            raise Killed
        os.kill(os.getpid(), signals[how])

    first = offered_until(monkeypatch, stopped, 22, stop)
    assert not output.exists()
    if how == "killed while saving":
        with partial.open("ab") as handle:
            handle.write(json.dumps({"id": everything[-1], **paper(39)}).encode() + b'\n{"id": "to')
    again = offered_until(monkeypatch, lambda: collect(command))
    assert output.read_bytes() == whole
    assert again == everything[-len(again) :]
    lost = len(first) + len(again) - len(everything)
    assert lost == 0 if how in signals else 0 < lost <= 4 * 3  # at most 4 rows of 3 papers
    assert not partial.exists()


def test_an_unfinished_run_is_not_mixed_with_another(
    hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collect_papers, "CHECKPOINT_ROWS", 4)
    command = write_streams(hub, "jsonl")
    with pytest.raises(Killed):
        offered_until(monkeypatch, lambda: collect(command), 20, kill)
    other = Command(output=command.output, input=command.input, min_words=3, exclude=("in.jsonl",))
    with pytest.raises(
        UserError,
        match=r"unfinished run had another exclude, min_words; .*delete \.out\.jsonl\.state\.json",
    ):
        collect(other)
    Path(".out.jsonl.state.json").unlink()
    other = Command(output=command.output, input=command.input, limit=3)
    collect(other)
    assert [row["id"] for row in rows_in("out.jsonl")] == ["0", "1", "2"]


def test_a_lost_connection_ends_the_run_and_the_next_goes_on(
    hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rows(lost: bool) -> Iterator[dict[str, Any]]:
        for i in range(20):
            if i == 10 and lost:
                raise ConnectionError("no route\nto host")
            yield {"id": f"{i}", **paper(i)}

    def connect(lost: bool) -> None:
        stream = datasets.IterableDataset.from_generator(lambda: rows(lost))
        monkeypatch.setattr(collect_papers, "open_streams", lambda command: {"far": stream})

    monkeypatch.setattr(collect_papers, "CHECKPOINT_ROWS", 4)
    command = Command(output="out.jsonl", input="far/away")
    connect(lost=True)
    message = r"^far: reading stopped \(ConnectionError: no route to host\); .*same command again"
    with pytest.raises(RunError, match=message):
        collect(command)
    connect(lost=False)
    assert offered_until(monkeypatch, lambda: collect(command)) == [str(i) for i in range(8, 20)]
    assert [row["id"] for row in rows_in("out.jsonl")] == [str(i) for i in range(20)]


def test_a_wrong_column_is_reported_early(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not only after a whole data set was read. If a paper was found among the first rows, even one
    that is left out, reading continues.
    """
    read = []

    def rows(others: int, key: str) -> Iterator[dict[str, Any]]:
        for i in range(3 * collect_papers.CHECKPOINT_ROWS):
            read.append(i)
            yield {"title": "t", "abstract" if i < others else key: "short"}
        yield {"title": "t", "abstract": abstract(1)}

    monkeypatch.setattr(collect_papers, "CHECKPOINT_ROWS", 50)
    monkeypatch.setattr(collect_papers, "open_streams", lambda command: {"far": rows(0, "text")})
    with pytest.raises(UserError, match=r"columns: title, text\); check --title, --abstract"):
        collect(Command(output="out.jsonl", input="far/away"))
    assert len(read) == 50
    monkeypatch.setattr(
        collect_papers,
        "open_streams",
        lambda command: {"far": datasets.IterableDataset.from_generator(lambda: rows(1, "text"))},
    )
    collect(Command(output="out.jsonl", input="far/away"))
    assert len(rows_in("out.jsonl")) == 1


def test_a_gzipped_output_depends_only_on_its_papers(
    papers_file: Callable[..., Path], tmp_path: Path
) -> None:
    source = papers_file([{"id": str(i), **paper(i)} for i in range(5)])
    for name in ("one.jsonl.gz", "two.jsonl.gz", "plain.jsonl"):
        collect(Command(output=str(tmp_path / name), input=str(source)))
    one = (tmp_path / "one.jsonl.gz").read_bytes()
    assert one == (tmp_path / "two.jsonl.gz").read_bytes()
    assert one[3:8] == bytes(5)  # no name, no time
    assert gzip.decompress(one) == (tmp_path / "plain.jsonl").read_bytes()


BAD_INPUTS = [  # (flags, what the error line says); "--output out.jsonl" comes first
    ("--output= --input good.jsonl", "--output does not name a file"),
    ("--output owner --input good.jsonl", "--output does not name a file"),
    ("", "--source and --input are both given or both missing"),
    ("--source scidocs --input good.jsonl", "--source and --input are both given or both missing"),
    ("--input none.csv", "none.csv: no such file"),
    ("--input notes.docx", "notes.docx: no such file, or not of a kind"),
    ("--input good.jsonl --exclude none.jsonl", "none.jsonl: no such file"),
    (
        "--input good.jsonl --abstract text",
        "kept 0 of 0 papers; left out: none (columns: id, title,",
    ),
    ("--input good.jsonl --min-words 51", "left out: 1 short abstract"),
    ("--input empty.csv", "kept 0 of 0"),
    ("--input bad.jsonl", "bad.jsonl:2: is not a JSON object"),
    ("--input list.jsonl", "list.jsonl:2: is not a JSON object"),
    ("--input bad.bib", "bad.bib:1: a BibTeX entry cannot be read"),
    ("--input latin.csv", "latin.csv: "),
    ("--input bad.parquet", "bad.parquet: "),
    ("--input bad.json", "bad.json: "),
    ("--input torn.jsonl.gz", "torn.jsonl.gz: "),
    ("--input owner/name --config y", "data set owner/name y train cannot be opened"),
    ("--input owner/name --split dev", "data set owner/name dev cannot be opened"),
    ("--input nobody/nothing", "data set nobody/nothing train cannot be opened"),
]


def write_bad_inputs(hub: Path) -> None:
    good = json.dumps({"id": "a", **paper(1)})
    contents = {
        "good.jsonl": good + "\n",
        "bad.jsonl": good + "\n{broken\n",
        "list.jsonl": good + "\n3\n",
        "bad.bib": "@article{a, title = {One}",
        "latin.csv": "id,title,abstract\na,Caf\xe9,x\n",
        "bad.parquet": "PAR1 no parquet at all",
        "bad.json": '[{"title": "a"',
        "empty.csv": "id,title,abstract\n",
        "notes.docx": "x",
    }
    for name, content in contents.items():
        (hub / name).write_text(content, encoding="latin-1")
    (hub / "torn.jsonl.gz").write_bytes(gzip.compress(good.encode() * 50)[:-20])
    write_repository(hub / "owner/name", {("x", "train"): [paper(1)]})


def test_bad_usage_and_input_end_in_one_line_and_write_nothing(
    hub: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command_line, "log_to_stderr", lambda: None)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    write_bad_inputs(hub)
    capfd.readouterr()
    for flags, what in BAD_INPUTS:
        argv = ["collect_papers.py", "--output", "out.jsonl", *flags.split()]
        monkeypatch.setattr(sys, "argv", argv)
        assert command_line.run_command(collect_papers.main) == 2, flags
        lines = capfd.readouterr().err.splitlines()
        [line] = [line for line in lines if line and not line.startswith("collecting")]  # the bar
        assert line.startswith("error: ")
        assert what in line
        assert "; " in line
        written = {path.name for path in hub.iterdir() if "out" in path.name}
        assert written <= {".out.jsonl.lock"}, flags


def test_the_script_says_its_own_line_alone(hub: Path) -> None:
    (hub / "bad.parquet").write_bytes(b"PAR1 no parquet at all")
    done = run_script(
        ROOT / "collect_papers.py", "--output", "out.jsonl", "--input", "bad.parquet", cwd=hub
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: bad.parquet: cannot be read (ArrowInvalid: ")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_two_runs_do_not_write_one_file(
    hub: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command_line, "log_to_stderr", lambda: None)
    write_bad_inputs(hub)
    argv = ["collect_papers.py", "--output", "out.jsonl", "--input", "good.jsonl"]
    monkeypatch.setattr(sys, "argv", argv)
    with files.lock(hub / ".out.jsonl.lock"):
        assert command_line.run_command(collect_papers.main) == 2
    assert "in use by another run" in capfd.readouterr().err
    assert command_line.run_command(collect_papers.main) == 0
    assert len(rows_in("out.jsonl")) == 1


def test_help_comes_without_the_heavy_libraries() -> None:
    code = (
        "import sys, collect_papers\ntry: collect_papers.main()\n"
        "finally: print({'datasets', 'torch', 'pyarrow', 'pandas'} & set(sys.modules))"
    )
    done = run_script("-c", code, "--help")
    assert done.returncode == 0, done.stderr
    assert "--exclude" in done.stdout
    assert done.stdout.endswith("set()\n")

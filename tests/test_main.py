"""main.py as a user runs it: in this process, and as a real process that is killed."""

from __future__ import annotations

import dataclasses
import gzip
import json
import logging
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from conftest import ROOT, make_paper, run_script
from safetensors.torch import load_file
from torch import nn
from toy_training import (
    assert_same_tensors,
    before_step,
    comparable,
    interrupt,
    rows_of,
    toy_papers,
)
from transformers import AutoModel, AutoTokenizer

import main
from semcse import command_line, files
from semcse.types import Metric

TASKS = {"title_abstract", "abstract_segments", "query", "clustering"}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a script ended."""

    code: int
    out: str
    err: str

    @property
    def said(self) -> list[str]:
        """The lines on stderr that are no log lines (which begin with the date) and no progress
        bars.
        """
        return [
            line
            for line in self.err.replace("\r", "\n").splitlines()
            if line.strip()
            and not line.startswith("20")
            and "it/s" not in line
            and "%|" not in line
        ]


@pytest.fixture
def run_main(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., Outcome]]:
    """A function (*words) -> Outcome that runs main.py in this process, offline, as `python main.py
    WORDS` would.
    """
    import huggingface_hub

    root, handler = logging.getLogger(), signal.getsignal(signal.SIGTERM)
    level, handlers = root.level, root.handlers[:]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def run(*words: str | Path) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["main.py", *map(str, words)])
        capsys.readouterr()
        code = command_line.run_command(main.main)
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    yield run
    signal.signal(signal.SIGTERM, handler)
    for added in [added for added in root.handlers if added not in handlers]:
        root.removeHandler(added)
        added.close()
    root.handlers[:] = handlers
    root.setLevel(level)


def jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


TRAIN_ROWS = [make_paper(n) for n in range(16)]
EVAL_ROWS = [make_paper(n, id=f"eval-{n}") for n in range(16, 40)]


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder with good papers files train.jsonl and eval.jsonl."""
    folder = tmp_path / "world"
    folder.mkdir()
    (folder / "train.jsonl").write_bytes(jsonl(TRAIN_ROWS))
    (folder / "eval.jsonl").write_bytes(jsonl(EVAL_ROWS))
    monkeypatch.chdir(folder)
    return folder


def base_words(encoder: Path | str, **flags: str | int | float | None) -> list[str]:
    """The words of a short run in the working folder; a flag given as None is left out."""
    values = {
        "encoder": encoder,
        "train-file": "train.jsonl",
        "eval-file": "eval.jsonl",
        "output-dir": "out",
        "device": "cpu",
        "precision": "float32",
        "batch-size": 6,
        "max-steps": 8,
        "validate-every": 4,
        "checkpoint-every": 3,
        "log-every": 1,
        "learning-rate": 1e-3,
        "validation-share": 0.25,
    } | {name.replace("_", "-"): value for name, value in flags.items()}
    return [
        word
        for name, value in values.items()
        if value is not None
        for word in (f"--{name}", str(value))
    ]


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every file of a folder with its bytes, every folder with None."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def same_benchmark(found: Path, expected: Path) -> bool:
    """Whether two benchmark files agree in all but the seconds and the versions."""
    a, b = (
        {
            key: value
            for key, value in files.read_json(path).items()
            if key not in ("seconds", "versions")
        }
        for path in (found, expected)
    )
    return bool(a == b)


def test_unfinished_runs(
    tiny_bert: Path, world: Path, monkeypatch: pytest.MonkeyPatch, run_main: Callable[..., Outcome]
) -> None:
    """An interrupted run keeps its work, is not overwritten without --resume, not continued with
    other settings, and ends as if it had not been interrupted.
    """
    whole = run_main(*base_words(tiny_bert, output_dir="whole"))
    assert whole.code == 0, whole.err

    before_step(monkeypatch, 5, lambda: interrupt("SIGINT"))
    stopped = run_main(*base_words(tiny_bert))
    assert stopped.code == 130
    assert stopped.said[-1].startswith("error: interrupted; ")
    assert (world / "out/UNFINISHED").exists()
    kept = contents(world / "out")

    refused = run_main(*base_words(tiny_bert))
    assert (refused.code, contents(world / "out")) == (2, kept)
    assert "--resume" in refused.said[-1]
    assert "out" in refused.said[-1]

    changed = run_main(*base_words(tiny_bert, learning_rate=2e-3, batch_size=5), "--resume")
    assert (changed.code, contents(world / "out")) == (2, kept)
    assert "learning_rate was 0.001, is 0.002" in changed.said[-1]
    assert "batch_size was 6, is 5" in changed.said[-1]
    assert "max_steps" not in changed.said[-1]

    good = (world / "train.jsonl").read_bytes()
    for content, what in (
        (good.replace(b"finding 3", b"results 3"), "train_file (SHA-256 of its papers) was "),
        (None, "train.jsonl: no such file"),
    ):
        (
            (world / "train.jsonl").unlink()
            if content is None
            else (world / "train.jsonl").write_bytes(content)
        )
        other = run_main(*base_words(tiny_bert), "--resume")
        assert (other.code, contents(world / "out")) == (2, kept)
        assert what in other.said[-1]
        assert "eval_file" not in other.said[-1]
    (world / "train.jsonl").write_bytes(gzip.compress(good))  # the same papers, another file

    resumed = run_main(*base_words(tiny_bert, keep_checkpoints=1), "--resume")
    assert resumed.code == 0, resumed.err
    assert "resumed from step 6" in (world / "out/run.log").read_text(encoding="utf-8")
    assert_same_tensors(
        load_file(world / "out/model/model.safetensors"),
        load_file(world / "whole/model/model.safetensors"),
    )
    assert comparable(world / "out/metrics.jsonl") == comparable(world / "whole/metrics.jsonl")
    assert all(
        same_benchmark(world / "out" / name, world / "whole" / name)
        for name in ("before.json", "benchmark.json", "recipe.json")
    )
    assert not (world / "out/UNFINISHED").exists()
    assert not (world / "out/checkpoints").exists()

    again = run_main(*base_words(tiny_bert), "--resume")
    assert again.code == 2
    assert "no unfinished run" in again.said[-1]

    finished = contents(world / "out")
    refused = run_main(*base_words(tiny_bert, max_steps=2))
    assert (refused.code, contents(world / "out")) == (2, finished)
    assert "--overwrite, or name another --output-dir" in refused.said[-1]
    assert run_main(*base_words(tiny_bert, max_steps=2), "--overwrite").code == 0
    assert [row["step"] for row in rows_of(world / "out")[0]] == [1, 2]


def test_divergence_as_a_user_sees_it(
    tiny_bert: Path, world: Path, run_main: Callable[..., Outcome]
) -> None:
    """Exit 1, one line that names the step and the flag, and what was done is kept."""
    outcome = run_main(*base_words(tiny_bert, learning_rate=1e30, validate_every=100))
    assert outcome.code == 1
    assert [line for line in outcome.said if line.startswith("error: ")] == [outcome.said[-1]]
    assert "step 2: " in outcome.said[-1]
    assert "--learning-rate" in outcome.said[-1]
    assert "Traceback" not in outcome.err
    assert (world / "out/before.json").exists()
    assert [row["step"] for row in rows_of(world / "out")[0]] == [1]


class Process:
    """main.py as a process of its own, with its stderr in a file."""

    def __init__(self, folder: Path, words: list[str]) -> None:
        self.log = folder / "stderr.txt"
        environment = os.environ | {
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "OMP_NUM_THREADS": "1",
        }
        with self.log.open("w", encoding="utf-8") as stderr:
            self.child = subprocess.Popen(
                [sys.executable, str(ROOT / "main.py"), *words],
                cwd=folder,
                env=environment,
                stdout=stderr,
                stderr=stderr,
            )

    def wait_for_step(self, run: Path, step: int) -> None:
        """Until the run has written the row of `step`."""
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            if (run / "metrics.jsonl").exists() and any(
                row["step"] >= step for row in rows_of(run)[0]
            ):
                return
            assert self.child.poll() is None, self.log.read_text(encoding="utf-8")
            time.sleep(0.005)
        raise AssertionError(f"step {step} was not reached")

    def end(self, sent: signal.Signals | None = None) -> int:
        """Send a signal, wait, and return the exit code."""
        if sent:
            self.child.send_signal(sent)
        return self.child.wait(timeout=120)


@pytest.mark.slow
def test_a_run_killed_three_times_equals_a_run_without_a_break(
    tiny_bert: Path, world: Path
) -> None:
    """Real processes. A run is terminated, interrupted, and killed outright at a random moment, and
    each time resumed. Its results are the same bits as those of a run without a break.
    """
    words = base_words(
        tiny_bert, max_steps=260, validate_every=40, checkpoint_every=15, patience=100
    )
    out = world / "out"
    whole = [*words, "--output-dir", "whole"]
    reference = run_script(ROOT / "main.py", *whole, cwd=world)
    assert reference.returncode == 0, reference.stderr
    finished = contents(world / "whole")
    moment = random.Random().uniform(0, 0.3)
    for sent, code, step, more in (
        (signal.SIGTERM, 143, 20, []),
        (signal.SIGINT, 130, 90, ["--resume"]),
        (signal.SIGKILL, -9, 130, ["--resume"]),
    ):
        process = Process(world, [*words, *more])
        process.wait_for_step(out, step)
        if sent == signal.SIGKILL:
            time.sleep(moment)
        assert process.end(sent) == code, (moment, process.log.read_text(encoding="utf-8"))
        last = process.log.read_text(encoding="utf-8").splitlines()[-1]
        assert (
            last.startswith("error: terminated; " if code == 143 else "error: interrupted; ")
            or code == -9
        )
        assert (out / "UNFINISHED").exists()
    resumed = run_script(ROOT / "main.py", *words, "--resume", cwd=world)
    assert resumed.returncode == 0, (moment, resumed.stderr)

    found = contents(out)
    assert found.keys() == finished.keys()
    assert (out / "run.log").read_text(encoding="utf-8").count("resumed from step") == 3
    assert found["model/model.safetensors"] == finished["model/model.safetensors"], moment
    before = world / "before.jsonl"
    before.write_bytes(cast(bytes, finished["metrics.jsonl"]))
    assert comparable(out / "metrics.jsonl") == comparable(before), moment
    for name in ("before.json", "benchmark.json", "recipe.json"):
        (world / name).write_bytes(cast(bytes, finished[name]))
        assert same_benchmark(out / name, world / name), (name, moment)


# The paper profile


def plain_scores(
    queries: np.ndarray[Any, Any], candidates: np.ndarray[Any, Any], metric: Metric
) -> dict[str, float]:
    """Scores of a ranking task, counted plainly in float64; candidate i belongs to query i."""
    a, b = queries.astype(np.float64), candidates.astype(np.float64)
    if metric == "cosine":
        apart = (
            1
            - (a / np.linalg.norm(a, axis=1)[:, None]) @ (b / np.linalg.norm(b, axis=1)[:, None]).T
        )
    else:
        apart = np.linalg.norm(a[:, None] - b[None], axis=2)
    own = np.diag(apart)[:, None]
    ranks = (
        1 + (apart < own - 1e-9).sum(axis=1) + ((np.abs(apart - own) <= 1e-9).sum(axis=1) - 1) / 2
    )
    return {
        "mean_rank": ranks.mean(),
        "normalised_rank": (ranks.mean() - 1) / (len(b) - 1),
        "median_rank": float(np.median(ranks)),
        "mrr": (1 / ranks).mean(),
        "recall_at_1": (ranks <= 1).mean(),
        "recall_at_10": (ranks <= 10).mean(),
    }


def check_benchmark_file(report: dict[str, Any], metric: Metric) -> None:
    """benchmark.json has the documented shape, and its numbers fit one another."""
    assert report.keys() >= {
        "model",
        "metric",
        "pooling",
        "eval_file",
        "n_papers",
        "tasks",
        "settings",
        "versions",
        "seconds",
    }
    assert (report["metric"], report["pooling"], report["n_papers"], report["eval_file"]) == (
        metric,
        "cls",
        24,
        "eval.jsonl",
    )
    assert report["tasks"].keys() == TASKS
    for name in TASKS - {"clustering"}:
        task = report["tasks"][name]
        assert task.keys() >= {
            "mean_rank",
            "normalised_rank",
            "median_rank",
            "mrr",
            "recall_at_1",
            "recall_at_10",
            "ci95",
            "n",
            "pool",
        }
        assert (task["n"], task["pool"]) == (24, 24)
        assert 1 <= task["ci95"][0] <= task["mean_rank"] <= task["ci95"][1] <= 24
    clustering = report["tasks"]["clustering"]
    # two fields of twelve
    assert (clustering["k"], clustering["n"], clustering["left_out"]) == (10, 24, 0)
    assert 0 <= clustering["ci95"][0] <= clustering["purity"] <= clustering["ci95"][1] <= 1
    assert report["versions"]["torch"] == torch.__version__
    assert all(value >= 0 for value in report["seconds"].values())


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_the_paper_profile_end_to_end(
    tiny_deberta: Path, world: Path, run_main: Callable[..., Outcome], metric: Metric
) -> None:
    """A checkpoint laid out as SciDeBERTa's: five steps, benchmark, and a folder that AutoModel and
    SentenceTransformer open with equal vectors, from which the benchmark's numbers follow by plain
    counting.
    """
    from sentence_transformers import SentenceTransformer

    shutil.copytree(tiny_deberta, world / "lively_deberta")  # made livelier, as above
    weights = torch.load(tiny_deberta / "pytorch_model.bin")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    torch.save(
        {name: tensor * (8 if tensor.dim() == 2 else 1) for name, tensor in weights.items()},
        world / "lively_deberta/pytorch_model.bin",
    )
    (world / "train.jsonl").write_bytes(
        jsonl([{"id": paper.id, "summaries": paper.summaries} for paper in toy_papers(60)])
    )
    outcome = run_main(
        "--profile",
        "paper",
        "--encoder",
        "lively_deberta",
        "--train-file",
        "train.jsonl",
        "--eval-file",
        "eval.jsonl",
        "--max-steps",
        "5",
        "--metric",
        metric,
        "--device",
        "cpu",
        "--learning-rate",
        "3e-3",
        "--log-every",
        "1",
        "--validate-every",
        "1",
        "--validation-share",
        "0.3",
    )
    assert outcome.code == 0, outcome.err
    out = world / f"runs/paper-{metric}"
    assert {
        "settings.json",
        "metrics.jsonl",
        "run.log",
        "model",
        "before.json",
        "recipe.json",
        "benchmark.json",
        "benchmark.md",
    } <= set(os.listdir(out))
    assert not {"UNFINISHED", "checkpoints"} & set(os.listdir(out))
    recorded = files.read_json(out / "settings.json")
    assert recorded["settings"]["metric"] == metric
    assert recorded["settings"]["seed"] == 0
    assert recorded["versions"].keys() >= {"commit", "torch"}
    assert recorded["device"] == "cpu"
    assert [row["step"] for row in rows_of(out)[0]] == [1, 2, 3, 4, 5]
    validations = rows_of(out)[1]
    assert (
        min(row["validation_rank"] for row in validations) < 0.7 * validations[0]["validation_rank"]
    )
    reports = {
        name: files.read_json(out / f"{name}.json") for name in ("before", "benchmark", "recipe")
    }
    for report in reports.values():
        if report is not reports["recipe"]:
            check_benchmark_file(report, metric)
    assert reports["before"]["tasks"] != reports["benchmark"]["tasks"]

    table = [line for line in outcome.out.splitlines() if line.startswith("|")]
    assert len(table) == 5  # head, rule, three rows
    assert all(task in table[0] for task in TASKS)
    assert table[0].count("pool 24") == 4
    for row, report in zip(table[2:], reports.values(), strict=True):
        for task, score, digits in [
            *((name, "mean_rank", 2) for name in TASKS - {"clustering"}),
            ("clustering", "purity", 3),
        ]:
            values = [report["tasks"][task][score], *report["tasks"][task]["ci95"]]
            assert "{} [{}, {}]".format(*(f"{value:.{digits}f}" for value in values)) in row
    assert all(line in (out / "benchmark.md").read_text(encoding="utf-8") for line in table)

    titles, abstracts = [row["title"] for row in EVAL_ROWS], [row["abstract"] for row in EVAL_ROWS]
    library = SentenceTransformer(str(out / "model"), device="cpu")
    assert library.similarity_fn_name == metric
    by_library = {"titles": library.encode(titles), "abstracts": library.encode(abstracts)}
    model = cast(nn.Module, AutoModel.from_pretrained(out / "model")).eval()
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    with torch.no_grad():
        plain = (
            model(
                **tokenizer(
                    abstracts, padding=True, truncation=True, max_length=512, return_tensors="pt"
                )
            )
            .last_hidden_state[:, 0]
            .numpy()
        )
    np.testing.assert_allclose(plain, by_library["abstracts"], atol=1e-5)
    expected = plain_scores(by_library["titles"], by_library["abstracts"], metric)
    task = reports["benchmark"]["tasks"]["title_abstract"]
    assert {key: task[key] for key in expected} == pytest.approx(expected, abs=1e-6)


def test_paper_profile_without_its_data_names_the_commands_that_make_it(
    world: Path, run_main: Callable[..., Outcome]
) -> None:
    before = contents(world.parent)
    outcome = run_main("--profile", "paper")
    assert outcome.code == 2
    assert len(outcome.said) == 1
    assert outcome.said[0].startswith("error: ")
    assert "collect_papers.py" in outcome.said[0]
    assert "generate_train_summaries.py" in outcome.said[0]
    assert without_lock(contents(world.parent)) == before


# Bad input as a user sees it


def without_lock(found: dict[str, bytes | None]) -> dict[str, bytes | None]:
    return {
        name: content
        for name, content in found.items()
        if not name.endswith(".lock") and name != "world/runs"
    }


def changed_row(
    number: int, rows: list[dict[str, Any]] = TRAIN_ROWS, drop: str = "", **changes: Any
) -> bytes:
    """A papers file whose line `number` (from 1) is changed or lacks the key `drop`."""
    row = {key: value for key, value in (rows[number - 1] | changes).items() if key != drop}
    return jsonl([*rows[: number - 1], row, *rows[number:]])


GOOD = jsonl(TRAIN_ROWS)
ZIPPED = gzip.compress(GOOD)
SUMMARY = {"summaries": ["Soil holds water.", "soil  HOLDS water"]}
# name: (files to put into the working folder (None: a folder), flags, what the one line must hold)
BAD: dict[str, tuple[dict[str, bytes | None], dict[str, Any], str]] = {
    "train file empty": ({"train.jsonl": b""}, {}, "train.jsonl: holds no papers"),
    "eval file of blank lines": ({"eval.jsonl": b"\n  \n"}, {}, "eval.jsonl: holds no papers"),
    "train file missing": ({}, {"train_file": "absent.jsonl"}, "absent.jsonl: no such file"),
    "eval file missing": ({}, {"eval_file": "absent.jsonl"}, "absent.jsonl: no such file"),
    "train file is a folder": (
        {"papers": None},
        {"train_file": "papers"},
        "papers: cannot be read (Is a directory)",
    ),
    "eval file is a folder": (
        {"papers": None},
        {"eval_file": "papers"},
        "papers: cannot be read (Is a directory)",
    ),
    "train file binary": ({"train.jsonl": bytes(range(256)) * 9}, {}, "train.jsonl:1: is not text"),
    "train file truncated gzip": ({"train.jsonl": ZIPPED[:-30]}, {}, "train.jsonl: damaged gzip"),
    "train file gzip with a flipped bit": (
        {"train.jsonl": ZIPPED[:200] + bytes([ZIPPED[200] ^ 4]) + ZIPPED[201:]},
        {},
        "train.jsonl",
    ),
    "eval file truncated gzip": (
        {"eval.jsonl.gz": gzip.compress(jsonl(EVAL_ROWS))[:40]},
        {"eval_file": "eval.jsonl.gz"},
        "eval.jsonl.gz: damaged gzip",
    ),
    "train file cut in a line": ({"train.jsonl": GOOD[:-20]}, {}, "train.jsonl:16: is not JSON"),
    "train file latin-1": (
        {"train.jsonl": GOOD.replace(b"number 4", b"na\xefve", 1)},
        {},
        "train.jsonl:5: is not UTF-8",
    ),
    "train file utf-16": (
        {"train.jsonl": GOOD.decode().encode("utf-16")},
        {},
        "train.jsonl:1: is not",
    ),
    "train file a table": (
        {"train.jsonl": b"id,summaries\n1,some text\n"},
        {},
        "train.jsonl:1: is not JSON",
    ),
    "line a list": (
        {"train.jsonl": GOOD + b'["paper"]\n'},
        {},
        "train.jsonl:17: is not a JSON object",
    ),
    "line with NaN": (
        {"train.jsonl": changed_row(3, year=math.nan)},
        {},
        "train.jsonl:3: is not JSON (",
    ),
    "id a number": (
        {"train.jsonl": changed_row(2, id=7)},
        {},
        'train.jsonl:2: key "id" is not a string',
    ),
    "summaries a string": (
        {"train.jsonl": changed_row(6, summaries="one text")},
        {},
        'train.jsonl:6: key "summaries" is not a list of strings',
    ),
    "summaries of numbers": (
        {"train.jsonl": changed_row(6, summaries=[1, 2])},
        {},
        'train.jsonl:6: key "summaries" is not a list of strings',
    ),
    "summaries missing": (
        {"train.jsonl": changed_row(9, drop="summaries")},
        {},
        'train.jsonl:9: key "summaries" is missing',
    ),
    "id missing": (
        {"train.jsonl": changed_row(16, drop="id")},
        {},
        'train.jsonl:16: key "id" is missing',
    ),
    "id blank": ({"train.jsonl": changed_row(4, id="  ")}, {}, 'train.jsonl:4: key "id" is blank'),
    "id twice": (
        {"train.jsonl": changed_row(8, id="paper-2")},
        {},
        'train.jsonl:8: id "paper-2" is already on an earlier line',
    ),
    "eval id twice": (
        {"eval.jsonl": changed_row(8, EVAL_ROWS, id="eval-17")},
        {},
        'eval.jsonl:8: id "eval-17" is already on an earlier line',
    ),
    "summary blank": (
        {"train.jsonl": changed_row(1, summaries=["text", " "])},
        {},
        'train.jsonl:1: key "summaries" is blank',
    ),
    "abstract missing": (
        {"eval.jsonl": changed_row(3, EVAL_ROWS, drop="abstract")},
        {},
        'eval.jsonl:3: key "abstract" is missing',
    ),
    "title null": (
        {"eval.jsonl": changed_row(3, EVAL_ROWS, title=None)},
        {},
        'eval.jsonl:3: key "title" is not a string',
    ),
    "abstract blank": (
        {"eval.jsonl": changed_row(3, EVAL_ROWS, abstract="\n")},
        {},
        'eval.jsonl:3: key "abstract" is blank',
    ),
    "eval file with one paper": (
        {"eval.jsonl": jsonl(EVAL_ROWS[:1])},
        {},
        "eval.jsonl: holds one paper only",
    ),
    "all train papers in the eval file": ({"train.jsonl": jsonl(EVAL_ROWS)}, {}, "train.jsonl: "),
    "one summary each": (
        {"train.jsonl": jsonl([row | {"summaries": row["summaries"][:1]} for row in TRAIN_ROWS])},
        {},
        "train.jsonl: ",
    ),
    "summaries that are one text": (
        {"train.jsonl": jsonl([row | SUMMARY for row in TRAIN_ROWS])},
        {},
        "train.jsonl: ",
    ),
    "three train papers": ({"train.jsonl": jsonl(TRAIN_ROWS[:3])}, {}, "train.jsonl: "),
    "model unknown": (
        {},
        {"encoder": "no-such-group/no-such-model"},
        "no-such-group/no-such-model",
    ),
    "model folder missing": ({}, {"encoder": "./models/mine"}, "./models/mine: no such folder"),
    "model folder without a model": (
        {"papers": None},
        {"encoder": "papers"},
        "papers holds no config.json",
    ),
    "model folder without weights": (
        {"half/config.json": b'{"model_type": "bert"}'},
        {"encoder": "half"},
        "model half cannot be loaded",
    ),
    "model with broken config": (
        {"half/config.json": b"{"},
        {"encoder": "half"},
        "model half cannot be loaded",
    ),
    "model trained for the other metric": (
        {},
        {"encoder": "trained", "metric": "cosine"},
        "--metric cosine contradicts trained",
    ),
    "model trained with the other pooling": (
        {},
        {"encoder": "trained", "pooling": "mean"},
        "--pooling mean contradicts trained",
    ),
    "steps 0": ({}, {"max_steps": 0}, "--max-steps"),
    "batch of one": ({}, {"batch_size": 1}, "--batch-size"),
    "learning rate nan": ({}, {"learning_rate": "nan"}, "--learning-rate"),
    "learning rate negative": ({}, {"learning_rate": "-0.001"}, "--learning-rate"),
    "margin infinite": ({}, {"margin": "inf"}, "--margin"),
    "validation share 1.5": ({}, {"validation_share": 1.5}, "--validation-share"),
    "seed too large": ({}, {"seed": 2**70}, "--seed"),
    "cuda without a GPU": ({}, {"device": "cuda"}, "--device cuda"),
    "output folder is a file": ({"out": b"precious"}, {}, "world/out: is a file"),
    "output folder below a file": (
        {"file": b"precious"},
        {"output_dir": "file/out"},
        "--output-dir ",
    ),
    "output folder with other files": (
        {"out/thesis.txt": b"precious"},
        {},
        "world/out: holds files that are not a run's",
    ),
    "output folder is the working folder": (
        {},
        {"output_dir": "."},
        "world: holds files that are not a run's",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(
    tiny_bert: Path,
    world: Path,
    monkeypatch: pytest.MonkeyPatch,
    run_main: Callable[..., Outcome],
    case: str,
) -> None:
    """Exit 2, one line that names file (and line) or flag and a fix, no traceback, nothing
    written.
    """
    given, flags, needed = BAD[case]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name, content in given.items():
        path = world / name
        if content is None:
            path.mkdir()
        else:
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
    if flags.get("encoder") == "trained":
        shutil.copytree(tiny_bert, world / "trained")
        files.write_json(
            world / "trained/semcse.json",
            {
                "metric": "euclidean",
                "pooling": "cls",
                "max_length": 64,
                "query_prompt": "",
                "document_prompt": "",
                "normalize": False,
            },
        )
    before = contents(world.parent)
    outcome = run_main(*base_words(**({"encoder": tiny_bert} | flags)))
    assert outcome.code == 2
    assert len(outcome.said) == 1, outcome.err
    what, fix = outcome.said[0].split("; ", 1)
    assert what.startswith("error: ")
    assert needed in what
    assert ("output_dir" in flags or "out" in given or "out/thesis.txt" in given) == (
        "--output-dir" in what
    )
    assert len(fix) > 8
    assert without_lock(contents(world.parent)) == before


def test_a_refused_run_leaves_no_trace(
    tiny_bert: Path, world: Path, run_main: Callable[..., Outcome]
) -> None:
    """Not even the lock's file and the folders above the output."""
    before = contents(world.parent)
    assert (
        run_main(*base_words(tiny_bert, train_file="absent.jsonl", output_dir="new/deep/out")).code
        == 2
    )
    assert contents(world.parent) == before

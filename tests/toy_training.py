"""For tests of training: papers to learn from, short settings, and ways to interrupt a run."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import WORDS
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

import train_embedding_model
from load_data import batch_pairs
from semcse.encoder import Encoder, Usage
from semcse.files import Journal
from semcse.model_folder import load_encoder
from semcse.papers import Paper
from semcse.types import Metric, Pooling
from settings import Settings, complete

MEASURED = {"pairs_per_second", "tokens_per_second", "peak_memory_mib"}  # differ from run to run


def toy_papers(count: int, start: int = 0, summaries: int = 4) -> list[Paper]:
    """Papers that can be told apart: all summaries of a paper hold its own two words, in changing
    places among words of no meaning.
    """
    papers = []
    for n in range(start, start + count):
        own = (WORDS[n % 20], WORDS[20 + (7 * n + n // 20) % 20])
        texts = [
            " ".join((own[i % 2], *"abcd"[: i + 1], own[(i + 1) % 2], str(i)))
            for i in range(summaries)
        ]
        papers.append(Paper(f"toy-{n}", summaries=tuple(texts)))
    return papers


def make_settings(**changes: Any) -> Settings:
    """Settings of a short run on the CPU in float32; `changes` override them."""
    values: dict[str, Any] = {
        "device": "cpu",
        "precision": "float32",
        "batch_size": 6,
        "max_steps": 12,
        "validate_every": 3,
        "checkpoint_every": 4,
        "log_every": 1,
        "train_max_length": 32,
        "learning_rate": 1e-3,
        "output_dir": "unused",
    }
    return complete(dataclasses.replace(Settings(), **(values | changes)))


def load(folder: Path, metric: Metric = "euclidean", pooling: Pooling = "cls") -> Encoder:
    return load_encoder(str(folder), Usage(pooling, metric, 64), "cpu")


def without_dropout(encoder: Encoder) -> None:
    for module in encoder.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def rows_of(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(rows of training steps, rows of validations) of a run's metrics.jsonl."""
    rows = Journal.rows(folder / "metrics.jsonl")
    return [row for row in rows if "loss" in row], [row for row in rows if "validation_rank" in row]


def comparable(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl without what is measured by the clock."""
    return [
        {key: value for key, value in row.items() if key not in MEASURED}
        for row in Journal.rows(path)
    ]


def checkpoint(folder: Path, step: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, progress) of the checkpoint written at `step`."""
    path = folder / "checkpoints" / f"step-{step:08d}.safetensors"
    with safe_open(path, framework="pt") as stored:
        return load_file(path), json.loads(stored.metadata()["state"])


def assert_same_tensors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [key for key in expected if not torch.equal(found[key], expected[key])] == []


def before_step(monkeypatch: pytest.MonkeyPatch, step: int, action: Callable[[], object]) -> None:
    """Do `action` when training asks for the pairs of its step number `step` (counted from 0),
    once.
    """
    waiting = [step]

    def wrapped(
        papers: list[Paper], seed: int, at: int, batch_size: int, joined_share: float
    ) -> list[tuple[str, str]]:
        if waiting == [at]:
            waiting.clear()
            action()
        return batch_pairs(papers, seed, at, batch_size, joined_share)

    monkeypatch.setattr(train_embedding_model, "batch_pairs", wrapped)


def fail() -> None:
    raise OSError(errno.EIO, "the power went")


def interrupt(kind: str) -> None:
    if kind == "crash":
        fail()
    for _ in range(2 if kind == "SIGINT twice" else 1):
        os.kill(os.getpid(), signal.SIGTERM if kind == "SIGTERM" else signal.SIGINT)

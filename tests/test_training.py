"""Training, resuming and the life of a run folder: train_embedding_model.py in process, main.py in
process and as a real process that is killed.
"""

from __future__ import annotations

import dataclasses
import errno
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
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from conftest import ROOT, WORDS, make_paper, run_script
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

import main
import train_embedding_model
from load_data import batch_pairs, read_training_papers
from semcse import command_line, files
from semcse.encoder import Encoder, Usage, uses_bf16
from semcse.errors import RunError, Terminated
from semcse.files import Journal
from semcse.model_folder import load_encoder
from semcse.papers import Paper
from semcse.types import Metric, Pooling, Precision
from settings import Loss, Settings, complete
from train_embedding_model import Progress, contrastive_loss, train

STEP_KEYS = {
    "step",
    "loss",
    "loss_ema",
    "learning_rate",
    "positive_distance",
    "negative_distance",
    "active_share",
    "spread",
    "grad_norm",
    "pairs_per_second",
    "tokens_per_second",
    "peak_memory_mib",
}
VALIDATION_KEYS = {"step", "validation_rank", "validation_loss", "validation_pool", "best"}
MEASURED = {"pairs_per_second", "tokens_per_second", "peak_memory_mib"}  # differ from run to run
TASKS = {"title_abstract", "abstract_segments", "query", "clustering"}


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


# What one step does


def test_training_learns(lively_bert: Path, tmp_path: Path) -> None:
    """On a task that can be learnt the loss falls, and unseen papers are told apart far better than
    before.
    """
    settings = make_settings(max_steps=80, validate_every=20, batch_size=16, learning_rate=3e-3)
    train(load(lively_bert), toy_papers(120), toy_papers(40, 200), settings, tmp_path)
    steps, validations = rows_of(tmp_path)
    losses = [row["loss"] for row in steps]
    assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:10])
    first, best = validations[0], min(validations, key=lambda row: row["validation_rank"])
    assert first["step"] == 0
    assert first["validation_pool"] == 40
    assert best["validation_rank"] - 1 < 0.3 * (first["validation_rank"] - 1)


@pytest.mark.parametrize(
    "metric, loss, pooling, clip, decay",
    [
        ("euclidean", "triplet", "cls", 0.0, False),
        ("cosine", "infonce", "mean", 0.5, True),
        ("cosine", "triplet", "cls", 0.01, False),
    ],
)
def test_steps_equal_a_reference(
    lively_bert: Path,
    tmp_path: Path,
    metric: Metric,
    loss: Loss,
    pooling: Pooling,
    clip: float,
    decay: bool,
) -> None:
    """Three steps equal three steps written out with plain transformers and torch: pooling, loss,
    rates, clipping, AdamW, and every logged number.
    """
    changes: dict[str, Any] = {
        "metric": metric,
        "loss": loss,
        "pooling": pooling,
        "clip_norm": clip,
        "decay": decay,
        "joined_share": 0.5 * decay,
    }
    settings = make_settings(
        max_steps=3, checkpoint_every=3, warmup_steps=2, weight_decay=0.3, **changes
    )
    assert settings.margin is not None
    assert settings.temperature is not None
    papers = [Paper(f"{n}", summaries=tuple(make_paper(n)["summaries"])) for n in range(14)]
    encoder = load(lively_bert, metric, pooling)
    without_dropout(encoder)
    train(encoder, papers, toy_papers(4), settings, tmp_path)
    tensors, _ = checkpoint(tmp_path, 3)
    steps, _ = rows_of(tmp_path)

    model = cast(nn.Module, AutoModel.from_pretrained(lively_bert, dtype=torch.float32)).eval()
    tokenizer = AutoTokenizer.from_pretrained(lively_bert)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, weight_decay=0.3, foreach=False)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    noise = set()
    for step in range(3):
        pairs = batch_pairs(papers, settings.seed, step, settings.batch_size, settings.joined_share)
        batch = tokenizer(
            [a for a, _ in pairs] + [p for _, p in pairs],
            padding=True,
            truncation=True,
            max_length=32,
            return_tensors="pt",
        )
        hidden = model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        ).last_hidden_state
        lengths = batch["attention_mask"].sum(dim=1).tolist()
        assert len(set(lengths)) > 1  # or padding would not be tested
        vectors = (
            hidden[:, 0]
            if pooling == "cls"
            else torch.stack(
                [row[:length].mean(dim=0) for row, length in zip(hidden, lengths, strict=True)]
            )
        )
        values = contrastive_loss(
            vectors[:6], vectors[6:], metric, loss, settings.margin, settings.temperature
        )
        values.loss.backward()  # type: ignore[no-untyped-call]
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        norm = math.sqrt(sum(g.square().sum().item() for g in gradients.values()))
        noise |= {
            name for name, gradient in gradients.items() if gradient.abs().max() < 1e-6 * norm
        }
        for gradient in gradients.values():
            gradient.mul_(min(1.0, clip / norm) if clip else 1.0)
        assert not clip or norm > clip  # or clipping would not be tested
        rate = 1e-3 * ((0.5, 2 / 3, 1 / 3) if decay else (0.5, 1.0, 1.0))[step]
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        points = vectors.detach().double().numpy()
        centred = points - points.mean(axis=0)
        expected = {
            "step": step + 1,
            "loss": values.loss.item(),
            "learning_rate": rate,
            "grad_norm": norm,
            "active_share": values.active_share,
            "positive_distance": values.positive_distance,
            "negative_distance": values.negative_distance,
            "spread": math.sqrt((centred**2).sum() / (points**2).sum()),
        }
        assert {key: steps[step][key] for key in expected} == pytest.approx(expected, rel=2e-4)
    found = {
        key.removeprefix("model/"): value
        for key, value in tensors.items()
        if key.startswith("model/")
    }
    # Keys' biases and, under the Euclidean distance, the bias added to all vectors alike change
    # nothing: AdamW blows the rounding of their gradient 0 up.
    assert all(
        "key.bias" in name
        or (name == "semcse.encoder.layer.1.output.LayerNorm.bias" and metric == "euclidean")
        for name in noise
    )
    for name, weight in model.named_parameters():
        if name not in noise:
            change, expected_change = found[name] - start[name], weight.detach() - start[name]
            # A step moves a weight by about the learning rate, 1e-3: a difference of 2% of that in
            # any weight is seen.
            torch.testing.assert_close(
                change,
                expected_change,
                rtol=0,
                atol=2e-5,
                msg=f"{name}: {(change - expected_change).abs().max()}",
            )


def test_dropout_is_on_in_training_and_off_in_validation(tiny_bert: Path, tmp_path: Path) -> None:
    """Without dropout the first step has another loss from the same weights and pairs, and the
    validation before it the same values.
    """
    encoders = {"with": load(tiny_bert), "without": load(tiny_bert)}
    without_dropout(encoders["without"])
    for name, encoder in encoders.items():
        train(
            encoder, toy_papers(20), toy_papers(4, 50), make_settings(max_steps=1), tmp_path / name
        )
    (steps, validations), (other_steps, other_validations) = (
        rows_of(tmp_path / name) for name in encoders
    )
    assert steps[0]["loss"] != other_steps[0]["loss"]
    assert validations[0] == other_validations[0]


def test_batch_smaller_than_batch_size(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fewer papers than batch_size make one whole batch of all; the rates are pairs and real tokens
    over the clock's seconds since the last row.
    """
    clock = iter(range(0, 10_000, 2))
    # every look at the clock is two seconds later
    monkeypatch.setattr(
        train_embedding_model, "time", SimpleNamespace(perf_counter=lambda: next(clock))
    )
    papers = [
        Paper(f"{n}", summaries=(f"soil {'river ' * n}", f"cell {'market ' * n}"))
        for n in range(1, 6)
    ]
    train(
        load(tiny_bert),
        papers,
        toy_papers(3),
        make_settings(
            batch_size=32, max_steps=4, log_every=2, validate_every=100, checkpoint_every=100
        ),
        tmp_path,
    )
    steps, _ = rows_of(tmp_path)
    assert [row["step"] for row in steps] == [2, 4]
    tokens = 2 * sum(n + 3 for n in range(1, 6))  # both texts of paper n: [CLS], n + 1 words, [SEP]
    assert [row["pairs_per_second"] for row in steps] == [2 * 5 / 2] * 2
    assert [row["tokens_per_second"] for row in steps] == [2 * tokens / 2] * 2


def test_summaries_longer_than_the_model_allows_are_cut(tiny_bert: Path, tmp_path: Path) -> None:
    """The tiny model has 64 positions: a train_max_length beyond them must cut at 64, as embedding
    does, not run off the position table.
    """
    papers = [
        Paper(f"{n}", summaries=(f"{WORDS[n]} " * 200, f"{WORDS[n]} soil " * 100)) for n in range(6)
    ]
    train(
        load(tiny_bert),
        papers,
        toy_papers(3),
        make_settings(train_max_length=128, max_steps=1),
        tmp_path,
    )
    assert math.isfinite(rows_of(tmp_path)[0][0]["loss"])


def test_metrics_rows(tiny_bert: Path, tmp_path: Path) -> None:
    """Rows stand at their steps with exactly the documented keys; the EMA follows its rule; the
    peak memory is the kernel's figure.
    """
    train(
        load(tiny_bert),
        toy_papers(30),
        toy_papers(6, 40),
        make_settings(max_steps=11, log_every=2, validate_every=4),
        tmp_path,
    )
    steps, validations = rows_of(tmp_path)
    assert [row["step"] for row in steps] == [2, 4, 6, 8, 10, 11]
    assert [row["step"] for row in validations] == [0, 4, 8, 11]
    assert all(row.keys() == STEP_KEYS for row in steps)
    assert all(row.keys() == VALIDATION_KEYS for row in validations)
    high_water = next(
        line
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        if line.startswith("VmHWM")
    )
    assert steps[-1]["peak_memory_mib"] == pytest.approx(
        int(high_water.split()[1]) / 1024, rel=0.02
    )

    train(
        load(tiny_bert),
        toy_papers(30),
        toy_papers(6, 40),
        make_settings(max_steps=11, log_every=1, validate_every=4),
        tmp_path / "every",
    )
    every, _ = rows_of(tmp_path / "every")
    average = every[0]["loss"]
    assert every[0]["loss_ema"] == average
    for row in every[1:]:
        average = 0.98 * average + 0.02 * row["loss"]
        assert row["loss_ema"] == pytest.approx(average, rel=1e-12)
    assert comparable(tmp_path / "metrics.jsonl") == [
        row
        for row in comparable(tmp_path / "every/metrics.jsonl")
        if row in comparable(tmp_path / "metrics.jsonl")
    ]


def plain_validation(encoder: Encoder, sides: list[list[str]], metric: Metric) -> float:
    """Mean over both directions of 1 + closer candidates + half of the equally close ones; each
    text is embedded alone, everything in float64.
    """
    encoder.model.eval()
    with torch.no_grad():
        embedded = [
            [
                encoder.model(**encoder.tokenizer(text, return_tensors="pt"))
                .last_hidden_state[0, 0]
                .double()
                .numpy()
                for text in side
            ]
            for side in sides
        ]
    ranks = []
    for queries, candidates in (embedded, embedded[::-1]):
        for i, query in enumerate(queries):
            if metric == "euclidean":
                apart = [np.linalg.norm(query - candidate) for candidate in candidates]
            else:
                apart = [
                    1 - query @ candidate / np.linalg.norm(query) / np.linalg.norm(candidate)
                    for candidate in candidates
                ]
            others = [distance - apart[i] for j, distance in enumerate(apart) if j != i]
            ranks.append(
                1 + sum(d < -1e-9 for d in others) + sum(abs(d) <= 1e-9 for d in others) / 2
            )
    return float(np.mean(ranks))


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_best_weights_are_kept_and_patience_ends_the_run(
    lively_bert: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    metric: Metric,
) -> None:
    """Training that goes well for 50 steps and then is spoilt by a huge learning rate: the
    validation ranks are those of a plain count, the weights of the best validation are in the model
    afterwards, and the run ends `patience` validations after it.
    """
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(
        train_embedding_model, "learning_rate", lambda settings, step: 3e-3 if step < 50 else 0.5
    )
    texts: list[list[str]] = []
    embed = Encoder.embed

    def recording(self: Encoder, given: list[str], *more: str) -> Any:
        texts.append(list(given))
        return embed(self, given, *more)

    monkeypatch.setattr(Encoder, "embed", recording)
    held_out = toy_papers(40, 200)
    encoder = load(lively_bert, metric)
    progress = train(
        encoder,
        toy_papers(120),
        held_out,
        make_settings(metric=metric, max_steps=500, batch_size=16, validate_every=25, patience=2),
        tmp_path,
    )
    steps, validations = rows_of(tmp_path)
    best = max(i for i, row in enumerate(validations) if row["best"])
    assert 0 < validations[best]["step"] <= 50
    assert len(validations) == best + 1 + 2
    assert any(
        message.startswith(f"stopped early at step {validations[-1]['step']}")
        for message in caplog.messages
    )
    assert steps[-1]["step"] == validations[-1]["step"] == validations[best]["step"] + 2 * 25
    scores = [(row["validation_rank"], row["validation_loss"]) for row in validations]
    assert [row["best"] for row in validations] == [
        all(score < earlier for earlier in scores[:i]) for i, score in enumerate(scores)
    ]
    assert scores[-1][0] > scores[best][0] + 1  # spoilt indeed
    assert dataclasses.asdict(progress)["best_step"] == validations[best]["step"]

    sides = texts[:2]
    assert all(
        a != b and {a, b} <= set(paper.summaries)
        for a, b, paper in zip(*sides, held_out, strict=True)
    )
    assert texts == sides * len(validations)
    assert plain_validation(load(lively_bert), sides, metric) == pytest.approx(
        validations[0]["validation_rank"], abs=1e-9
    )
    assert plain_validation(encoder, sides, metric) == pytest.approx(
        validations[best]["validation_rank"], abs=1e-9
    )


def test_rank_decides_and_loss_parts_equal_ranks(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Validations with prescribed ranks and losses: a better rank wins whatever the loss, a lower
    loss wins only at an equal rank.
    """
    prescribed = [
        (3.0, 0.5, True),
        (3.0, 0.4, True),
        (4.0, 0.1, False),
        (2.0, 0.9, True),
        (2.0, 0.9, False),
        (2.5, 0.2, False),
        (2.0, 0.8, True),
    ]
    loss = train_embedding_model._Trainer._loss
    number = iter(range(100))

    def prescribed_loss(self: Any, anchors: Tensor, positives: Tensor) -> Any:
        if anchors.requires_grad:
            return loss(self, anchors, positives)
        return SimpleNamespace(
            loss=torch.tensor(prescribed[next(number) // 3][1], dtype=torch.float64)
        )

    def prescribed_ranks(queries: Tensor, candidates: Tensor, metric: Metric) -> Tensor:
        return torch.full((len(queries),), prescribed[next(number) // 3][0], dtype=torch.float64)

    # each validation ranks twice, then takes the loss
    monkeypatch.setattr(train_embedding_model._Trainer, "_loss", prescribed_loss)
    monkeypatch.setattr(train_embedding_model, "ranks", prescribed_ranks)
    progress = train(
        load(tiny_bert),
        toy_papers(20),
        toy_papers(4, 50),
        make_settings(max_steps=6, validate_every=1, patience=3),
        tmp_path,
    )
    assert [
        (row["validation_rank"], row["validation_loss"], row["best"])
        for row in rows_of(tmp_path)[1]
    ] == prescribed
    assert (
        progress.best_step,
        progress.best_rank,
        progress.best_loss,
        progress.validations_since_best,
    ) == (6, 2.0, 0.8, 0)


def test_bf16_follows_float32_roughly(tiny_bert: Path, tmp_path: Path) -> None:
    """The same training under bf16 autocast, without dropout, which draws otherwise there: other
    numbers, but close ones; weights stay float32.
    """
    losses: dict[Precision, list[float]] = {}
    for precision in cast(list[Precision], ["float32", "bf16"]):
        encoder = load(tiny_bert)
        for module in encoder.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        train(
            encoder,
            toy_papers(60),
            toy_papers(10, 200),
            make_settings(precision=precision, max_steps=20),
            tmp_path / precision,
        )
        losses[precision] = [row["loss"] for row in rows_of(tmp_path / precision)[0]]
        assert {parameter.dtype for parameter in encoder.model.parameters()} == {torch.float32}
    assert losses["bf16"] != losses["float32"]
    assert losses["bf16"] == pytest.approx(losses["float32"], rel=0.06)


@pytest.mark.parametrize(
    "capabilities, expected",
    [
        ({}, False),
        ({"avx512_bf16": True}, True),
        ({"amx_bf16": True}, True),
        ({"avx512_bf16": False}, False),
    ],
)
def test_auto_precision_asks_the_hardware(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], expected: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert uses_bf16("auto", torch.device("cpu")) is expected
    assert uses_bf16("bf16", torch.device("cpu"))
    assert not uses_bf16("float32", torch.device("cpu"))


# Faults


@pytest.mark.parametrize(
    "place, value",
    [("weight", math.nan), ("weight", math.inf), ("gradient", math.nan), ("gradient", math.inf)],
)
def test_poison_stops_the_run_at_its_step(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, value: float
) -> None:
    """A weight, or only its gradient, that is not finite in the seventh step ends the run there;
    the checkpoint of step 4 is left, sound, and continued.
    """
    encoder = load(tiny_bert)

    def poison() -> None:
        embeddings = next(iter(encoder.model.parameters()))
        if place == "gradient":
            embeddings.register_hook(lambda gradient: gradient + value)  # type: ignore[no-untyped-call]
        else:
            with torch.no_grad():
                embeddings[2, 0] = value  # of [CLS], which every text has

    before_step(monkeypatch, 6, poison)
    settings = make_settings(validate_every=100)
    with pytest.raises(RunError, match=r"^step 7: .*not finite.*; .*--learning-rate") as caught:
        train(encoder, toy_papers(30), toy_papers(6, 40), settings, tmp_path)
    assert caught.value.exit_code == 1
    tensors, progress = checkpoint(tmp_path, 4)
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
    assert progress["step"] == 4
    assert [row["step"] for row in rows_of(tmp_path)[0]] == [1, 2, 3, 4, 5, 6]
    assert train(load(tiny_bert), toy_papers(30), toy_papers(6, 40), settings, tmp_path).step == 12


# With validate_every=1 it is Encoder.embed, which knows no step, that notices.
@pytest.mark.parametrize("validate_every", [100, 1])
def test_divergence_names_its_step(tiny_bert: Path, tmp_path: Path, validate_every: int) -> None:
    """A learning rate of 1e30 ruins the weights in step 1. Whether the next step or a validation
    notices, the error names the step.
    """
    with pytest.raises(RunError, match=r"step [12]\b"):
        train(
            load(tiny_bert),
            toy_papers(30),
            toy_papers(6, 40),
            make_settings(learning_rate=1e30, validate_every=validate_every),
            tmp_path,
        )


@pytest.mark.parametrize("share", [0.0, 0.25])
def test_start_share_averages_the_best_weights_with_the_start(
    tiny_bert: Path, tmp_path: Path, share: float
) -> None:
    """Weight by weight: share x start + (1 - share) x best validation's."""
    encoder = load(tiny_bert)
    start = {name: value.detach().clone() for name, value in encoder.model.named_parameters()}
    train(encoder, toy_papers(30), toy_papers(6, 40), make_settings(start_share=share), tmp_path)
    best = {
        key.removeprefix("best/"): value
        for key, value in checkpoint(tmp_path, 12)[0].items()
        if key.startswith("best/")
    }
    assert any((best[name] - value).abs().max() > 1e-4 for name, value in start.items())
    for name, value in encoder.model.named_parameters():
        torch.testing.assert_close(
            value.detach(), share * start[name] + (1 - share) * best[name], rtol=0, atol=1e-7
        )


# Resuming


@pytest.fixture(scope="module")
def whole_run(
    tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Encoder, Progress]:
    """Twelve steps without a break, dropout on: what every interrupted and resumed run must equal
    bit by bit.
    """
    folder = tmp_path_factory.mktemp("whole")
    encoder = load(tiny_bert)
    return (
        folder,
        encoder,
        train(encoder, toy_papers(40), toy_papers(8, 50), make_settings(), folder),
    )


def interrupt(kind: str) -> None:
    if kind == "crash":
        fail()
    for _ in range(2 if kind == "SIGINT twice" else 1):
        os.kill(os.getpid(), signal.SIGTERM if kind == "SIGTERM" else signal.SIGINT)


@pytest.mark.parametrize(
    "kind, step, error, resumed_at",
    [
        # The next two stop before the first checkpoint: the validation row of step 0 must not stand
        # twice.
        ("crash", 0, OSError, 0),
        ("crash", 3, OSError, 0),
        ("crash", 7, OSError, 4),
        ("crash", 11, OSError, 8),
        ("SIGTERM", 0, Terminated, 1),
        ("SIGTERM", 5, Terminated, 6),
        ("SIGINT", 9, KeyboardInterrupt, 10),
        ("SIGINT", 11, KeyboardInterrupt, 12),
        # the second one does not wait for the step's end
        ("SIGINT twice", 6, KeyboardInterrupt, 4),
    ],
)
def test_resumed_run_equals_a_whole_one(
    tiny_bert: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    whole_run: tuple[Path, Encoder, Progress],
    kind: str,
    step: int,
    error: type[BaseException],
    resumed_at: int,
) -> None:
    """Crashed, terminated or interrupted before step `step` + 1 and continued: weights, optimizer,
    random state, progress and rows are the same bits.
    """
    caplog.set_level(logging.INFO)
    before_step(monkeypatch, step, lambda: interrupt(kind))
    with pytest.raises(error):
        train(load(tiny_bert), toy_papers(40), toy_papers(8, 50), make_settings(), tmp_path)
    check_resumed(tiny_bert, tmp_path, caplog, whole_run, resumed_at)


# A checkpoint of step 0 would make the first validation be written and counted for the patience
# twice.
def test_resume_after_a_signal_in_the_first_validation(
    tiny_bert: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    whole_run: tuple[Path, Encoder, Progress],
) -> None:
    """A run stopped before its first step: the validation of step 0 stands once in the rows and
    counts once for the patience.
    """
    caplog.set_level(logging.INFO)
    embed = Encoder.embed

    def terminated(self: Encoder, texts: list[str]) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        monkeypatch.setattr(Encoder, "embed", embed)
        return embed(self, texts)

    monkeypatch.setattr(Encoder, "embed", terminated)
    with pytest.raises(Terminated):
        train(load(tiny_bert), toy_papers(40), toy_papers(8, 50), make_settings(), tmp_path)
    assert rows_of(tmp_path)[0] == []
    check_resumed(tiny_bert, tmp_path, caplog, whole_run, 0)


def check_resumed(
    tiny_bert: Path,
    folder: Path,
    caplog: pytest.LogCaptureFixture,
    whole_run: tuple[Path, Encoder, Progress],
    resumed_at: int,
) -> None:
    """Continue the run in `folder` and compare everything with the whole run."""
    whole, whole_encoder, whole_progress = whole_run
    caplog.clear()
    torch.manual_seed(99)  # a new process has another random state
    encoder = load(tiny_bert)
    progress = train(encoder, toy_papers(40), toy_papers(8, 50), make_settings(), folder)
    assert f"resumed from step {resumed_at}" in caplog.messages
    assert comparable(folder / "metrics.jsonl") == comparable(whole / "metrics.jsonl")
    assert progress == whole_progress
    assert_same_tensors(encoder.model.state_dict(), whole_encoder.model.state_dict())
    (tensors, stored), (whole_tensors, whole_stored) = checkpoint(folder, 12), checkpoint(whole, 12)
    assert stored == whole_stored
    assert any(key.startswith("optimizer/") for key in tensors)
    assert_same_tensors(tensors, whole_tensors)


def test_torn_checkpoints_are_named_and_passed_over(
    tiny_bert: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    whole_run: tuple[Path, Encoder, Progress],
) -> None:
    """Damaged checkpoints (a bad disk) are named in the log. The run goes on from the one before,
    or from the start where none is whole; and the next time it is killed, before its first own
    checkpoint or after, the damaged ones stand in nobody's way.
    """
    caplog.set_level(logging.INFO)
    interrupt_at(10, tiny_bert, tmp_path, monkeypatch)
    older, newest = (tmp_path / f"checkpoints/step-{step:08d}.safetensors" for step in (4, 8))
    newest.write_bytes(newest.read_bytes()[:-100])
    caplog.clear()
    interrupt_at(
        6, tiny_bert, tmp_path, monkeypatch, make_settings(checkpoint_every=7, keep_checkpoints=1)
    )
    assert "resumed from step 4" in caplog.messages
    assert any(
        message.startswith(f"{newest}: is no whole checkpoint") for message in caplog.messages
    )
    content = bytearray(older.read_bytes())
    content[-3] ^= 16  # one bit of one weight
    older.write_bytes(content)
    caplog.clear()
    interrupt_at(
        6, tiny_bert, tmp_path, monkeypatch, make_settings(checkpoint_every=5, keep_checkpoints=1)
    )
    assert "resumed from step 0" in caplog.messages
    assert any(
        message.startswith(f"{older}: its content is not what was written")
        for message in caplog.messages
    )
    assert any(
        "no whole checkpoint is left; training starts over" in message
        for message in caplog.messages
    )
    assert [path.name for path in sorted(older.parent.iterdir())] == ["step-00000005.safetensors"]
    check_resumed(tiny_bert, tmp_path, caplog, whole_run, 5)


def interrupt_at(
    step: int,
    encoder: Path,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: Settings | None = None,
) -> None:
    """The run of `whole_run`, in `folder`, up to an error before step `step` + 1."""
    before_step(monkeypatch, step, fail)
    with pytest.raises(OSError, match="the power went"):
        train(load(encoder), toy_papers(40), toy_papers(8, 50), settings or make_settings(), folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"precision": "bf16", "start_share": 0.25, "texts_at_once": 5},
        {"patience": 2, "max_steps": 30, "keep_checkpoints": 1},
    ],
)
def test_resumed_equals_whole_in_bf16_averaged_with_the_start_and_stopped_early(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    """The same bits too under bf16 autocast, where the start's weights come back only from the
    encoder, and where patience ends the run.
    """
    settings, found = make_settings(**changes), []
    for name in ("whole", "broken"):
        if name == "broken":
            interrupt_at(5, tiny_bert, tmp_path / name, monkeypatch, settings)
            torch.manual_seed(99)
        encoder = load(tiny_bert)
        found.append(
            (
                train(encoder, toy_papers(40), toy_papers(8, 50), settings, tmp_path / name),
                encoder.model.state_dict(),
            )
        )
    assert found[0][0] == found[1][0]
    assert changes.get("patience") != 2 or found[0][0].step < 30
    assert_same_tensors(found[1][1], found[0][1])
    assert comparable(tmp_path / "broken/metrics.jsonl") == comparable(
        tmp_path / "whole/metrics.jsonl"
    )


@pytest.mark.parametrize(
    "place, named",
    [
        ("step", r"--texts-at-once \(0 is all\), --batch-size or --train-max-length"),
        ("validation", "--max-length"),
    ],
)
def test_out_of_memory_names_the_setting_and_keeps_the_work(
    tiny_bert: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    whole_run: tuple[Path, Encoder, Progress],
    caplog: pytest.LogCaptureFixture,
    place: str,
    named: str,
) -> None:
    """In a step, or where the held-out papers are embedded after it; when memory is free again the
    run goes on to the same bits.
    """
    caplog.set_level(logging.INFO)
    forward = Encoder.forward

    def greedy(self: Encoder, ids: Any) -> Tensor:
        return (
            torch.empty(2**50)
            if torch.is_grad_enabled() == (place == "step")
            else forward(self, ids)
        )

    before_step(monkeypatch, 5, lambda: monkeypatch.setattr(Encoder, "forward", greedy))
    with pytest.raises(RunError, match=rf"^out of memory \(.*\); .*{named}$") as caught:
        train(load(tiny_bert), toy_papers(40), toy_papers(8, 50), make_settings(), tmp_path)
    assert caught.value.exit_code == 1
    monkeypatch.undo()
    check_resumed(tiny_bert, tmp_path, caplog, whole_run, 4)


# Which papers are trained on


def test_evaluation_papers_are_never_trained_on(
    papers_file: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    """Dropped and counted: the same id, the same title in other spelling, an abstract that differs
    in one word; the others are all used.
    """
    caplog.set_level(logging.INFO)
    rows = [
        make_paper(
            n,
            abstract=(
                f"{make_paper(n)['abstract']} {' '.join(str(n * 1000 + i) for i in range(40))}"
            ),
        )
        for n in range(12)
    ]
    evaluation = [
        make_paper(100, id="paper-3"),
        make_paper(101, title="  ".join(rows[5]["title"].upper().split()) + "."),
        make_paper(102, abstract=rows[7]["abstract"].replace("First", "Initially")),
        make_paper(103),
    ]
    train_file, eval_file = papers_file(rows, "train.jsonl"), papers_file(evaluation, "eval.jsonl")
    settings = make_settings(train_file=str(train_file), eval_file=str(eval_file))
    papers, held_out = read_training_papers(
        settings, [Paper(row["id"], row["title"], row["abstract"]) for row in evaluation]
    )
    assert sorted(paper.id for paper in papers + held_out) == sorted(
        f"paper-{n}" for n in range(12) if n not in (3, 5, 7)
    )
    assert (
        f"dropped 3 training papers that stand in {eval_file} (1 by abstract, 1 by id, 1 by title)"
        in caplog.messages
    )


# main.py


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


def test_refusal_of_a_hidden_unfinished_run_names_what_to_delete(
    tiny_bert: Path, world: Path, monkeypatch: pytest.MonkeyPatch, run_main: Callable[..., Outcome]
) -> None:
    """Over a finished run the unfinished one stands beside it: the refusal must not tell the user
    to delete the finished results, and its mend must work.
    """
    assert run_main(*base_words(tiny_bert, max_steps=2)).code == 0
    finished = contents(world / "out")
    before_step(monkeypatch, 1, fail)
    crashed = run_main(*base_words(tiny_bert, max_steps=3))
    assert crashed.code != 0
    assert contents(world / "out") == finished
    refused = run_main(*base_words(tiny_bert, max_steps=3))
    assert refused.code == 2
    assert str(Path("out").with_name(".out.next")) in refused.said[-1]


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


def test_a_run_killed_three_times_replaces_the_finished_one_only_at_its_end(
    tiny_bert: Path, world: Path
) -> None:
    """Real processes. A finished run; the same run again over it, terminated, interrupted, and
    killed outright at a random moment, each time resumed: the old results stay whole until the end,
    and the new ones are the same bits as those of the run without a break.
    """
    words = base_words(
        tiny_bert, max_steps=260, validate_every=40, checkpoint_every=15, patience=100
    )
    out, beside = world / "out", world / ".out.next"
    reference = run_script(ROOT / "main.py", *words, cwd=world)
    assert reference.returncode == 0, reference.stderr
    finished = contents(out)
    moment = random.Random().uniform(0, 0.3)
    for sent, code, step, more in (
        (signal.SIGTERM, 143, 20, []),
        (signal.SIGINT, 130, 90, ["--resume"]),
        (signal.SIGKILL, -9, 130, ["--resume"]),
    ):
        process = Process(world, [*words, *more])
        process.wait_for_step(beside, step)
        if sent == signal.SIGKILL:
            time.sleep(moment)
        assert process.end(sent) == code, (moment, process.log.read_text(encoding="utf-8"))
        last = process.log.read_text(encoding="utf-8").splitlines()[-1]
        assert (
            last.startswith("error: terminated; " if code == 143 else "error: interrupted; ")
            or code == -9
        )
        assert contents(out) == finished, moment
        assert (beside / "UNFINISHED").exists()
    resumed = run_script(ROOT / "main.py", *words, "--resume", cwd=world)
    assert resumed.returncode == 0, (moment, resumed.stderr)

    assert not beside.exists()
    found = contents(out)
    assert found.keys() == finished.keys()
    assert found["run.log"] != finished["run.log"]  # the new run's, not the old one's
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
    "train file is a folder": ({"papers": None}, {"train_file": "papers"}, "papers: is a folder"),
    "eval file is a folder": ({"papers": None}, {"eval_file": "papers"}, "papers: is a folder"),
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
    "line a list": ({"train.jsonl": GOOD + b'["paper"]\n'}, {}, "train.jsonl:17: is a list"),
    "line with NaN": (
        {"train.jsonl": changed_row(3, year=math.nan)},
        {},
        "train.jsonl:3: is not JSON (NaN",
    ),
    "id a number": (
        {"train.jsonl": changed_row(2, id=7)},
        {},
        'train.jsonl:2: key "id" is a number',
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
        'train.jsonl:8: id "paper-2" stands on an earlier line',
    ),
    "eval id twice": (
        {"eval.jsonl": changed_row(8, EVAL_ROWS, id="eval-17")},
        {},
        'eval.jsonl:8: id "eval-17" stands on an earlier line',
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
        'eval.jsonl:3: key "title" is null',
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
    "steps a word": ({}, {"max_steps": "ten"}, "--max-steps"),
    "batch of one": ({}, {"batch_size": 1}, "--batch-size"),
    "learning rate nan": ({}, {"learning_rate": "nan"}, "--learning-rate"),
    "learning rate negative": ({}, {"learning_rate": "-0.001"}, "--learning-rate"),
    "margin infinite": ({}, {"margin": "inf"}, "--margin"),
    "validation share 1.5": ({}, {"validation_share": 1.5}, "--validation-share"),
    "seed too large": ({}, {"seed": 2**70}, "--seed"),
    "metric unknown": ({}, {"metric": "manhattan"}, "manhattan"),
    "profile unknown": ({}, {"profile": "poster"}, "poster"),
    "flag unknown": ({}, {"lerning_rate": 1}, "--lerning-rate"),
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
    """Exit 2, one line that names file (and line) or flag and a mend, no traceback, nothing
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
            {"metric": "euclidean", "pooling": "cls", "max_length": 64},
        )
    before = contents(world.parent)
    outcome = run_main(*base_words(**({"encoder": tiny_bert} | flags)))
    assert outcome.code == 2
    assert len(outcome.said) == 1, outcome.err
    what, mend = outcome.said[0].split("; ", 1)
    assert what.startswith("error: ")
    assert needed in what
    assert ("output_dir" in flags or "out" in given or "out/thesis.txt" in given) == (
        "--output-dir" in what
    )
    assert len(mend) > 8
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

"""The training loop: steps against a reference, validation, best weights, checkpoints, faults."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from conftest import WORDS, make_paper
from torch import Tensor, nn
from toy_training import (
    assert_same_tensors,
    before_step,
    checkpoint,
    comparable,
    fail,
    interrupt,
    load,
    make_settings,
    rows_of,
    toy_papers,
    without_dropout,
)
from transformers import AutoModel, AutoTokenizer

import train_embedding_model
from load_data import batch_pairs, read_training_papers
from semcse.encoder import Encoder, uses_bf16
from semcse.errors import RunError, Terminated
from semcse.papers import Paper
from semcse.types import Metric, Pooling, Precision
from settings import Loss, Settings
from train_embedding_model import Progress, contrastive_loss, train

STEP_KEYS = {
    "step",
    "loss",
    "loss_ema",
    "learning_rate",
    "positive_distance",
    "negative_distance",
    "active_share",
    "relative_std",
    "grad_norm",
    "pairs_per_second",
    "tokens_per_second",
    "peak_memory_mib",
}
VALIDATION_KEYS = {"step", "validation_rank", "validation_loss", "validation_pool", "best"}


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
            "relative_std": math.sqrt((centred**2).sum() / (points**2).sum()),
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
        or (name == "encoder.layer.1.output.LayerNorm.bias" and metric == "euclidean")
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
    over the seconds of the step.
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
    assert [row["pairs_per_second"] for row in steps] == [5 / 2] * 2
    assert [row["tokens_per_second"] for row in steps] == [tokens / 2] * 2


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


def test_best_weights_are_kept_and_patience_ends_the_run(
    lively_bert: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
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
    encoder = load(lively_bert, "cosine")
    progress = train(
        encoder,
        toy_papers(120),
        held_out,
        make_settings(metric="cosine", max_steps=500, batch_size=16, validate_every=25, patience=2),
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
    assert plain_validation(load(lively_bert), sides, "cosine") == pytest.approx(
        validations[0]["validation_rank"], abs=1e-9
    )
    assert plain_validation(encoder, sides, "cosine") == pytest.approx(
        validations[best]["validation_rank"], abs=1e-9
    )


def test_the_rank_decides_and_the_loss_decides_between_equal_ranks() -> None:
    validations = [
        (3.0, 0.5, True),
        (3.0, 0.4, True),
        (4.0, 0.1, False),
        (2.0, 0.9, True),
        (2.0, 0.9, False),
        (2.5, 0.2, False),
        (2.0, 0.8, True),
        (9.0, 0.0, False),
    ]
    progress = Progress()
    for progress.step, (rank, loss, better) in enumerate(validations):
        assert progress.record_validation(rank, loss) == better
    assert (progress.best_step, progress.best_rank, progress.best_loss) == (6, 2.0, 0.8)
    assert progress.validations_since_best == 1


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
            hook: Any = embeddings.register_hook
            hook(lambda gradient: gradient + value)
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


def test_divergence_names_its_step(tiny_bert: Path, tmp_path: Path) -> None:
    """A learning rate of 1e30 ruins the weights in step 1, and the next step notices it."""
    settings = make_settings(learning_rate=1e30, validate_every=100)
    with pytest.raises(RunError, match=r"step 2\b.*--learning-rate"):
        train(load(tiny_bert), toy_papers(30), toy_papers(6, 40), settings, tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.25])
def test_start_share_averages_the_best_weights_with_the_start(
    lively_bert: Path, tmp_path: Path, share: float
) -> None:
    """Weight by weight: share x start + (1 - share) x best validation's."""
    encoder = load(lively_bert)
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
    assert any(message.startswith(f"{newest}: ") for message in caplog.messages)
    content = bytearray(older.read_bytes())
    content[-3] ^= 16  # one bit of one weight
    older.write_bytes(content)
    caplog.clear()
    interrupt_at(
        6, tiny_bert, tmp_path, monkeypatch, make_settings(checkpoint_every=5, keep_checkpoints=1)
    )
    assert "resumed from step 0" in caplog.messages
    assert any(message.startswith(f"{older}: ") for message in caplog.messages)
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
        f"dropped 3 training papers that are in {eval_file} (1 by abstract, 1 by id, 1 by title)"
        in caplog.messages
    )

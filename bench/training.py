"""Speed of a training step, compared with the trainer of sentence-transformers (bf16 and float32)
and the torch backend of disentangled-flash, on the same summaries with the same batch size.

Ours is the step of `train_embedding_model`: batches of random papers, tokenizing, loss over all
in-batch negatives, AdamW, gradient norm. Theirs is the trainer with MultipleNegativesRankingLoss
and fused AdamW, timed between the ends of its steps.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sentence_transformers
import torch
from common import MINILM, deberta_folder, gemm_peak, linear_operations, our_encoder, row, texts
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from transformers import TrainerCallback

from semcse.distributed import SINGLE_PROCESS
from semcse.model_folder import find_model
from semcse.papers import Paper
from settings import Settings, complete
from train_embedding_model import Trainer

SHORTEST, LONGEST = 20, 60  # tokens of a summary


class _Ends(TrainerCallback):
    """Records when each step of the peer's trainer ended."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.times.append(time.perf_counter())


def ours(
    folder: str | Path, papers: list[Paper], batch: int, scratch: Path, texts_at_once: int = 0
) -> tuple[Callable[[int], list[float]], int]:
    """Return a function that does a number of steps and returns the seconds of each, and how many
    operations a step needs per real token.
    """
    settings = complete(
        Settings(
            metric="cosine",
            loss="infonce",
            pooling="mean",
            batch_size=batch,
            precision="auto",
            texts_at_once=texts_at_once,
        )
    )
    trainer = Trainer(our_encoder(folder), papers, papers[:4], settings, scratch, SINGLE_PROCESS)

    def steps(count: int) -> list[float]:
        found = []
        for _ in range(count):
            started = time.perf_counter()
            trainer.train_step()
            found.append(time.perf_counter() - started)
        return found

    return steps, 3 * linear_operations(trainer.encoder.model)


def theirs(
    folder: str | Path,
    papers: list[Paper],
    batch: int,
    bf16: bool,
    scratch: Path,
    change: Callable[[Any], Any] | None = None,
) -> Callable[[int], list[float]]:
    """Return such a function for the trainer of sentence-transformers. `change` may replace parts
    of the transformers model.
    """
    transformer = Transformer(str(folder))
    model = SentenceTransformer(
        modules=[transformer, Pooling(transformer.get_embedding_dimension(), "mean")], device="cpu"
    )
    if change:
        change(transformer.auto_model)
    data = Dataset.from_dict(
        {"anchor": [p.summaries[0] for p in papers], "positive": [p.summaries[1] for p in papers]}
    )
    loss = MultipleNegativesRankingLoss(model)

    def steps(count: int) -> list[float]:
        ends = _Ends()
        arguments = SentenceTransformerTrainingArguments(
            output_dir=str(scratch),
            per_device_train_batch_size=batch,
            max_steps=count + 1,
            bf16=bf16,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_strategy="no",
        )
        SentenceTransformerTrainer(
            model=model, args=arguments, train_dataset=data, loss=loss, callbacks=[ends]
        ).train()
        return [after - before for before, after in zip(ends.times, ends.times[1:], strict=False)]

    return steps


def agreement(folder: str | Path) -> str:
    """Describe the relative difference of loss and gradients between our forward pass and that of
    transformers, on one batch in float32 without dropout.
    """
    encoder = our_encoder(folder)
    encoder.model.eval()
    ids = encoder.tokenize(texts(16, SHORTEST, LONGEST, 5), 128)
    found = []
    for forward in (encoder.forward, encoder.forward_padded):
        encoder.model.zero_grad()
        one, other = torch.split(forward(ids), 8)
        loss = torch.cdist(one, other).exp().mean().log()
        loss.backward()  # type: ignore[no-untyped-call]
        found.append(
            (
                loss.item(),
                [p.grad.clone() for p in encoder.model.parameters() if p.grad is not None],
            )
        )
    (our_loss, ours_), (plain_loss, plain) = found
    size = torch.stack([g.norm() for g in plain]).norm()
    worst = max(float((a - b).norm() / size) for a, b in zip(ours_, plain, strict=True))
    return (
        f"float32 loss within {abs(our_loss - plain_loss) / abs(plain_loss):.0e},"
        f" gradients within {worst:.0e} of"
        " the whole gradient"
    )


def random_papers(count: int) -> list[Paper]:
    """Return papers with two random summaries each."""
    summaries = texts(2 * count, SHORTEST, LONGEST)
    return [Paper(str(i), summaries=tuple(summaries[2 * i : 2 * i + 2])) for i in range(count)]


def cached(
    folder: str | Path, batch: int, parts: tuple[int, ...], steps: int, rounds: int
) -> list[dict[str, Any]]:
    """Return the rows that compare gradient caching in 2 or more `parts` with one pass. All of them
    are ours, each on a separate copy of the model.
    """
    papers = random_papers(8 * batch)
    with tempfile.TemporaryDirectory() as scratch:
        runs = {
            number: ours(
                folder, papers, batch, Path(scratch), 2 * batch // number if number > 1 else 0
            )[0]
            for number in (*parts, 1)
        }
        best = dict.fromkeys(runs, float("inf"))
        for _ in range(rounds):
            for number, run_steps in runs.items():
                best[number] = min(best[number], *run_steps(steps + 1)[1:])
    return [
        row(
            f"train_cached_in_{number}_vs_one_pass",
            "one pass",
            "this commit",
            best[number],
            best[1],
            0.71,
            batch=batch,
            unit=(
                f"seconds a step of {batch} pairs, MiniLM, activations of {2 * batch // number} of"
                f" {2 * batch} texts at once"
            ),
        )
        for number in parts
    ]


def measure(
    name: str,
    folder: str | Path,
    batch: int,
    steps: int,
    rounds: int,
    peers: dict[str, tuple[bool, Any, float]],
) -> list[dict[str, Any]]:
    """Return the rows of one model. `peers` holds operation -> (bf16, change, goal)."""
    papers = random_papers(8 * batch)
    with tempfile.TemporaryDirectory() as scratch:
        mine, operations = ours(folder, papers, batch, Path(scratch))
        runs = {
            operation: theirs(folder, papers, batch, bf16, Path(scratch), change)
            for operation, (bf16, change, _) in peers.items()
        }
        best = dict.fromkeys(["ours", *runs], float("inf"))
        mine(1)
        for _ in range(rounds):
            for key, run in {"ours": mine, **runs}.items():
                best[key] = min(best[key], *run(steps))
    tokens = 2 * batch * (SHORTEST + LONGEST) / 2
    share = operations * tokens / best["ours"] / gemm_peak(torch.bfloat16)
    equal = agreement(folder)
    version = f"sentence-transformers {sentence_transformers.__version__}"
    return [
        row(
            operation,
            f"{version}, {'bf16' if bf16 else 'float32'}"
            + (", disentangled-flash torch backend" if change else ""),
            version,
            best["ours"],
            best[operation],
            goal,
            share_of_gemm_peak=round(share, 3),
            agreement=equal,
            batch=batch,
            unit=f"seconds a step of {batch} pairs, {name}",
        )
        for operation, (bf16, change, goal) in peers.items()
    ]


def run(quick: bool) -> list[dict[str, Any]]:
    """Measure all rows of this part."""
    from disentangled_flash import optimize_deberta_training  # type: ignore[import-not-found]

    logging.disable(logging.WARNING)

    def flash(model: Any) -> None:
        optimize_deberta_training(model, backend="torch")

    found = measure(
        "MiniLM",
        str(find_model(MINILM)),
        32,
        2 if quick else 6,
        2 if quick else 3,
        {"train_minilm_vs_st_bf16": (True, None, 1.5), "train_minilm_vs_st": (False, None, 2.0)},
    )
    found += cached(str(find_model(MINILM)), 64, (2, 4), 1 if quick else 3, 2 if quick else 3)
    with tempfile.TemporaryDirectory() as scratch:
        folder = deberta_folder(Path(scratch))
        peers = {
            "train_deberta_vs_st_bf16": (True, None, 1.8),
            "train_deberta_vs_disentangled_flash": (True, flash, 1.2),
            "train_deberta_vs_st": (False, None, 3.0),
        }
        found += measure(
            "DeBERTa-v3-base's shape", folder, 32, 1 if quick else 3, 1 if quick else 2, peers
        )
    return found

"""Contrastive training: pull two summaries of one abstract together, push summaries of other
abstracts away.

One step: a batch of papers, two different summaries of each (`load_data.batch_pairs`), pooled
vectors of both (`encoder.Encoder.forward`), the triplet hinge or InfoNCE over all in-batch
negatives (`similarity.contrastive_loss`), AdamW. Every `validate_every` steps the held-out papers'
partner summaries are ranked; the weights with the best mean rank are kept. Killed at any time, a
run continues from its last checkpoint with the same batches, dropout and results. Several processes
share the texts of a step (parallel.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from load_data import batch_pairs, steps_per_epoch
from semcse import checkpoints, errors
from semcse.command_line import StopSignal
from semcse.distances import distances, ranks
from semcse.distributed import ALONE, Group
from semcse.encoder import Encoder, uses_bf16
from semcse.errors import RunError
from semcse.files import Journal
from semcse.packed import parts, sparse_gradients
from semcse.papers import Paper
from semcse.types import Metric
from settings import Loss, Settings

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LossValues:
    """A batch's loss (scalar with gradient) and what the log shows of it (floats without)."""

    loss: Tensor
    positive_distance: float
    negative_distance: float
    # triplet: share of hinges above zero; InfoNCE: share of anchors whose positive is not the
    # nearest text
    active_share: float


def contrastive_loss(
    anchors: Tensor,
    positives: Tensor,
    metric: Metric,
    loss: Loss,
    margin: float,
    temperature: float,
) -> LossValues:
    """The batch's loss over all 2n texts, both texts of a pair as anchors. anchors, positives: (n,
    d), n >= 2.

    `margin` is in units of the metric's distance and used by "triplet"; `temperature` likewise and
    used by "infonce".
    """
    texts = torch.cat([anchors, positives])
    n = len(anchors)
    all_distances = distances(texts, texts, metric)
    rows = torch.arange(2 * n, device=texts.device)
    to_positive = all_distances[rows, (rows + n) % (2 * n)]
    is_negative = (rows[:, None] - rows[None, :]) % n != 0  # another paper's text
    if loss == "triplet":
        value, active = _triplet(all_distances, to_positive, is_negative, margin)
    else:
        value, active = _info_nce(all_distances, to_positive, is_negative, temperature)
    with torch.no_grad():
        return LossValues(
            value,
            to_positive.mean().item(),
            all_distances[is_negative].mean().item(),
            active.item(),
        )


def _triplet(
    all_distances: Tensor, to_positive: Tensor, is_negative: Tensor, margin: float
) -> tuple[Tensor, Tensor]:
    """max(0, d(a, p) - d(a, n) + margin), plain mean over every (anchor, in-batch negative), zeros
    included [METHOD: analogue].
    """
    hinges = functional.relu(to_positive[:, None] - all_distances + margin)[is_negative]
    return hinges.mean(), (hinges > 0).float().mean()


def _info_nce(
    all_distances: Tensor, to_positive: Tensor, is_negative: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """-log( exp(-d(a, p) / t) / (exp(-d(a, p) / t) + sum over negatives exp(-d(a, n) / t)) ), mean
    over the 2n anchors.

    With the cosine distance this is the usual InfoNCE on cosine similarity: the constant 1 in 1 -
    cos cancels.
    """
    logits = (-all_distances / temperature).masked_fill(~is_negative, -torch.inf)
    positive = -to_positive / temperature
    everything = torch.logsumexp(torch.cat([positive[:, None], logits], dim=1), dim=1)
    return (everything - positive).mean(), (logits.amax(dim=1) >= positive).float().mean()


def spread(vectors: Tensor) -> float:
    """Root mean squared distance to the mean vector over the root mean square length, in [0, 1]:
    near 0 means the embeddings have collapsed.
    """
    vectors = vectors.detach().float()
    centred = vectors - vectors.mean(dim=0)
    return (
        (
            centred.square().sum(dim=1).mean()
            / vectors.square().sum(dim=1).mean().clamp_min(torch.finfo(torch.float32).tiny)
        )
        .sqrt()
        .item()
    )


EMA = 0.98  # weight of the past in the smoothed loss


@dataclass
class Progress:
    """Where a run stands; stored in every checkpoint."""

    step: int = 0
    loss_ema: float | None = None
    best_step: int = 0
    best_rank: float = math.inf  # validation: mean rank of the partner summary
    best_loss: float = math.inf  # validation loss, which decides between equal ranks
    validations_since_best: int = 0


def train(
    encoder: Encoder,
    papers: list[Paper],
    held_out: list[Paper],
    settings: Settings,
    folder: Path,
    group: Group = ALONE,
) -> Progress:
    """Train `encoder` in place; afterwards it holds the weights of the best validation (averaged
    with the starting ones, if `start_share` says so).

    Args:
        encoder: the model to train, used as its `usage` says.
        papers: to draw pairs from, each with at least two summaries.
        held_out: for validation.
        settings: see settings.py; `complete`.
        folder: the run folder; gets metrics.jsonl and checkpoints/, and an unfinished run in it is
            continued.
        group: the processes that train together, each of which calls this. Only the first one's
            folder is used, and only its encoder is the result.

    Raises:
        RunError: the loss is not finite, memory is short, or another process has ended; checkpoints
            so far are kept.
        KeyboardInterrupt, files.Terminated: after a checkpoint of the last whole step was written.
    """
    trainer = _Trainer(encoder, papers, held_out, settings, folder, group)
    with StopSignal(patient=group.size > 1) as stop, trainer.continued():
        trainer.run(stop)
        if stop.received is not None and trainer.progress.step:
            trainer.save()
        group.leave()
        if stop.received is not None:
            log.info("stopped at step %d; --resume continues there", trainer.progress.step)
            stop.raise_received()
    if group.rank == 0:
        trainer.use_best()
    return trainer.progress


class _Trainer:
    """The model, its optimizer and the run's progress."""

    def __init__(
        self,
        encoder: Encoder,
        papers: list[Paper],
        held_out: list[Paper],
        settings: Settings,
        folder: Path,
        group: Group,
    ) -> None:
        self.encoder, self.papers, self.settings, self.group = encoder, papers, settings, group
        self.checkpoints, self.journal = folder / "checkpoints", folder / "metrics.jsonl"
        self.metrics: Any = []  # of the first process: its Journal
        self.progress = Progress()
        self.best: dict[str, Tensor] = {}  # weights of the best validation, on the CPU
        draw = np.random.default_rng([settings.seed, len(held_out)])
        pairs = [draw.choice(len(paper.summaries), size=2, replace=False) for paper in held_out]
        self.validation = [
            [paper.summaries[pair[side]] for paper, pair in zip(held_out, pairs, strict=True)]
            for side in (0, 1)
        ]
        self.named = dict(encoder.model.named_parameters())
        self.start = (
            {name: value.detach().cpu().clone() for name, value in self.named.items()}
            if settings.start_share
            else {}
        )
        self.optimizer = torch.optim.AdamW(
            self.named.values(),
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        self.max_length = min(settings.train_max_length, encoder.usage.max_length)
        self.bf16 = uses_bf16(settings.precision, encoder.device)
        torch.manual_seed(settings.seed + group.rank)  # each process has its own dropout
        epoch = steps_per_epoch(papers, settings.batch_size)
        log.info(
            "training on %s in %s, %d steps an epoch",
            encoder.device,
            "bf16 autocast" if self.bf16 else "float32",
            epoch,
        )

    def run(self, stop: StopSignal) -> None:
        """Steps until max_steps, the end of patience, or a stop signal."""
        settings = self.settings
        meter = _Meter()
        if self.progress.step == 0:
            self._validate()
        bar = tqdm(
            total=settings.max_steps,
            initial=self.progress.step,
            desc="training",
            unit="step",
            disable=self.group.rank > 0,
        )
        with logging_redirect_tqdm(), bar:
            while self._goes_on(stop):
                with errors.memory_named(
                    "--texts-at-once (0 is all), --batch-size or --train-max-length"
                ):
                    values, row = self._step(meter)
                bar.update()
                bar.set_postfix(
                    loss=f"{self.progress.loss_ema:.4f}",
                    rank=f"{self.progress.best_rank:.3f}",
                    refresh=False,
                )
                last = self.progress.step == settings.max_steps
                if last or self.progress.step % settings.log_every == 0:
                    self.metrics.append(self._row(values, row) | meter.read())
                if last or self.progress.step % settings.validate_every == 0:
                    with meter.paused():
                        self._validate()
                if last or self.progress.step % settings.checkpoint_every == 0:
                    with meter.paused():
                        self.save()
        if self.progress.validations_since_best >= settings.patience:
            log.info(
                "stopped early at step %d: %d validations without a better one",
                self.progress.step,
                settings.patience,
            )

    def _goes_on(self, stop: StopSignal) -> bool:
        """Whether another step follows, as all processes agree: where the first one stands, and
        whether any was told to stop.
        """
        states = self.group.each((stop.received or 0, self.progress))
        stop.received, self.progress = max(signum for signum, _ in states) or None, states[0][1]
        return (
            stop.received is None
            and self.progress.step < self.settings.max_steps
            and self.progress.validations_since_best < self.settings.patience
        )

    def _step(self, meter: _Meter) -> tuple[LossValues, dict[str, float]]:
        """One optimizer step on the pairs of step number `progress.step`."""
        settings, progress = self.settings, self.progress
        pairs = batch_pairs(
            self.papers, settings.seed, progress.step, settings.batch_size, settings.joined_share
        )
        ids = self.encoder.tokenize(
            [anchor for anchor, _ in pairs] + [positive for _, positive in pairs], self.max_length
        )
        self.encoder.model.train()
        values, vectors = self._backward(self.group.own(ids), len(ids))
        self.group.sum_gradients(self.named.values())
        norm = torch.nn.utils.clip_grad_norm_(
            self.named.values(), settings.clip_norm or math.inf
        ).item()
        loss = values.loss.item()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise RunError(
                f"step {progress.step + 1}: loss {loss}, gradient norm {norm}, not finite",
                "start again in another --output-dir with a lower --learning-rate or --precision"
                f" float32; checkpoints so far are in {self.checkpoints}",
            )
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(settings, progress.step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        progress.step += 1
        progress.loss_ema = (
            loss if progress.loss_ema is None else EMA * progress.loss_ema + (1 - EMA) * loss
        )
        meter.count(len(pairs), sum(map(len, ids)))
        return values, {"grad_norm": norm, "spread": spread(vectors)}

    def _backward(self, ids: Sequence[list[int]], total: int) -> tuple[LossValues, Tensor]:
        """The loss over all `total` texts of the batch, of which this process embeds `ids`, its
        gradients in the parameters, and all vectors.

        With `texts_at_once` by gradient caching (Gao et al. 2021): of all parts but the first,
        vectors without activations; the loss's gradient by vector; and part by part these vectors
        again, now with activations, to carry that gradient on to the parameters. The second time
        starts from the same random state, so that each text meets the same dropout. Parts are of
        like length, which packs best; the first, whose activations are kept, is the longest.
        """
        places, device = parts(ids, self.settings.texts_at_once), self.encoder.device
        texts = [[ids[i] for i in part] for part in places]
        # brings each weight to bf16 once, here with gradient for the first part
        with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
            first, state = self.encoder.forward(texts[0]).float(), random_state(device)
            with torch.no_grad():
                others = [self.encoder.forward(part).float() for part in texts[1:]]
        order = torch.tensor([i for part in places for i in part], device=device)
        own = torch.cat([first, *(other.requires_grad_() for other in others)])[order.argsort()]
        vectors = self.group.gather(own, total)
        values = self._loss(vectors[: total // 2], vectors[total // 2 :])
        values.loss.backward()  # type: ignore[no-untyped-call]
        if others:
            set_random_state(device, state)
        with (
            torch.autocast(device.type, torch.bfloat16, enabled=self.bf16),
            sparse_gradients(self.encoder.model),
        ):
            for part, other in zip(texts[1:], others, strict=True):
                self.encoder.forward(part).float().backward(other.grad)  # type: ignore[no-untyped-call]
        return values, vectors

    def _loss(self, anchors: Tensor, positives: Tensor) -> LossValues:
        s = self.settings
        assert s.margin is not None
        assert s.temperature is not None
        return contrastive_loss(anchors, positives, s.metric, s.loss, s.margin, s.temperature)

    def _row(self, values: LossValues, more: dict[str, float]) -> dict[str, Any]:
        """One row of metrics.jsonl, without the rates."""
        return {
            "step": self.progress.step,
            "loss": values.loss.item(),
            "loss_ema": self.progress.loss_ema,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "positive_distance": values.positive_distance,
            "negative_distance": values.negative_distance,
            "active_share": values.active_share,
            **more,
        }

    def _validate(self) -> None:
        """Rank each held-out paper's partner summary among the others', in both directions; keep
        the weights if that is the best so far.
        """
        if self.group.rank:
            return
        progress = self.progress
        try:
            anchors, partners = (self.encoder.embed(texts).vectors for texts in self.validation)
        except RunError as error:
            if error.what.startswith("out of memory"):
                raise
            raise RunError(
                f"step {progress.step}: {error.what}",
                "start again in another --output-dir with a lower --learning-rate; checkpoints so"
                f" far are in {self.checkpoints}",
            ) from None
        both = torch.cat(
            [
                ranks(anchors, partners, self.settings.metric),
                ranks(partners, anchors, self.settings.metric),
            ]
        )
        rank, loss = both.mean().item(), self._loss(anchors, partners).loss.item()
        better = (rank, loss) < (progress.best_rank, progress.best_loss)
        if better:
            progress.best_step, progress.best_rank, progress.best_loss = progress.step, rank, loss
            self.best = {
                name: value.detach().to("cpu", copy=True) for name, value in self.named.items()
            }
        progress.validations_since_best = 0 if better else progress.validations_since_best + 1
        self.metrics.append(
            {
                "step": progress.step,
                "validation_rank": rank,
                "validation_loss": loss,
                "validation_pool": len(anchors),
                "best": better,
            }
        )
        log.info(
            "step %d: validation mean rank %.3f of %d, loss %.4f%s",
            progress.step,
            rank,
            len(anchors),
            loss,
            " (best)" if better else "",
        )

    def save(self) -> None:
        """Write a checkpoint of the whole state: weights, optimizer, random state of each process,
        best weights so far, progress.
        """
        states = self.group.each(random_state(self.encoder.device))
        if self.group.rank:
            return
        tensors = {f"model/{name}": value for name, value in self.named.items()} | {
            f"best/{name}": value for name, value in self.best.items()
        }
        for number, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{number}/{key}": value for key, value in state.items()}
        tensors |= {
            f"random/{kind}/{rank}": state
            for rank, pair in enumerate(states)
            for kind, state in pair.items()
        }
        self.metrics.sync()  # a checkpoint's rows are on the disk before it
        checkpoints.write(
            self.checkpoints,
            self.progress.step,
            tensors,
            dataclasses.asdict(self.progress),
            self.settings.keep_checkpoints,
        )

    @contextlib.contextmanager
    def continued(self) -> Iterator[None]:
        """Continue from the newest whole checkpoint, or from the start without one; the first
        process has the metrics journal open meanwhile.
        """
        begun = self.group.rank == 0 and self.journal.exists()
        found = self.group.each(
            checkpoints.newest(self.checkpoints) if begun else None, first_only=True
        )[0]
        if found:
            self._load(*found)
        done = self.progress.step
        if begun:
            log.info("resumed from step %d", done)
        if self.group.rank:
            yield
        else:
            with contextlib.closing(
                Journal(self.journal, keep=lambda row: 0 < done >= row["step"])
            ) as self.metrics:
                yield

    def _load(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        states: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith("optimizer/"):
                _, number, name = key.split("/")
                states.setdefault(int(number), {})[name] = value
        self.optimizer.load_state_dict(
            {"state": states, "param_groups": self.optimizer.state_dict()["param_groups"]}
        )
        self._load_weights({name: tensors[f"model/{name}"] for name in self.named})
        self.best = {name: tensors[f"best/{name}"] for name in self.named}
        kinds = random_state(self.encoder.device)
        set_random_state(
            self.encoder.device,
            {kind: tensors[f"random/{kind}/{self.group.rank}"] for kind in kinds},
        )
        self.progress = Progress(**state)

    def use_best(self) -> None:
        """Put the best validation's weights into the model, averaged with those it started from as
        `start_share` says.
        """
        share = self.settings.start_share
        self._load_weights(
            {
                name: torch.lerp(value, self.start[name], share) if share else value
                for name, value in self.best.items()
            }
        )
        log.info(
            "best validation at step %d (0: the encoder that training began with): mean rank %.3f",
            self.progress.best_step,
            self.progress.best_rank,
        )

    def _load_weights(self, weights: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.named.items():
                parameter.copy_(weights[name])


class _Meter:
    """Rates since the last reading."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self.started, self.pairs, self.tokens = time.perf_counter(), 0, 0

    def count(self, pairs: int, tokens: int) -> None:
        self.pairs += pairs
        self.tokens += tokens

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time in the block does not count."""
        before = time.perf_counter()
        yield
        self.started += time.perf_counter() - before

    def read(self) -> dict[str, float]:
        seconds = time.perf_counter() - self.started
        row = {
            "pairs_per_second": round(self.pairs / seconds, 2),
            "tokens_per_second": round(self.tokens / seconds, 1),
            "peak_memory_mib": peak_memory_mib(),
        }
        self._reset()
        return row


def random_state(device: torch.device) -> dict[str, Tensor]:
    """Torch's random state on the CPU, and on `device` if it is a GPU."""
    return {"cpu": torch.get_rng_state()} | (
        {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}
    )


def set_random_state(device: torch.device, state: dict[str, Tensor]) -> None:
    """Put back what `random_state` gave."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


def peak_memory_mib() -> float:
    """Most memory this process has held: of the GPU where one is in use, else of the machine."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return round(torch.cuda.max_memory_allocated() / 2**20, 1)
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is bytes there, KiB on Linux
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20, 1)


def learning_rate(settings: Settings, step: int) -> float:
    """Learning rate of step number `step` (from 0): linear warm-up over `warmup_steps`, then
    constant, or falling linearly to 0 at `max_steps`.
    """
    fall = 1 - step / settings.max_steps if settings.decay else 1.0
    return settings.learning_rate * min(1.0, (step + 1) / max(1, settings.warmup_steps)) * fall

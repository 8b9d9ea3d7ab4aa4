"""Contrastive training: pull two summaries of one abstract together, and push others away.

One training step does this:

1. `load_data.batch_pairs` draws n papers and two different summaries of each: the anchor and the
   positive. All summaries of the other papers in the batch are in-batch negatives.
2. The encoder embeds each of the 2n texts separately.
3. `contrastive_loss` compares the distances to positives and to negatives.
4. AdamW updates the encoder.

Every `validate_every` steps, each held-out summary ranks the partner summaries of all held-out
papers; the weights with the best mean rank are kept. A run can be stopped at any time. It continues
from its last checkpoint with the same batches, the same dropout and the same result. Several
processes can share the texts of each step (semcse/distributed.py).
"""

import contextlib
import dataclasses
import logging
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from load_data import batch_pairs, draw_pair, steps_per_epoch
from semcse import checkpoints
from semcse.command_line import StopSignal
from semcse.distances import distances, ranks
from semcse.distributed import SINGLE_PROCESS, ProcessGroup
from semcse.encoder import Encoder, uses_bf16
from semcse.errors import RunError, memory_named
from semcse.files import Journal
from semcse.packed import split_by_tokens, use_fast_dropout
from semcse.papers import Paper
from semcse.types import Metric
from settings import Loss, Settings

log = logging.getLogger(__name__)

EMA_DECAY = 0.98  # weight of the past in the smoothed loss that the progress bar shows


# The losses


def triplet_loss(to_positive: Tensor, to_negatives: Tensor, margin: float) -> Tensor:
    """Compute the triplet hinge loss over all in-batch negatives.

    For an anchor a, its positive p and a negative n, the loss is

        max(0, d(a, p) - d(a, n) + margin)

    and the result is its plain mean over all anchors and negatives, zeros included. The triplet
    loss is the authors' (README, main.py); the choice of all in-batch negatives follows other
    published code of the same group.

    Args:
        to_positive: (m,) distance of each anchor to its positive.
        to_negatives: (m, k) distances of each anchor to its k negatives.
        margin: Smallest difference without loss, in units of the distance.
    """
    return functional.relu(to_positive[:, None] - to_negatives + margin).mean()


def info_nce_loss(to_positive: Tensor, to_negatives: Tensor, temperature: float) -> Tensor:
    """Compute the InfoNCE loss (van den Oord et al. 2018) with in-batch negatives.

    For an anchor a, its positive p and negatives n, the loss is

        -log( exp(-d(a, p) / t) / (exp(-d(a, p) / t) + sum over n of exp(-d(a, n) / t)) )

    and the result is its mean over all anchors. With the cosine distance 1 - cos this is the usual
    InfoNCE on cosine similarities, because the constant 1 cancels. The arguments are those of
    `triplet_loss`, with the temperature t in units of the distance.
    """
    logits = torch.cat([to_positive[:, None], to_negatives], dim=1) / -temperature
    positive_column = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
    return functional.cross_entropy(logits, positive_column)


@dataclass(frozen=True)
class BatchLoss:
    """The loss of one batch (a scalar tensor with gradient) and figures for the log."""

    loss: Tensor
    positive_distance: float  # mean over the anchors
    negative_distance: float  # mean over the anchors and negatives
    # triplet: share of hinges above zero; InfoNCE: share of anchors with a negative at least as
    # close as the positive
    active_share: float


def contrastive_loss(
    anchors: Tensor,
    positives: Tensor,
    metric: Metric,
    loss: Loss,
    margin: float,
    temperature: float,
) -> BatchLoss:
    """Compute the loss of a batch of n pairs. Both texts of a pair serve as anchors.

    Each of the 2n texts is an anchor once: its positive is the other text of its pair, and its
    negatives are the 2n - 2 texts of the other pairs.

    Args:
        anchors: (n, d) vectors, n >= 2.
        positives: (n, d) vectors; row i belongs to the same paper as row i of `anchors`.
        metric: "euclidean" or "cosine".
        loss: "triplet", which uses `margin`, or "infonce", which uses `temperature`.
    """
    n = len(anchors)
    texts = torch.cat([anchors, positives])
    all_distances = distances(texts, texts, metric)  # (2n, 2n)
    row = torch.arange(2 * n, device=texts.device)
    to_positive = all_distances[row, (row + n) % (2 * n)]  # (2n,)
    is_negative = (row[:, None] - row[None, :]) % n != 0  # texts of other papers
    to_negatives = all_distances[is_negative].view(2 * n, 2 * n - 2)
    if loss == "triplet":
        value = triplet_loss(to_positive, to_negatives, margin)
        active = to_positive[:, None] - to_negatives + margin > 0
    else:
        value = info_nce_loss(to_positive, to_negatives, temperature)
        active = to_negatives.amin(dim=1) <= to_positive
    figures = to_positive.mean(), to_negatives.mean(), active.float().mean()
    return BatchLoss(value, *(figure.item() for figure in figures))


def relative_std(vectors: Tensor) -> float:
    """Measure whether embeddings have collapsed to one point.

    Returns:
        Root mean squared distance of the (n, d) vectors to their mean, divided by their root mean
        squared length: in [0, 1], near 0 for a collapsed encoder.
    """
    vectors = vectors.detach().float()
    variance = (vectors - vectors.mean(dim=0)).square().sum(dim=1).mean()
    squared_length = vectors.square().sum(dim=1).mean()
    return (variance / squared_length.clamp_min(torch.finfo(torch.float32).tiny)).sqrt().item()


# The training loop


@dataclass
class Progress:
    """The progress of a run, which is part of every checkpoint."""

    step: int = 0
    loss_ema: float | None = None  # exponential moving average of the training loss
    best_step: int = 0
    best_rank: float = math.inf  # best mean rank in validation
    best_loss: float = math.inf  # validation loss at that step
    validations_since_best: int = 0

    def record_validation(self, rank: float, loss: float) -> bool:
        """Record a validation, and return whether it is the best so far.

        The lower mean rank is better; between equal ranks the lower loss decides.
        """
        better = (rank, loss) < (self.best_rank, self.best_loss)
        if better:
            self.best_step, self.best_rank, self.best_loss = self.step, rank, loss
        self.validations_since_best = 0 if better else self.validations_since_best + 1
        return better


def train(
    encoder: Encoder,
    papers: list[Paper],
    held_out: list[Paper],
    settings: Settings,
    folder: Path,
    group: ProcessGroup = SINGLE_PROCESS,
) -> Progress:
    """Train `encoder` in place. At the end it holds the weights of the best validation.

    Args:
        encoder: The model to train, used as its `usage` says.
        papers: Training papers, with at least two summaries each.
        held_out: Validation papers, also with at least two summaries each.
        settings: Complete settings (see `settings.complete`).
        folder: The run folder, for metrics.jsonl and checkpoints/. An unfinished run in it is
            continued.
        group: The processes that train together; each of them calls this function. Only rank 0
            writes to its folder, and only the encoder of rank 0 is the result.

    Raises:
        RunError: The loss is not finite, memory runs out, or another process has ended. Like
            KeyboardInterrupt and Terminated, it leaves checkpoints to continue from.
    """
    trainer = Trainer(encoder, papers, held_out, settings, folder, group)
    with StopSignal(patient=group.size > 1) as stop, trainer.resume():
        trainer.run(stop)
        if stop.received is not None and trainer.progress.step:
            trainer.save_checkpoint()
        group.leave()
        if stop.received is not None:
            log.info("stopped at step %d; --resume continues there", trainer.progress.step)
            stop.raise_received()
    if group.rank == 0:
        trainer.use_best_weights()
    return trainer.progress


class Trainer:
    """An encoder in training with its optimizer, its progress and the best weights so far."""

    def __init__(
        self,
        encoder: Encoder,
        papers: list[Paper],
        held_out: list[Paper],
        settings: Settings,
        folder: Path,
        group: ProcessGroup,
    ) -> None:
        self.encoder, self.papers, self.settings, self.group = encoder, papers, settings, group
        self.checkpoints, self.journal = folder / "checkpoints", folder / "metrics.jsonl"
        self.metrics: Any = []  # the open journal of rank 0
        self.progress = Progress()
        draw = np.random.default_rng([settings.seed, len(held_out)])
        self.validation = [draw_pair(paper.summaries, draw) for paper in held_out]
        self.parameters = dict(encoder.model.named_parameters())
        self.start_weights = self._copy_weights() if settings.start_share else {}
        self.best_weights: dict[str, Tensor] = {}  # weights of the best validation, on the CPU
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), weight_decay=settings.weight_decay, fused=True
        )
        names = ("metric", "loss", "margin", "temperature")
        options: dict[str, Any] = {name: getattr(settings, name) for name in names}
        self.loss: Callable[..., BatchLoss] = partial(contrastive_loss, **options)
        self.max_length = min(settings.train_max_length, encoder.usage.max_length)
        self.bf16 = uses_bf16(settings.precision, encoder.device)
        use_fast_dropout(encoder.model)
        torch.manual_seed(settings.seed + group.rank)  # dropout differs between processes
        arithmetic = "bf16 autocast" if self.bf16 else "float32"
        epoch = steps_per_epoch(papers, settings.batch_size)
        log.info("training on %s in %s, %d steps an epoch", encoder.device, arithmetic, epoch)

    def run(self, stop: StopSignal) -> None:
        """Train until max_steps, until patience runs out, or until a signal arrives."""
        settings, done = self.settings, self.progress.step
        if done == 0:
            self.validate()
        options: Any = {"desc": "training", "unit": "step", "disable": self.group.rank > 0}
        bar = tqdm(total=settings.max_steps, initial=done, **options)
        with logging_redirect_tqdm(), bar:
            while self._continues(stop):
                row = self.train_step()
                loss, rank = self.progress.loss_ema, self.progress.best_rank
                bar.set_postfix(loss=f"{loss:.4f}", rank=f"{rank:.3f}", refresh=False)
                bar.update()
                if self._is_due(settings.log_every):
                    self.metrics.append(row | {"peak_memory_mib": peak_memory_mib()})
                if self._is_due(settings.validate_every):
                    self.validate()
                if self._is_due(settings.checkpoint_every):
                    self.save_checkpoint()
        if self.progress.validations_since_best >= settings.patience:
            text = "stopped early at step %d: %d validations without a better result"
            log.info(text, self.progress.step, settings.patience)

    def _continues(self, stop: StopSignal) -> bool:
        """Decide together with the other processes whether another step follows.

        All of them stop if one has received a signal, and take over the progress of rank 0.
        """
        states = self.group.all_gather_object((stop.received or 0, self.progress))
        stop.received = max(signal for signal, _ in states) or None
        self.progress = states[0][1]
        return (
            stop.received is None
            and self.progress.step < self.settings.max_steps
            and self.progress.validations_since_best < self.settings.patience
        )

    def _is_due(self, interval: int) -> bool:
        """Return whether the step is a multiple of `interval`, or the last one."""
        step = self.progress.step
        return step % interval == 0 or step == self.settings.max_steps

    def train_step(self) -> dict[str, Any]:
        """Do one optimizer step and return its row for metrics.jsonl."""
        settings, progress, started = self.settings, self.progress, time.perf_counter()
        pairs = batch_pairs(
            self.papers, settings.seed, progress.step, settings.batch_size, settings.joined_share
        )
        texts = [anchor for anchor, _ in pairs] + [positive for _, positive in pairs]
        token_ids = self.encoder.tokenize(texts, self.max_length)
        self.encoder.model.train()
        with memory_named("--texts-at-once (0 is all), --batch-size or --train-max-length"):
            batch_loss, vectors = self.backward(token_ids)
        gradient_norm = torch.nn.utils.clip_grad_norm_(
            self.parameters.values(), settings.clip_norm or math.inf
        ).item()
        loss = batch_loss.loss.item()
        if not (math.isfinite(loss) and math.isfinite(gradient_norm)):
            what = f"loss {loss} or gradient norm {gradient_norm} is not finite"
            fix = "start again in another --output-dir, with a lower --learning-rate or with"
            fix += f" --precision float32; the checkpoints so far are in {self.checkpoints}"
            raise RunError(f"step {progress.step + 1}: {what}", fix)
        rate = learning_rate(settings, progress.step)
        for parameter_group in self.optimizer.param_groups:
            parameter_group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        progress.step += 1
        past = loss if progress.loss_ema is None else progress.loss_ema
        progress.loss_ema = EMA_DECAY * past + (1 - EMA_DECAY) * loss
        seconds = time.perf_counter() - started
        return {
            "step": progress.step,
            **vars(batch_loss),
            "loss": loss,
            "loss_ema": progress.loss_ema,
            "learning_rate": rate,
            "grad_norm": gradient_norm,
            "relative_std": relative_std(vectors),
            "pairs_per_second": round(len(pairs) / seconds, 2),
            "tokens_per_second": round(sum(map(len, token_ids)) / seconds, 1),
        }

    def backward(self, token_ids: Sequence[list[int]]) -> tuple[BatchLoss, Tensor]:
        """Compute the loss of a batch and add its gradients to the parameters.

        If `texts_at_once` limits the activations in memory, this is gradient caching (Gao et al.
        2021). It gives the same gradients in three passes: embed all texts without activations;
        compute the gradient of the loss with respect to each vector; embed the texts again, part by
        part with activations, and continue the backward pass from those gradients. The second
        embedding restores the random state, so that each text meets the same dropout.

        Args:
            token_ids: Token ids of all 2n texts: n anchors, then their n positives.

        Returns:
            The loss, and the (2n, d) vectors of all texts.
        """
        device, total = self.encoder.device, len(token_ids)
        share = self.group.local_share(token_ids)  # the texts that this process embeds
        texts_at_once = self.settings.texts_at_once or len(share)
        parts = split_by_tokens(share, texts_at_once * max(map(len, share)))
        batches = [[share[i] for i in part] for part in parts]
        with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
            # The activations of the first part are kept: it needs no second embedding.
            first, state = self.encoder.forward(batches[0]).float(), random_state(device)
            with torch.no_grad():
                others = [self.encoder.forward(batch).float() for batch in batches[1:]]
        original = torch.tensor([i for part in parts for i in part], device=device).argsort()
        embedded = torch.cat([first, *(other.requires_grad_() for other in others)])[original]
        vectors = self.group.gather(embedded, total)  # (2n, d)
        batch_loss = self.loss(vectors[: total // 2], vectors[total // 2 :])
        batch_loss.loss.backward()  # type: ignore[no-untyped-call]
        if others:
            set_random_state(device, state)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
            for batch, other in zip(batches[1:], others, strict=True):
                again: Any = self.encoder.forward(batch).float()
                again.backward(other.grad)
        self.group.sum_gradients(self.parameters.values())
        return batch_loss, vectors

    def validate(self) -> None:
        """Compute the mean rank of partner summaries, and keep the weights if it is the best.

        Each held-out paper has two summaries, a and b. Every a ranks all b by distance, and every b
        ranks all a. The result is the mean rank of the partner. Only rank 0 validates.
        """
        if self.group.rank > 0:
            return
        metric = self.settings.metric
        sides = zip(*self.validation, strict=True)
        first, second = (self.encoder.embed(texts).vectors for texts in sides)
        both = torch.cat([ranks(first, second, metric), ranks(second, first, metric)])
        rank, loss = both.mean().item(), self.loss(first, second).loss.item()
        better = self.progress.record_validation(rank, loss)
        if better:
            self.best_weights = self._copy_weights()
        step = self.progress.step
        row = {"step": step, "validation_rank": rank, "validation_loss": loss}
        self.metrics.append(row | {"validation_pool": len(first), "best": better})
        text = "step %d: validation mean rank %.3f of %d, loss %.4f" + (" (best)" if better else "")
        log.info(text, step, rank, len(first), loss)

    def _copy_weights(self) -> dict[str, Tensor]:
        """Copy the current weights to the CPU."""
        return {name: p.detach().to("cpu", copy=True) for name, p in self.parameters.items()}

    def _load_weights(self, weights: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(weights[name])

    def use_best_weights(self) -> None:
        """Load the weights of the best validation, averaged with the starting weights.

        The share of the starting weights is `start_share`, 0 by default.
        """
        weights, share = self.best_weights, self.settings.start_share
        if share:
            start = self.start_weights
            weights = {name: w.lerp(start[name], share) for name, w in weights.items()}
        self._load_weights(weights)
        text = "best validation at step %d (0 is the start of training): mean rank %.3f"
        log.info(text, self.progress.best_step, self.progress.best_rank)

    # Checkpoints

    def save_checkpoint(self) -> None:
        """Write weights, optimizer state, random states, best weights and progress."""
        random_states = self.group.all_gather_object(random_state(self.encoder.device))
        if self.group.rank > 0:
            return
        tensors: dict[str, Tensor] = {
            f"model/{name}": value for name, value in self.parameters.items()
        }
        tensors |= {f"best/{name}": value for name, value in self.best_weights.items()}
        for number, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{number}/{key}": value for key, value in state.items()}
        for rank, states in enumerate(random_states):
            tensors |= {f"random/{kind}/{rank}": state for kind, state in states.items()}
        self.metrics.sync()  # the rows up to a checkpoint must be on disk before it
        step, progress = self.progress.step, dataclasses.asdict(self.progress)
        keep = self.settings.keep_checkpoints
        checkpoints.write(self.checkpoints, step, tensors, progress, keep)

    @contextlib.contextmanager
    def resume(self) -> Iterator[None]:
        """Load the newest intact checkpoint, if any, and keep the metrics journal open."""
        begun = self.group.rank == 0 and self.journal.exists()
        newest = checkpoints.newest(self.checkpoints) if begun else None
        newest = self.group.broadcast_object(newest)
        if newest:
            self._load_checkpoint(*newest)
        done = self.progress.step
        if begun:
            log.info("resumed from step %d", done)
        if self.group.rank > 0:
            yield
            return
        journal = Journal(self.journal, keep=lambda row: 0 < done >= row["step"])
        with contextlib.closing(journal) as self.metrics:
            yield

    def _load_checkpoint(self, tensors: dict[str, Tensor], progress: dict[str, Any]) -> None:
        optimizer_state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith("optimizer/"):
                _, number, name = key.split("/")
                optimizer_state.setdefault(int(number), {})[name] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": optimizer_state, "param_groups": groups})
        self._load_weights({name: tensors[f"model/{name}"] for name in self.parameters})
        self.best_weights = {name: tensors[f"best/{name}"] for name in self.parameters}
        device, rank = self.encoder.device, self.group.rank
        kinds = random_state(device)
        set_random_state(device, {kind: tensors[f"random/{kind}/{rank}"] for kind in kinds})
        self.progress = Progress(**progress)


def learning_rate(settings: Settings, step: int) -> float:
    """Return the learning rate of a step, counted from 0.

    It rises linearly during `warmup_steps`. Afterwards it is constant, or with `decay` falls
    linearly to 0 at `max_steps`.
    """
    rise = min(1.0, (step + 1) / max(1, settings.warmup_steps))
    fall = 1 - step / settings.max_steps if settings.decay else 1.0
    return settings.learning_rate * rise * fall


def random_state(device: torch.device) -> dict[str, Tensor]:
    """Return torch's random state on the CPU, and on `device` if that is a GPU."""
    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_random_state(device: torch.device, state: dict[str, Tensor]) -> None:
    """Restore what `random_state` returned."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


def peak_memory_mib() -> float:
    """Return the peak memory of this process: on the GPU if it uses one, else in main memory."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return round(torch.cuda.max_memory_allocated() / 2**20, 1)
    unit = 1 if sys.platform == "darwin" else 1024  # macOS reports bytes, Linux KiB
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20, 1)

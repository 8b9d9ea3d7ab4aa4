"""Gradient caching (`texts_at_once`): the training of one pass over the whole batch, in less
memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from toy_training import load, make_settings, rows_of, toy_papers, without_dropout

from semcse.encoder import Encoder
from train_embedding_model import train


def logged_numbers(
    encoder: Path, folder: Path, texts_at_once: int, dropout: bool = False
) -> list[float]:
    """Train for three steps on batches of 24 texts; return loss and gradient norm of each step."""
    model = load(encoder)
    if not dropout:
        without_dropout(model)
    settings = make_settings(
        batch_size=12, max_steps=3, validate_every=100, texts_at_once=texts_at_once
    )
    train(model, toy_papers(40), toy_papers(4, 50), settings, folder)
    return [row[key] for row in rows_of(folder)[0] for key in ("loss", "grad_norm")]


class Saved:
    """A tensor that waits for the backward pass. The class counts the bytes of all that wait,
    without the weights.
    """

    waiting = peak = 0

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.size = tensor, 0 if isinstance(tensor, nn.Parameter) else tensor.nbytes
        Saved.waiting += self.size
        Saved.peak = max(Saved.peak, Saved.waiting)

    def __del__(self) -> None:
        Saved.waiting -= self.size


@contextmanager
def activations_counted() -> Iterator[None]:
    """Afterwards, `Saved.peak` is the largest number of bytes that waited at once."""
    Saved.waiting = Saved.peak = 0
    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        yield


@pytest.mark.parametrize("texts_at_once, share", [(3, 0.3), (10, 0.65), (100, 1.0)])
def test_same_training_in_less_memory(
    lively_bert: Path, tmp_path: Path, texts_at_once: int, share: float
) -> None:
    with activations_counted():
        expected = logged_numbers(lively_bert, tmp_path / "whole", 0)
    whole = Saved.peak
    with activations_counted():
        found = logged_numbers(lively_bert, tmp_path / "cached", texts_at_once)
    assert found == pytest.approx(expected, rel=1e-4)
    assert Saved.peak <= share * whole


def test_both_passes_draw_the_same_dropout(
    lively_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every text but those of the first part is embedded twice in a step, with equal results."""
    calls: list[tuple[str, Tensor]] = []
    forward = Encoder.forward

    def recording(self: Encoder, ids: Sequence[Sequence[int]]) -> Tensor:
        vectors = forward(self, ids)
        if self.model.training:
            calls.append((str(ids), vectors.detach()))
        return vectors

    monkeypatch.setattr(Encoder, "forward", recording)
    logged_numbers(lively_bert, tmp_path, 5, dropout=True)
    parts = (len(calls) + 3) // 6  # in each of three steps: all parts, then all but the first again
    assert parts > 3
    for start in range(0, len(calls), 2 * parts - 1):
        step = calls[start : start + 2 * parts - 1]
        for (ids, vectors), (ids_again, vectors_again) in zip(
            step[1:parts], step[parts:], strict=True
        ):
            assert ids == ids_again
            assert torch.equal(vectors, vectors_again)

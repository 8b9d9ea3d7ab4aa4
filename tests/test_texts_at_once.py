"""Gradient caching: the loss, gradients and dropout of one pass over the whole batch, in the memory
of a part of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from test_training import assert_same_tensors, load, make_settings, toy_papers, without_dropout
from torch import Tensor, nn

from load_data import batch_pairs
from semcse.distributed import ALONE
from semcse.packed import parts
from train_embedding_model import _Trainer, contrastive_loss

BATCH = 12


def trainer_of(folder: Path, texts_at_once: int) -> tuple[_Trainer, list[list[int]]]:
    """A trainer before its first step, and the 2 x BATCH texts of that step, of unlike lengths."""
    trainer = _Trainer(
        load(folder),
        toy_papers(40),
        toy_papers(4, 50),
        make_settings(batch_size=BATCH, texts_at_once=texts_at_once),
        folder,
        ALONE,
    )
    trainer.encoder.model.train()
    pairs = batch_pairs(trainer.papers, 0, 0, BATCH)
    ids = trainer.encoder.tokenize(
        [anchor for anchor, _ in pairs] + [positive for _, positive in pairs], 32
    )
    assert len(set(map(len, ids))) > 2
    return trainer, ids


def gradients(trainer: _Trainer) -> dict[str, Tensor]:
    return {
        name: parameter.grad
        for name, parameter in trainer.named.items()
        if parameter.grad is not None
    }


def assert_equal(found: _Trainer, loss: Tensor, expected: _Trainer, expected_loss: Tensor) -> None:
    """Loss and gradients to 1e-5."""
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
    mine, other = gradients(found), gradients(expected)
    assert mine.keys() == other.keys()
    size = torch.stack([gradient.norm() for gradient in other.values()]).norm()
    assert size > 0
    assert max((mine[key] - other[key]).norm().item() for key in other) < 1e-5 * size


class Kept:
    """A tensor that waits for the backward pass; `live` and `most` count the bytes of all that
    wait, weights left out.
    """

    live = most = 0

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.size = tensor, 0 if isinstance(tensor, nn.Parameter) else tensor.nbytes
        Kept.live += self.size
        Kept.most = max(Kept.most, Kept.live)

    def __del__(self) -> None:
        Kept.live -= self.size


def backward_counted(trainer: _Trainer, ids: Sequence[list[int]]) -> tuple[Any, int]:
    """The loss of `_backward`, and the most bytes of activations that waited for their backward
    pass at once.
    """
    Kept.live = Kept.most = 0
    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        values, _ = trainer._backward(ids, len(ids))
    return values.loss.detach(), Kept.most


def test_loss_and_gradients_equal_one_pass_in_a_part_of_its_memory(lively_bert: Path) -> None:
    """Parts as large as 3, as 10 (the last one smaller) and as more texts than there are, without
    dropout.
    """
    whole, ids = trainer_of(lively_bert, 0)
    without_dropout(whole.encoder)
    loss, memory = backward_counted(whole, ids)
    shares = []
    for texts_at_once in (3, 10, 100):
        trainer, _ = trainer_of(lively_bert, texts_at_once)
        without_dropout(trainer.encoder)
        found, needed = backward_counted(trainer, ids)
        assert_equal(trainer, found, whole, loss)
        shares.append(needed / memory)
    assert shares[0] < 0.25  # 3 of 24 texts, the longest ones
    assert shares[1] < 0.65
    assert shares[2] == 1


@given(st.lists(st.integers(0, 60), min_size=1, max_size=40), st.integers(0, 45))
def test_parts_hold_every_text_once_and_no_more_tokens_than_the_longest_texts(
    lengths: list[int], most: int
) -> None:
    ids = [[7] * length for length in lengths]
    found = parts(ids, most)
    assert sorted(i for part in found for i in part) == list(range(len(ids)))
    assert [len(ids[i]) for part in found for i in part] == sorted(lengths, reverse=True)
    room = sum(sorted(lengths, reverse=True)[: most or None])
    tokens = [sum(lengths[i] for i in part) for part in found]
    assert max(tokens) <= room
    # none could have been longer
    assert all(
        before + lengths[part[0]] > room for before, part in zip(tokens, found[1:], strict=False)
    )
    if most == 0 or most >= len(ids):
        assert len(found) == 1


def test_both_passes_meet_the_same_dropout(lively_bert: Path) -> None:
    """With dropout: as if the parts were embedded one after the other with gradient, under one
    joint loss; the random state ends where it does there.
    """
    trainer, ids = trainer_of(lively_bert, 5)
    torch.manual_seed(7)
    values, vectors = trainer._backward(ids, len(ids))
    after = torch.get_rng_state()

    reference, _ = trainer_of(lively_bert, 0)
    torch.manual_seed(7)
    rows: dict[int, Tensor] = {}
    for part in parts(ids, 5):
        rows |= zip(part, reference.encoder.forward([ids[i] for i in part]), strict=True)
    expected = torch.stack([rows[i] for i in range(len(ids))])
    margin, temperature = reference.settings.margin, reference.settings.temperature
    assert margin is not None
    assert temperature is not None
    loss = contrastive_loss(
        expected[:BATCH], expected[BATCH:], "euclidean", "triplet", margin, temperature
    ).loss
    loss.backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(vectors, expected, rtol=1e-5, atol=1e-6)
    assert_equal(trainer, values.loss, reference, loss)
    assert_same_tensors({"state": torch.get_rng_state()}, {"state": after})

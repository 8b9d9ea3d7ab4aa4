"""The fast path against transformers' own forward pass: vectors, gradients, dropout's arithmetic,
and which models it takes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from semcse import packed

SMALL: dict[str, Any] = {
    "vocab_size": 90,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 64,
    "max_position_embeddings": 300,
}
DEBERTA: dict[str, Any] = SMALL | {
    "relative_attention": True,
    "position_buckets": 32,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": ["p2c", "c2p"],
    "max_relative_positions": -1,
    "position_biased_input": False,
    "type_vocab_size": 0,
}
MODELS: dict[str, Callable[[], Any]] = {
    "bert": lambda: transformers.BertModel(transformers.BertConfig(**SMALL)),
    "roberta with pooler": lambda: transformers.RobertaModel(
        transformers.RobertaConfig(**SMALL, pad_token_id=1)
    ),
    "xlm-roberta": lambda: transformers.XLMRobertaModel(
        transformers.XLMRobertaConfig(**SMALL, pad_token_id=1)
    ),
    "deberta v3": lambda: transformers.DebertaV2Model(transformers.DebertaV2Config(**DEBERTA)),
    "own position projections": lambda: transformers.DebertaV2Model(
        transformers.DebertaV2Config(**DEBERTA | {"share_att_key": False})
    ),
    "content to position only": lambda: transformers.DebertaV2Model(
        transformers.DebertaV2Config(**DEBERTA | {"pos_att_type": ["c2p"]})
    ),
    "position to content only": lambda: transformers.DebertaV2Model(
        transformers.DebertaV2Config(**DEBERTA | {"pos_att_type": ["p2c"]})
    ),
    "no buckets, absolute positions too": lambda: transformers.DebertaV2Model(
        transformers.DebertaV2Config(
            **DEBERTA
            | {
                "position_buckets": -1,
                "norm_rel_ebd": "none",
                "position_biased_input": True,
                "type_vocab_size": 2,
            }
        )
    ),
}
# Beside one another, one alone, all alike, and beyond the 16 distances that have a row of their own
# among 32 buckets, with tokens of no text at the end.
LENGTHS = ([3, 40, 39, 12, 60, 5, 41], [9], [8, 8, 8], [290, 130, 17, 262, 285, 100])


def texts(lengths: Sequence[int]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(sum(lengths))
    return [torch.randint(5, 90, (n,), generator=generator).tolist() for n in lengths]


def packed_states(model: Any, ids: list[list[int]]) -> list[Tensor]:
    """Hidden states of each text's real tokens, in the texts' order."""
    batch = packed.pack(ids, 1, torch.device("cpu"))
    rows = [row for group in packed.hidden_states(model, batch) for row in group]
    return [rows[int(batch.order[i])][: len(text)] for i, text in enumerate(ids)]


def plain_states(model: Any, ids: list[list[int]]) -> list[Tensor]:
    """The same by transformers, one padded batch."""
    longest = max(map(len, ids))
    padded = torch.tensor([[*row, *[1] * (longest - len(row))] for row in ids])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids])
    hidden = model(input_ids=padded, attention_mask=mask).last_hidden_state
    return [hidden[i, : len(text)] for i, text in enumerate(ids)]


def gradients(model: Any, states: list[Tensor]) -> dict[str, Tensor]:
    """Of a loss in which every real token counts differently."""
    model.zero_grad()
    weights = torch.Generator().manual_seed(0)
    torch.stack(
        [(state * torch.randn(state.shape, generator=weights)).sum() for state in states]
    ).square().sum().backward()  # type: ignore[no-untyped-call]
    return {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_states_and_gradients_equal_transformers(name: str, lengths: list[int]) -> None:
    torch.manual_seed(0)
    model, ids = MODELS[name]().eval(), texts(lengths)
    assert packed.supports(model)
    ours, theirs = packed_states(model, ids), plain_states(model, ids)
    assert max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True)) < 5e-6
    mine, other = gradients(model, ours), gradients(model, theirs)
    size = torch.stack([gradient.norm() for gradient in other.values()]).norm()
    assert mine.keys() == other.keys()
    assert max((mine[key] - other[key]).norm().item() for key in other) < 1e-5 * size


def test_bf16_stays_near_float32() -> None:
    torch.manual_seed(0)
    for name in ("bert", "deberta v3"):
        model, ids = MODELS[name]().eval(), texts(LENGTHS[0])
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            half = packed_states(model, ids)
        for a, b in zip(half, plain_states(model, ids), strict=True):
            assert torch.nn.functional.cosine_similarity(a.float(), b, dim=-1).min() > 0.999, name


@given(st.lists(st.integers(1, 200), min_size=1, max_size=40))
def test_packing_keeps_every_token_once_and_pads_little(lengths: list[int]) -> None:
    ids = texts(lengths)
    batch = packed.pack(ids, 0, torch.device("cpu"))
    rows = [row for group in batch.split(batch.ids[:, None]) for row in group[:, :, 0].tolist()]
    masks = [row for group in batch.groups for row in group.mask.tolist()]
    places = [
        row for group in batch.split(batch.positions[:, None]) for row in group[:, :, 0].tolist()
    ]
    for i, text in enumerate(ids):
        at = int(batch.order[i])
        assert rows[at][: len(text)] == text
        assert masks[at] == [k < len(text) for k in range(len(masks[at]))]
        filling = len(masks[at]) - len(text)
        assert places[at] == [*range(len(text)), *[0] * filling]
        assert filling == 0 or filling < min(packed.LENGTHS, len(masks[at]) / 4)
    held = sum(group.tokens for group in batch.groups)
    assert (
        held
        <= len(batch.ids)
        == len(batch.positions)
        < held + max(1, min(packed.TOKENS, held / 16))
    )
    assert len(batch.ids) % packed.TOKENS == 0 or held < 16 * packed.TOKENS
    assert [group.full for group in batch.groups] == [
        bool(group.mask.all()) for group in batch.groups
    ]


def test_cheap_dropout_is_a_dropout() -> None:
    """Values 0 or 1 / (1 - p), the share dropped within five standard errors of p, the gradient
    masked alike, and repeatable by torch's seed.
    """
    torch.manual_seed(3)
    x = torch.ones(1_001, 999, dtype=torch.bfloat16, requires_grad=True)
    y = packed.dropout(x, 0.1)
    y.backward(torch.full_like(y, 2.0))  # type: ignore[no-untyped-call]
    assert x.grad is not None
    assert set(y.flatten().tolist()) == {0.0, float(torch.tensor(1 / 0.9, dtype=torch.bfloat16))}
    assert abs((y == 0).double().mean().item() - 0.1) < 5 * (0.1 * 0.9 / x.numel()) ** 0.5
    assert torch.equal(x.grad != 0, y != 0)
    assert abs(x.grad.double().mean().item() - 2.0) < 0.01
    # neighbours that share a draw of 64 bits must not share their fate
    rows = (y == 0).double().mean(dim=0)
    together = ((y[:, :-1] == 0) & (y[:, 1:] == 0)).double().mean().item()
    assert abs(together - 0.01) < 0.001
    assert abs(rows.std().item() - (0.09 / 1_001) ** 0.5) < 0.002
    torch.manual_seed(3)
    assert torch.equal(packed.dropout(x, 0.1), y)
    assert packed.dropout(x, 0.0) is x


@pytest.mark.parametrize("name", ["bert", "deberta v3"])
def test_training_draws_dropout_everywhere_that_transformers_does(name: str) -> None:
    """With all dropout of one kind at work and averaged over draws, the mean state of both paths
    agrees, and so does its spread.
    """
    torch.manual_seed(0)
    model, ids = MODELS[name]().train(), texts([12, 12, 12])
    draws = 300
    with torch.no_grad():
        ours = torch.stack([torch.stack(packed_states(model, ids)) for _ in range(draws)])
        theirs = torch.stack([torch.stack(plain_states(model, ids)) for _ in range(draws)])
    error = theirs.std(dim=0) / draws**0.5
    # sqrt(2) where both estimate the same mean
    assert ((ours.mean(dim=0) - theirs.mean(dim=0)).abs() / error).square().mean().sqrt() < 1.6
    assert abs((ours.var(dim=0) / theirs.var(dim=0)).mean().item() - 1) < 0.05


def test_other_models_take_their_own_forward_pass() -> None:
    class Changed(transformers.BertModel):  # type: ignore[no-untyped-call]
        """Somebody's own code on top of BERT."""

    decoder = transformers.BertModel(transformers.BertConfig(**SMALL, is_decoder=True))
    with_convolution = transformers.DebertaV2Config(**DEBERTA)
    with_convolution.conv_kernel_size = 3
    convolution = transformers.DebertaV2Model(with_convolution)
    modern = transformers.ModernBertModel(
        transformers.ModernBertConfig(
            **SMALL, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2
        )
    )
    others = [Changed(transformers.BertConfig(**SMALL)), decoder, convolution, modern]
    assert [packed.supports(model) for model in others] == [False] * 4

"""The packed forward pass gives the hidden states and gradients of transformers' own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
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
ABSOLUTE_TOO = {"norm_rel_ebd": "none", "position_biased_input": True, "type_vocab_size": 2}


def bert(**changes: Any) -> Any:
    return transformers.BertModel(transformers.BertConfig(**SMALL | changes))


def deberta(**changes: Any) -> Any:
    return transformers.DebertaV2Model(transformers.DebertaV2Config(**DEBERTA | changes))


MODELS: dict[str, Callable[[], Any]] = {
    "bert": bert,
    "roberta with pooler": lambda: transformers.RobertaModel(
        transformers.RobertaConfig(**SMALL, pad_token_id=1)
    ),
    "xlm-roberta": lambda: transformers.XLMRobertaModel(
        transformers.XLMRobertaConfig(**SMALL, pad_token_id=1)
    ),
    "deberta v3": deberta,
    "deberta with absolute positions too": lambda: deberta(**ABSOLUTE_TOO),
}
# Several groups, a single text, texts of one length, and texts whose distances share buckets: with
# 32 buckets, only distances below 16 have a row of the position table each.
LENGTHS = ([3, 40, 39, 12, 60, 5, 41], [9], [8, 8, 8], [290, 130, 17, 262, 285, 100])


def texts(lengths: Sequence[int]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(sum(lengths))
    return [torch.randint(5, 90, (n,), generator=generator).tolist() for n in lengths]


def packed_states(model: Any, ids: list[list[int]]) -> list[Tensor]:
    """Hidden states of the real tokens of each text, in the order of the texts."""
    batch = packed.pack(ids, 1, torch.device("cpu"))
    rows = [row for group in packed.hidden_states(model, batch) for row in group]
    return [rows[int(batch.order[i])][: len(text)] for i, text in enumerate(ids)]


def plain_states(model: Any, ids: list[list[int]]) -> list[Tensor]:
    """The same by transformers alone, in one padded batch."""
    longest = max(map(len, ids))
    padded = torch.tensor([[*row, *[1] * (longest - len(row))] for row in ids])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids])
    hidden = model(input_ids=padded, attention_mask=mask).last_hidden_state
    return [hidden[i, : len(text)] for i, text in enumerate(ids)]


def gradients(model: Any, states: list[Tensor]) -> dict[str, Tensor]:
    """The gradients of a loss in which every real token has another weight."""
    model.zero_grad()
    weights = torch.Generator().manual_seed(0)
    sums = [(state * torch.randn(state.shape, generator=weights)).sum() for state in states]
    torch.stack(sums).square().sum().backward()  # type: ignore[no-untyped-call]
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
    found, expected = packed_states(model, ids), plain_states(model, ids)
    assert max((a - b).abs().max().item() for a, b in zip(found, expected, strict=True)) < 5e-6
    ours, theirs = gradients(model, found), gradients(model, expected)
    size = torch.stack([gradient.norm() for gradient in theirs.values()]).norm()
    assert ours.keys() == theirs.keys()
    assert max((ours[key] - theirs[key]).norm().item() for key in theirs) < 1e-5 * size


@pytest.mark.parametrize("name", ["bert", "deberta v3"])
def test_bf16_is_close_to_float32(name: str) -> None:
    torch.manual_seed(0)
    model, ids = MODELS[name]().eval(), texts(LENGTHS[0])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = packed_states(model, ids)
    for a, b in zip(found, plain_states(model, ids), strict=True):
        assert torch.nn.functional.cosine_similarity(a.float(), b, dim=-1).min() > 0.999


@pytest.mark.parametrize("name", ["bert", "deberta v3"])
def test_dropout_is_applied_wherever_transformers_applies_it(name: str) -> None:
    """Over many draws, the hidden states of both paths have the same mean and the same variance."""
    torch.manual_seed(0)
    model, ids = MODELS[name]().train(), texts([12, 12, 12])
    draws = 200
    with torch.no_grad():
        ours = torch.stack([torch.stack(packed_states(model, ids)) for _ in range(draws)])
        theirs = torch.stack([torch.stack(plain_states(model, ids)) for _ in range(draws)])
    error = theirs.std(dim=0) / draws**0.5
    # If both means estimate the same number, this is the square root of 2.
    assert ((ours.mean(dim=0) - theirs.mean(dim=0)).abs() / error).square().mean().sqrt() < 1.6
    assert abs((ours.var(dim=0) / theirs.var(dim=0)).mean().item() - 1) < 0.07


@given(st.lists(st.integers(1, 200), min_size=1, max_size=40))
def test_packing_keeps_every_token_and_pads_little(lengths: list[int]) -> None:
    ids = texts(lengths)
    batch = packed.pack(ids, 0, torch.device("cpu"))
    found_ids, positions = (
        [row for group in batch.split(array[:, None]) for row in group[:, :, 0].tolist()]
        for array in (batch.ids, batch.positions)
    )
    masks = [row for group in batch.masks for row in group.tolist()]
    for i, text in enumerate(ids):
        row, padding = int(batch.order[i]), [0] * (len(masks[batch.order[i]]) - len(text))
        assert found_ids[row] == text + padding
        assert positions[row] == [*range(len(text)), *padding]
        assert masks[row] == [True] * len(text) + [False] * len(padding)
        assert len(padding) < (8 if len(text) >= 32 else 4)
    in_groups = sum(map(len, masks))
    assert in_groups <= len(batch.ids) == len(batch.positions) < in_groups + 64


@given(st.lists(st.integers(1, 60), max_size=40), st.integers(0, 400))
def test_batches_hold_every_text_once_and_are_as_large_as_allowed(
    lengths: list[int], max_tokens: int
) -> None:
    batches = packed.split_by_tokens([[7] * length for length in lengths], max_tokens)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert [lengths[i] for batch in batches for i in batch] == sorted(lengths, reverse=True)
    for number, batch in enumerate(batches, 1):
        longest = lengths[batch[0]]
        assert len(batch) == 1 or len(batch) * longest <= max_tokens
        assert number == len(batches) or (len(batch) + 1) * longest > max_tokens


def test_other_models_take_their_own_forward_pass() -> None:
    class Changed(transformers.BertModel):  # type: ignore[no-untyped-call]
        """Somebody's own code on top of BERT."""

    with_convolution = transformers.DebertaV2Config(**DEBERTA)
    with_convolution.conv_kernel_size = 3
    special: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    modern = transformers.ModernBertConfig(**SMALL, **special, cls_token_id=1, sep_token_id=2)
    for model in (
        Changed(transformers.BertConfig(**SMALL)),
        bert(is_decoder=True),
        transformers.DebertaV2Model(with_convolution),
        deberta(share_att_key=False),
        deberta(pos_att_type=["c2p"]),
        deberta(position_buckets=-1),
        transformers.ModernBertModel(modern),
    ):
        assert not packed.supports(model)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5])
def test_fast_dropout_drops_the_right_share_and_scales_the_rest(p: float) -> None:
    """The mean of a sample of 2^20 elements lies within five standard deviations, in bf16."""
    torch.manual_seed(0)
    x = torch.ones(2**10, 2**10, dtype=torch.bfloat16, requires_grad=True)
    dropped = packed.FastDropout(p)(x)
    kept = dropped != 0
    assert abs(kept.float().mean().item() - (1 - p)) <= 5 * (p * (1 - p)) ** 0.5 / 2**10
    scale = torch.tensor(1.0, dtype=torch.bfloat16).div(1 - p)
    assert bool((dropped[kept] == scale).all())
    dropped.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, dropped.detach())  # x is 1: the gradient is the same mask


def test_fast_dropout_is_torchs_own_elsewhere() -> None:
    layer, x = packed.FastDropout(0.3), torch.randn(50, 40)
    torch.manual_seed(3)
    expected = torch.nn.functional.dropout(x, 0.3)
    torch.manual_seed(3)
    assert torch.equal(layer(x), expected)
    half = x.bfloat16()
    assert torch.equal(layer.eval()(half), half)


def test_use_fast_dropout_turns_every_dropout_layer(tiny_bert: Path) -> None:
    model: Any = transformers.AutoModel.from_pretrained(tiny_bert)
    before = [type(module) for module in model.modules()].count(torch.nn.Dropout)
    packed.use_fast_dropout(model)
    kinds = [type(module) for module in model.modules()]
    assert before > 0
    assert kinds.count(packed.FastDropout) == before
    assert torch.nn.Dropout not in kinds

"""The fast path of encoding and training: BERT-like and DeBERTa-v2 encoders over real tokens, with
the results of transformers' own forward pass.

Against a padded batch three things are saved.
- Texts are sorted by length, and only those of nearly one length share a padded group, of which 2%
(abstracts) to 9% (summaries) is padding:
  linear layers, norms and dropouts run over all groups' tokens as one long array, attention over
      one group at a time.
- DeBERTa multiplies queries and keys with the 2L - 1 rows of the relative-position table that can
occur, not with all 512, and reads the scores as a view of
  fixed stride instead of gathering them.
- On the CPU in bf16, where drawing dropout masks costs as much as the matrix products, a mask takes
16 random bits an element.

A loaded transformers model is used as it is: no weight is moved or renamed. Other architectures
take the model's own forward pass (`encoder.Encoder.forward`), which is also the reference in the
tests.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position

# oneDNN makes and keeps code for every shape that it meets, which costs time and memory all through
# a training run. So that few shapes occur, texts share a group if their lengths round up to the
# same multiple of so many tokens, and a batch is filled up to a multiple too; to smaller ones where
# they are short.
LENGTHS, TOKENS = 8, 64
BERT_LIKE = ("BertModel", "RobertaModel", "XLMRobertaModel")


@dataclass(frozen=True)
class Group:
    """Texts of nearly one length, padded to the longest or a little more."""

    mask: Tensor  # (texts, length) bool, true at real tokens
    full: bool  # nothing is padded

    @property
    def tokens(self) -> int:
        """Places of the group in the long array."""
        return self.mask.numel()


@dataclass(frozen=True)
class Packed:
    """A batch as one long array of tokens, group after group, then tokens of no text."""

    ids: Tensor  # (tokens,)
    positions: Tensor  # (tokens,) 0, 1, ... in each text, 0 where there is none
    groups: list[Group]
    order: Tensor  # (n,) place of text i among the groups' texts

    def split(self, array: Tensor) -> tuple[Tensor, ...]:
        """(tokens, d) -> a (texts, length, d) view for each group."""
        sizes = [group.tokens for group in self.groups]
        parts = torch.split(array[: sum(sizes)], sizes)
        return tuple(
            part.view(*group.mask.shape, -1) for part, group in zip(parts, self.groups, strict=True)
        )


def supports(model: Any) -> bool:
    """Whether `hidden_states` computes what the model's own forward pass would. Decided by exact
    class: a model's own code may compute anything.
    """
    kind, config = type(model).__name__, model.config
    if not type(model).__module__.startswith("transformers.models."):
        return False
    if kind in BERT_LIKE:
        return not (config.is_decoder or config.add_cross_attention)
    return (
        kind == "DebertaV2Model"
        and bool(config.relative_attention)
        and model.encoder.conv is None
        and model.z_steps <= 1
    )


def pack(ids: Sequence[Sequence[int]], fill: int, device: torch.device) -> Packed:
    """Sort texts by length, group them, and lay the groups end to end."""
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
    flat: list[int] = []
    places: list[int] = []
    groups: list[Group] = []
    at = 0
    while at < len(order):
        step = min(LENGTHS, _power(len(ids[order[at]]) / 4))
        length = -(-len(ids[order[at]]) // step) * step
        members = [i for i in order[at:] if len(ids[i]) > length - step]
        for i in members:
            filling = length - len(ids[i])
            flat += [*ids[i], *[fill] * filling]
            places += [*range(len(ids[i])), *[0] * filling]
        mask = torch.arange(length) < torch.tensor([len(ids[i]) for i in members])[:, None]
        groups.append(Group(mask.to(device), len(ids[members[-1]]) == length))
        at += len(members)
    rest = -len(flat) % min(TOKENS, _power(len(flat) / 16))
    flat, places = flat + [fill] * rest, places + [0] * rest
    return Packed(
        torch.tensor(flat, device=device),
        torch.tensor(places, device=device),
        groups,
        torch.tensor(order, device=device).argsort(),
    )


def parts(ids: Sequence[Sequence[int]], most: int) -> list[list[int]]:
    """Places of all texts, longest first, in parts that hold no more tokens than the `most` longest
    texts together; in one part if `most` is 0.
    """
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
    room = sum(len(ids[i]) for i in order[: most or None])
    found: list[list[int]] = []
    left = 0
    for i in order:
        if not found or len(ids[i]) > left:
            found.append([])
            left = room
        found[-1].append(i)
        left -= len(ids[i])
    return found


def _power(number: float) -> int:
    """The largest power of two that is not above a number; 1 for small ones."""
    return int(2 ** math.floor(math.log2(max(1.0, number))))


def hidden_states(model: Any, batch: Packed) -> tuple[Tensor, ...]:
    """(texts, length, d) last hidden states of each group, of a model for which `supports` is true."""
    is_deberta = type(model).__name__ == "DebertaV2Model"
    offset = (
        0
        if type(model).__name__ in ("BertModel", "DebertaV2Model")
        else model.embeddings.padding_idx + 1
    )
    hidden = model.embeddings(
        input_ids=batch.ids[None], position_ids=batch.positions[None] + offset
    )[0]
    table = model.encoder.get_rel_embedding() if is_deberta else None
    for layer in model.encoder.layer:
        own = layer.attention.self
        attended = (
            _deberta_attention(own, hidden, batch, table)
            if is_deberta
            else _bert_attention(own, hidden, batch)
        )
        attended = _residual(layer.attention.output, attended, hidden)
        hidden = _residual(layer.output, layer.intermediate(attended), attended)
    return batch.split(hidden)


def _residual(output: Any, inner: Tensor, outer: Tensor) -> Tensor:
    """What BertOutput, BertSelfOutput and DeBERTa's two compute: LayerNorm(dropout(dense(inner)) +
    outer).
    """
    normed: Tensor = output.LayerNorm(
        dropout(output.dense(inner), output.dropout.p if output.training else 0.0) + outer
    )
    return normed


def _project(hidden: Tensor, linears: Sequence[Any]) -> Tensor:
    """(tokens, d) -> (tokens, 3 d): queries, keys and values in one product."""
    return functional.linear(
        hidden, torch.cat([one.weight for one in linears]), torch.cat([one.bias for one in linears])
    )


def _heads(projected: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """A group's (texts, length, 3 d) projections -> its queries, keys and values, (texts, heads,
    length, head size) each, as views.
    """
    q, k, v = projected.view(*projected.shape[:2], 3, heads, -1).permute(2, 0, 3, 1, 4)
    return q, k, v


def _joined(contexts: list[Tensor], total: int) -> Tensor:
    """Each group's (texts, heads, length, head size) -> (total tokens, d)."""
    rows = [context.transpose(1, 2).flatten(2).flatten(0, 1) for context in contexts]
    return torch.cat([*rows, rows[0].new_zeros(total - sum(map(len, rows)), rows[0].shape[1])])


def _bert_attention(own: Any, hidden: Tensor, batch: Packed) -> Tensor:
    projected = _project(hidden, (own.query, own.key, own.value))
    share = own.dropout.p if own.training else 0.0
    contexts = []
    for group, part in zip(batch.groups, batch.split(projected), strict=True):
        q, k, v = _heads(part, own.num_attention_heads)
        if share:
            contexts.append(_attend((q * own.scaling) @ k.transpose(-1, -2), v, group, share))
        else:
            mask = None if group.full else group.mask[:, None, None]
            contexts.append(
                functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=own.scaling)
            )
    return _joined(contexts, len(hidden))


def _attend(scores: Tensor, v: Tensor, group: Group, share: float) -> Tensor:
    """(texts, heads, length, length) scores -> context, with dropout of the attention
    probabilities.
    """
    if not group.full:
        scores = scores.masked_fill(~group.mask[:, None, None], torch.finfo(scores.dtype).min)
    return dropout(torch.softmax(scores, -1), share) @ v


def _deberta_attention(own: Any, hidden: Tensor, batch: Packed, table: Tensor | None) -> Tensor:
    heads = own.num_attention_heads
    projected = _project(hidden, (own.query_proj, own.key_proj, own.value_proj))
    scale = 1 / math.sqrt(
        own.attention_head_size * (1 + ("c2p" in own.pos_att_type) + ("p2c" in own.pos_att_type))
    )
    longest = batch.groups[0].mask.shape[1]
    rows = own.pos_dropout(table)[_distance_rows(own, longest, hidden.device)]
    names = ("key_proj", "query_proj") if own.share_att_key else ("pos_key_proj", "pos_query_proj")
    keys = (
        _position_heads(getattr(own, names[0]), rows, heads).flip(-1)
        if "c2p" in own.pos_att_type
        else None
    )
    queries = (
        _position_heads(getattr(own, names[1]), rows, heads) if "p2c" in own.pos_att_type else None
    )
    contexts = []
    for group, part in zip(batch.groups, batch.split(projected), strict=True):
        q, k, v = _heads(part, heads)
        q, live = q * scale, slice(longest - part.shape[1], longest + part.shape[1] - 1)
        scores = q @ k.transpose(-1, -2)
        if keys is not None:
            scores = scores + _by_position(q @ keys[..., live])
        if queries is not None:
            scores = scores + _by_position(k @ (queries[..., live] * scale)).transpose(-1, -2)
        contexts.append(_attend(scores, v, group, own.dropout.p if own.training else 0.0))
    return _joined(contexts, len(hidden))


def _position_heads(linear: Any, rows: Tensor, heads: int) -> Tensor:
    """(2 L - 1, d) rows of the position table -> (heads, head size, 2 L - 1)."""
    projected: Tensor = linear(rows)
    return projected.view(len(rows), heads, -1).permute(1, 2, 0)


def _distance_rows(own: Any, length: int, device: torch.device) -> Tensor:
    """(2 length - 1,) row of the position table for each distance i - j = -(length - 1) ... length
    - 1; far distances share log-spaced buckets.
    """
    distance = torch.arange(1 - length, length, device=device)
    if own.position_buckets > 0:
        distance = make_log_bucket_position(
            distance, own.position_buckets, own.max_relative_positions
        ).long()
    rows: Tensor = (distance + own.pos_ebd_size).clamp(0, 2 * own.pos_ebd_size - 1)
    return rows


class _Skew(torch.autograd.Function):
    """(..., L, 2L - 1) scores by distance -> (..., L, L) by position: out[i, j] = by_distance[i, L
    - 1 + j - i], a view of fixed stride.
    """

    @staticmethod
    def forward(ctx: Any, by_distance: Tensor) -> Tensor:
        length, width = by_distance.shape[-2:]
        flat = by_distance.contiguous().view(-1, length * width)
        view = flat.as_strided(
            (len(flat), length, length), (length * width, width - 1, 1), length - 1
        )
        return view.reshape(*by_distance.shape[:-1], length)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        length = grad.shape[-1]
        width = 2 * length - 1
        out = grad.new_zeros(*grad.shape[:-1], width)
        n = grad.numel() // length**2
        out.as_strided((n, length, length), (length * width, width - 1, 1), length - 1).copy_(
            grad.reshape(n, length, length)
        )
        return out


_by_position: Any = _Skew.apply  # untyped


@contextlib.contextmanager
def sparse_gradients(model: Any) -> Iterator[None]:
    """Gradients of embedding tables are added at the rows in use: a whole table for each part of a
    batch costs more than the part.
    """
    tables = [module for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    try:
        for table in tables:
            table.sparse = True
        yield
    finally:
        for table in tables:
            table.sparse = False


def dropout(x: Tensor, p: float) -> Tensor:
    """`functional.dropout`; on the CPU in bf16 by `_CheapDropout`."""
    if p == 0:
        return x
    cheap: Any = _CheapDropout.apply  # untyped
    dropped: Tensor = (
        cheap(x, p)
        if x.dtype == torch.bfloat16 and x.device.type == "cpu"
        else functional.dropout(x, p)
    )
    return dropped


class _CheapDropout(torch.autograd.Function):
    """Dropout with p rounded to 1/32,768: torch's generator gives 64 random bits at a time, enough
    for four elements; a mask of all ones or zeros is laid over the numbers' bits. Torch's own draws
    a double an element, which costs more than the matrix products on a CPU with bf16 units.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        drawn = (
            torch.empty(-(-x.numel() // 4), dtype=torch.int64)
            .random_(-(2**63), None)
            .view(torch.int16)[: x.numel()]
            .view(x.shape)
        )
        dropped = round(p * 2**15)
        # (threshold - drawn) is negative where drawn is larger: its sign, spread over all bits, is
        # the mask of the kept elements
        kept = (
            drawn.bitwise_right_shift_(1).neg_().add_(dropped - 2**14 - 1).bitwise_right_shift_(15)
        )
        ctx.save_for_backward(kept)
        ctx.scale = 2**15 / (2**15 - dropped)
        return _mask(x, kept, ctx.scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _mask(grad, ctx.saved_tensors[0], ctx.scale), None


def _mask(x: Tensor, kept: Tensor, scale: float) -> Tensor:
    return (x.contiguous().view(torch.int16) & kept).view(torch.bfloat16).mul_(scale)

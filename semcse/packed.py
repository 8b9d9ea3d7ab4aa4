"""A faster forward pass for BERT-like and DeBERTa-v2 encoders that computes almost no padding.

In a batch that is padded to its longest text, most of the work is often done on padding. Here,
texts of nearly the same length form a group, and the tokens of all groups lie end to end in one
long array. Linear layers, layer norms and dropout run over the whole array; attention runs group by
group, because a token attends to the tokens of its own text only. About 2% (abstracts) to 9% (short
summaries) of the array is padding. DeBERTa's attention has one more shortcut, see
`_deberta_attention`.

The results equal those of transformers' own forward pass (tests/test_packed.py compares hidden
states and gradients). Models for which `supports` is false take their own forward pass.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position

BERT_LIKE = ("BertModel", "RobertaModel", "XLMRobertaModel")
# The array is padded to a multiple of this many tokens. On a CPU, oneDNN keeps compiled code for
# every shape: without this padding, MiniLM takes 200 MiB more after 40 training steps.
TOTAL_MULTIPLE = 64


class FastDropout(nn.Dropout):
    """Dropout that draws 16 random bits for each element, for training in bf16 on a CPU.

    PyTorch draws a double for each, with which a training step of MiniLM takes 5% longer.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Drop elements of a tensor of any shape; PyTorch does it for other types and devices."""
        if not self.training or x.device.type != "cpu" or x.dtype != torch.bfloat16:
            return super().forward(x)
        words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        bits = words.view(torch.int16)[: x.numel()].view(x.shape)  # uniform from -2^15 to 2^15 - 1
        kept = bits >= round(self.p * 2**16) - 2**15
        return x * kept.to(x.dtype).div_(1 - self.p)


def use_fast_dropout(model: nn.Module) -> None:
    """Turn all dropout layers of a model into FastDropout."""
    for module in model.modules():
        if type(module) is nn.Dropout:
            module.__class__ = FastDropout


@dataclass(frozen=True)
class PackedBatch:
    """A batch of n texts as one array of tokens: group after group, then filler tokens."""

    ids: Tensor  # (total,) int64: token ids
    positions: Tensor  # (total,) int64: 0, 1, 2, ... in each text, and 0 at padding
    masks: list[Tensor]  # for each group (texts, length) bool: true at real tokens
    order: Tensor  # (n,) int64: the row of each text if the texts of all groups are stacked

    def split(self, array: Tensor) -> list[Tensor]:
        """Split (total, d) into a (texts, length, d) view for each group."""
        sizes = [mask.numel() for mask in self.masks]
        views = torch.split(array[: sum(sizes)], sizes)
        return [view.view(*mask.shape, -1) for view, mask in zip(views, self.masks, strict=True)]


def supports(model: Any) -> bool:
    """Return whether `hidden_states` computes the same as the model's own forward pass.

    The model must be of one of transformers' own classes, because a subclass may compute anything.
    A DeBERTa-v2 must have the attention that all published v3 models have, and no convolution.
    """
    name, config = type(model).__name__, model.config
    if not type(model).__module__.startswith("transformers.models."):
        return False
    if name in BERT_LIKE:
        return not (config.is_decoder or config.add_cross_attention)
    return (
        name == "DebertaV2Model"
        and bool(config.relative_attention and config.share_att_key)
        and set(config.pos_att_type or ()) == {"c2p", "p2c"}
        and config.position_buckets > 0
        and model.encoder.conv is None
        and model.z_steps <= 1
    )


def padded_length(length: int) -> int:
    """Round the length of a text up to a multiple of 8 tokens, or of 4 below 32 tokens."""
    multiple = 8 if length >= 32 else 4
    return math.ceil(length / multiple) * multiple


def first_position(model: Any) -> int:
    """Return the row of the position table that a text's first token takes. RoBERTa-like models
    number positions from the padding id + 1; only they store `padding_idx` here.
    """
    padding_id = getattr(getattr(model, "embeddings", None), "padding_idx", None)
    return 0 if padding_id is None else int(padding_id) + 1


def pack(ids: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> PackedBatch:
    """Pack tokenized texts: sort them by length, longest first, and group those of like length.

    Args:
        ids: n lists of token ids.
        pad_id: The token id to write at padding. Padding changes no result.
        device: The device of the model.
    """
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
    flat: list[int] = []
    positions, masks = [], []
    for length, group in itertools.groupby(order, key=lambda i: padded_length(len(ids[i]))):
        rows = [ids[i] for i in group]
        for row in rows:
            flat += [*row, *[pad_id] * (length - len(row))]
        mask = torch.arange(length) < torch.tensor([len(row) for row in rows])[:, None]
        positions.append((torch.arange(length) * mask).flatten())
        masks.append(mask.to(device))
    filler = -len(flat) % TOTAL_MULTIPLE
    return PackedBatch(
        ids=torch.tensor(flat + [pad_id] * filler, device=device),
        positions=functional.pad(torch.cat(positions), (0, filler)).to(device),
        masks=masks,
        order=torch.tensor(order, device=device).argsort(),
    )


def split_by_tokens(ids: Sequence[Sequence[int]], max_tokens: int) -> list[list[int]]:
    """Split tokenized texts into batches: lists of indices into `ids`, longest texts first.

    A batch has at most `max_tokens` tokens, padding included, unless it is a single text.
    """
    batches: list[list[int]] = []
    for i in sorted(range(len(ids)), key=lambda i: -len(ids[i])):
        if batches and (len(batches[-1]) + 1) * len(ids[batches[-1][0]]) <= max_tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def hidden_states(model: Any, batch: PackedBatch) -> list[Tensor]:
    """Return the last hidden states, (texts, length, d) for each group. `supports` must be true."""
    hidden = model.embeddings(
        input_ids=batch.ids[None], position_ids=batch.positions[None] + first_position(model)
    )[0]  # (total, d)
    attention: Callable[..., Tensor] = _bert_attention
    if type(model).__name__ == "DebertaV2Model":
        attention = partial(_deberta_attention, table=model.encoder.get_rel_embedding())
    for layer in model.encoder.layer:
        context = attention(layer.attention.self, hidden, batch)
        attended = layer.attention.output(context, hidden)
        hidden = layer.output(layer.intermediate(attended), attended)
    return batch.split(hidden)


def _heads(linear: Any, array: Tensor, batch: PackedBatch, heads: int) -> list[Tensor]:
    """Map (total, d) to (texts, heads, length, size) for each group, where size = d / heads."""
    groups = batch.split(linear(array))
    return [group.view(*group.shape[:2], heads, -1).transpose(1, 2) for group in groups]


def _attend(scores: Tensor, values: Tensor, mask: Tensor, dropout: Any) -> Tensor:
    """Average values (texts, heads, length, size) by scores (texts, heads, length, length)."""
    scores = scores.masked_fill(~mask[:, None, None], torch.finfo(scores.dtype).min)
    weighted: Tensor = dropout(torch.softmax(scores, dim=-1)) @ values
    return weighted


def _join(contexts: list[Tensor], total: int) -> Tensor:
    """Join each group's (texts, heads, length, size) to (total, d), with zeros at filler tokens."""
    joined = torch.cat([one.transpose(1, 2).flatten(2).flatten(0, 1) for one in contexts])
    return functional.pad(joined, (0, 0, 0, total - len(joined)))


def _bert_attention(attention: Any, hidden: Tensor, batch: PackedBatch) -> Tensor:
    """Compute the self-attention of BERT, (total, d) -> (total, d)."""
    queries, keys, values = (
        _heads(linear, hidden, batch, attention.num_attention_heads)
        for linear in (attention.query, attention.key, attention.value)
    )
    contexts = []
    for q, k, v, mask in zip(queries, keys, values, batch.masks, strict=True):
        if attention.training:
            scores = (q * attention.scaling) @ k.transpose(-1, -2)
            contexts.append(_attend(scores, v, mask, attention.dropout))
        else:  # PyTorch's fused attention is faster on a CPU, but slower if it applies dropout.
            fused = functional.scaled_dot_product_attention
            contexts.append(fused(q, k, v, mask[:, None, None], scale=attention.scaling))
    return _join(contexts, len(hidden))


def _deberta_attention(attention: Any, hidden: Tensor, batch: PackedBatch, table: Tensor) -> Tensor:
    """Compute disentangled self-attention, (total, d) -> (total, d).

    The score of tokens i and j is (q_i . k_j + q_i . K[i - j] + k_j . Q[i - j]) / sqrt(3 * size),
    where K and Q are the key and query projections of `table`, (2 * position_buckets, d), which has
    a row for each bucket of relative positions. In texts of L tokens, only the 2L - 1 distances
    from -(L - 1) to L - 1 occur. transformers multiplies with all rows of the table (512 in
    published models) and then gathers. Here, only those 2L - 1 rows are multiplied, and
    `_by_position` replaces the gathering.
    """
    heads = attention.num_attention_heads
    queries, keys, values = (
        _heads(linear, hidden, batch, heads)
        for linear in (attention.query_proj, attention.key_proj, attention.value_proj)
    )
    longest = batch.masks[0].shape[1]
    rows = attention.pos_dropout(table)[_table_rows(attention, longest, hidden.device)]
    distance_queries, distance_keys = (  # (heads, size, 2 * longest - 1)
        linear(rows).view(len(rows), heads, -1).permute(1, 2, 0)
        for linear in (attention.query_proj, attention.key_proj)
    )
    distance_keys = distance_keys.flip(-1)  # for queries, `_by_position` needs the distances j - i
    scale = 1 / math.sqrt(3 * attention.attention_head_size)
    contexts = []
    for q, k, v, mask in zip(queries, keys, values, batch.masks, strict=True):
        length = mask.shape[1]
        occurring = slice(longest - length, longest + length - 1)  # the distances in these texts
        q = q * scale
        scores = q @ k.transpose(-1, -2) + _by_position(q @ distance_keys[..., occurring])
        transposed = _by_position(k @ distance_queries[..., occurring] * scale)
        contexts.append(_attend(scores + transposed.transpose(-1, -2), v, mask, attention.dropout))
    return _join(contexts, len(hidden))


def _table_rows(attention: Any, length: int, device: torch.device) -> Tensor:
    """Return the table row of each distance from -(length - 1) to length - 1: (2 * length - 1,)
    int64. Short distances have a row each; long ones share rows, on a logarithmic scale.
    """
    buckets = attention.position_buckets
    distances = torch.arange(1 - length, length, device=device)
    bucket = make_log_bucket_position(distances, buckets, attention.max_relative_positions)
    rows: Tensor = (bucket.long() + buckets).clamp(0, 2 * buckets - 1)
    return rows


def _by_position(by_distance: Tensor) -> Tensor:
    """Turn scores by distance (..., L, 2L - 1) into scores by position (..., L, L).

    Column c of the input holds the scores for j - i = c - (L - 1). The result is
    out[i, j] = by_distance[i, L - 1 + j - i]. For L = 3, with the cells that are read in brackets:

        row 0:  -2   -1  [ 0]  [ 1]  [ 2]
        row 1:  -2  [-1] [ 0]  [ 1]    2
        row 2: [-2] [-1] [ 0]    1     2

    The window moves one column to the left in each row. In memory, each window therefore starts
    2L - 2 numbers after the one above it, instead of 2L - 1: the result is a strided view, and
    nothing is gathered.
    """
    *leading, length, width = by_distance.shape
    flat = by_distance.reshape(-1, length * width).contiguous()
    sizes, strides = (len(flat), length, length), (length * width, width - 1, 1)
    windows = flat.as_strided(sizes, strides, flat.storage_offset() + length - 1)
    return windows.view(*leading, length, length)

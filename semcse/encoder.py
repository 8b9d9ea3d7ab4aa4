"""Encoders: load, pool, embed, save. The only pooling code of the project, and the only code that
knows the layout of a model folder.

A text's vector is the last hidden state of its first token (CLS, as the paper) or the mean over its
real tokens; models that others trained may also use the last token or the pooler's output. A folder
saved here opens with plain `transformers.AutoModel` and with
`sentence_transformers.SentenceTransformer`, giving the same vectors; `semcse.json` in it says
metric, pooling and max length.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from semcse import errors, packed
from semcse.errors import RunError, UserError
from semcse.types import Device, Metric, Pooling, Precision

log = logging.getLogger(__name__)

# Texts tokenized and sorted by length together, and padded tokens of one forward pass. Memory is
# bounded by both, whatever the number of texts.
CHUNK_TEXTS = 1024
BATCH_TOKENS = {"cpu": 4096, "cuda": 65_536}
LENGTH_STEP = 8  # padded lengths are multiples of this

# Training's poolings, the last token's state (decoders), and the pooler's output. "own": what only
# a model's own code computes, which is not run here.
AnyPooling = Literal[Pooling, "last", "pooler", "own"]


@dataclass(frozen=True)
class Usage:
    """How a model's vectors are made and compared."""

    pooling: AnyPooling
    metric: Metric
    max_length: int  # tokens kept of a text, special tokens counted
    query_prompt: str = ""  # put in front of titles and queries
    document_prompt: str = ""  # put in front of abstracts and their halves
    normalize: bool = False  # scale vectors to length 1


@dataclass(frozen=True)
class Embedded:
    """Vectors of some texts, (n, d) float32 on the CPU, and how many of the texts were cut at the
    maximum length.
    """

    vectors: Tensor
    cut: int


@dataclass
class Encoder:
    """A model with its tokenizer and usage. `name` is what the user called it."""

    name: str
    model: nn.Module
    tokenizer: Any
    usage: Usage
    bf16: bool = False  # embed in bf16 autocast instead of float32
    # field of the usage -> where it was read ("flag", "semcse.json", "recipe", ...)
    origins: dict[str, str] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Where the model's weights are."""
        return next(self.model.parameters()).device

    def tokenize(self, texts: Sequence[str], max_length: int) -> list[list[int]]:
        """Token ids of each text with special tokens, cut at `max_length`."""
        ids = self.tokenizer(
            list(texts),
            truncation=True,
            max_length=max_length,
            padding=False,
            return_attention_mask=False,
            return_token_type_ids=False,
        )
        return cast(list[list[int]], ids["input_ids"])

    def forward(self, ids: Sequence[Sequence[int]]) -> Tensor:
        """Pooled vectors (n, d) of tokenized texts, with gradient where it is on. Padding is masked
        out: it changes no vector.
        """
        if packed.supports(self.model):
            batch = packed.pack(ids, self._fill, self.device)
            states = packed.hidden_states(self.model, batch)
            vectors = torch.cat(
                [
                    self._pool(hidden, group.mask.long())
                    for hidden, group in zip(states, batch.groups, strict=True)
                ]
            )[batch.order]
        else:
            padded, mask = self._pad(ids)
            vectors = self._pool(
                self.model(input_ids=padded, attention_mask=mask).last_hidden_state, mask
            )
        return functional.normalize(vectors, dim=-1) if self.usage.normalize else vectors

    def _pool(self, hidden: Tensor, mask: Tensor) -> Tensor:
        if self.usage.pooling == "pooler":
            return cast(Tensor, self.model.pooler(hidden))  # type: ignore[operator]
        return pool(hidden, mask, self.usage.pooling)

    @property
    def _fill(self) -> int:
        """The id that padding is written with; it is masked out."""
        return int(self.tokenizer.pad_token_id or 0)

    def _pad(self, ids: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """(ids, mask), both (n, length) int64 on the model's device, padded on the right. Few
        different lengths keep the CPU kernels' caches small.
        """
        longest = min(_rounded(max(map(len, ids))), longest_input(self.model))
        padded = torch.tensor([[*row, *[self._fill] * (longest - len(row))] for row in ids])
        mask = torch.arange(longest)[None, :] < torch.tensor([len(row) for row in ids])[:, None]
        return padded.to(self.device), mask.long().to(self.device)

    def embed(self, texts: Sequence[str], prompt: str = "", label: str = "") -> Embedded:
        """Vectors of `texts` in their order, float32, dropout off.

        Args:
            texts: any strings; each is embedded alone, after `prompt`.
            prompt: the role prompt of the usage (`query_prompt` or `document_prompt`) or "".
            label: name on the progress bar; empty for none.

        Raises:
            RunError: the model returns NaN or infinity, or memory is short.
        """
        parts, cut = [], 0
        was_training = self.model.training
        self.model.eval()
        try:
            bar = tqdm(total=len(texts), desc=label, unit="text", disable=not label)
            with errors.memory_named("--max-length"), torch.inference_mode(), bar:
                for ids, cut_here in self._tokenized_chunks(texts, prompt):
                    cut += cut_here
                    parts.append(self._embed_chunk(ids, bar))
        finally:
            self.model.train(was_training)
        vectors = torch.cat(parts) if parts else torch.empty(0, 0)
        if not torch.isfinite(vectors).all():
            raise RunError(
                f"model {self.name} returned vectors with NaN or infinity",
                "check its weights, and that it was not trained to divergence",
            )
        return Embedded(vectors, cut)

    def _tokenized_chunks(
        self, texts: Sequence[str], prompt: str
    ) -> Iterator[tuple[list[list[int]], int]]:
        """(token ids, how many texts were cut) of CHUNK_TEXTS texts at a time; the next chunk is
        tokenized while the model works on this one.
        """
        chunks = (
            [prompt + text for text in texts[start : start + CHUNK_TEXTS]]
            for start in range(0, len(texts), CHUNK_TEXTS)
        )
        with ThreadPoolExecutor(1) as ahead:
            coming = None
            for chunk in chunks:
                ready, coming = coming, ahead.submit(self._tokenize_counting, chunk)
                if ready is not None:
                    yield ready.result()
            if coming is not None:
                yield coming.result()

    def _tokenize_counting(self, texts: list[str]) -> tuple[list[list[int]], int]:
        """(token ids, how many texts were cut). Only texts that fill the maximum length are
        tokenized a second time, whole.
        """
        limit = self.usage.max_length
        ids = self.tokenize(texts, limit)
        full = [text for text, row in zip(texts, ids, strict=True) if len(row) >= limit]
        return ids, sum(len(row) > limit for row in self.tokenize(full, 10**9)) if full else 0

    def _embed_chunk(self, ids: list[list[int]], bar: tqdm[Any]) -> Tensor:
        order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
        vectors: Tensor | None = None
        for batch in _by_tokens(order, ids, BATCH_TOKENS[self.device.type]):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                rows = self.forward([ids[i] for i in batch])
            rows = rows.float().cpu()
            vectors = torch.empty(len(ids), rows.shape[1]) if vectors is None else vectors
            vectors[torch.tensor(batch)] = rows
            bar.update(len(batch))
        assert vectors is not None
        return vectors


def pool(hidden: Tensor, mask: Tensor, pooling: AnyPooling) -> Tensor:
    """(n, length, d) hidden states and (n, length) mask of right-padded texts -> (n, d) vectors.
    "mean" and "last" take left padding too.
    """
    if pooling == "cls":
        return hidden[:, 0]
    if pooling == "last":
        return hidden[
            torch.arange(len(hidden)),
            (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).argmax(dim=1),
        ]
    weights = mask[..., None].to(hidden.dtype)
    return (hidden * weights).sum(dim=1) / weights.sum(dim=1)


def _rounded(length: int) -> int:
    return -(-length // LENGTH_STEP) * LENGTH_STEP


def _by_tokens(
    order: Sequence[int], ids: Sequence[Sequence[int]], most: int
) -> Iterator[list[int]]:
    """Cut `order` (longest text first) into batches of at most `most` padded tokens, at least one
    text each.
    """
    batch: list[int] = []
    for i in order:
        if batch and (len(batch) + 1) * _rounded(len(ids[batch[0]])) > most:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def choose_device(device: Device) -> torch.device:
    """The device a setting names. UserError: "cuda" without a GPU that torch can use."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "--device cuda: torch finds no CUDA GPU",
            "use --device cpu, or install torch's CUDA build",
        )
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def uses_bf16(precision: Precision, device: torch.device) -> bool:
    """Whether to train under bf16 autocast: as asked, or where the hardware multiplies bf16
    natively (CUDA from compute capability 8; AVX512_BF16, AMX).
    """
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def longest_input(model: Any) -> int:
    """Tokens that a model's absolute position table allows; RoBERTa-like tables start after the
    padding id.
    """
    size = int(getattr(model.config, "max_position_embeddings", 0) or 10**9)
    # only models that number positions after it have it here
    padding = getattr(getattr(model, "embeddings", None), "padding_idx", None)
    return size if padding is None else size - (int(padding) + 1)

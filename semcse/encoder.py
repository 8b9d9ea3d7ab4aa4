"""Encoders: tokenize, pool, embed. This is the only pooling code of the project.

The vector of a text is the last hidden state of its first token ("cls", as in the authors' model
card) or the mean over its tokens ("mean"). Models that others trained may also use the last token
("last") or the output of the model's pooler layer ("pooler").
"""

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

CHUNK_TEXTS = 1024  # texts that are tokenized and sorted by length together
BATCH_TOKENS = {"cpu": 4096, "cuda": 65_536}  # tokens of one forward pass, padding included

# "own" is a pooling that only a model's own code computes. Such models are listed, but not run.
AnyPooling = Literal[Pooling, "last", "pooler", "own"]


@dataclass(frozen=True)
class Usage:
    """How a model's vectors are made and compared."""

    pooling: AnyPooling
    metric: Metric
    max_length: int  # longer texts are cut to this many tokens, special tokens included
    query_prompt: str = ""  # put in front of titles and queries
    document_prompt: str = ""  # put in front of abstracts and their halves
    normalize: bool = False  # scale vectors to length 1


@dataclass(frozen=True)
class Embedded:
    """Vectors (n, d) of n texts, float32 on the CPU, and how many texts were cut to fit."""

    vectors: Tensor
    cut: int


@dataclass
class Encoder:
    """A model with its tokenizer and usage."""

    name: str  # as the user gave it
    model: nn.Module
    tokenizer: Any
    usage: Usage
    bf16: bool = False  # embed under bf16 autocast instead of in float32
    # field of the usage -> where its value comes from ("flag", "semcse.json", "recipe", ...)
    origins: dict[str, str] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """The device of the model's weights."""
        return next(self.model.parameters()).device

    def tokenize(self, texts: Sequence[str], max_length: int) -> list[list[int]]:
        """Return the token ids of each text, with special tokens, cut to `max_length` tokens."""
        encoded = self.tokenizer(list(texts), truncation=True, max_length=max_length)
        return cast(list[list[int]], encoded["input_ids"])

    def forward(self, ids: Sequence[Sequence[int]]) -> Tensor:
        """Run the model on tokenized texts. Gradients flow if they are switched on.

        Args:
            ids: n lists of token ids, as `tokenize` returns them. The lengths may differ; padding
                changes no vector.

        Returns:
            Pooled vectors, (n, d).
        """
        if packed.supports(self.model):
            batch = packed.pack(ids, self._pad_id, self.device)
            groups = packed.hidden_states(self.model, batch)
            pooled = [self._pool(*group) for group in zip(groups, batch.masks, strict=True)]
            return torch.cat(pooled)[batch.order]
        return self.forward_padded(ids)

    def forward_padded(self, ids: Sequence[Sequence[int]]) -> Tensor:
        """Do the same as `forward` with the model's own forward pass, on one padded batch."""
        lengths = torch.tensor([len(row) for row in ids])
        # Rounded lengths, because CPU kernels are compiled and kept for each shape.
        longest = min(packed.padded_length(int(lengths.max())), longest_input(self.model))
        padded = torch.tensor([[*row, *[self._pad_id] * (longest - len(row))] for row in ids])
        mask = (torch.arange(longest) < lengths[:, None]).to(self.device)
        output = self.model(input_ids=padded.to(self.device), attention_mask=mask.long())
        return self._pool(output.last_hidden_state, mask)

    @property
    def _pad_id(self) -> int:
        return int(self.tokenizer.pad_token_id or 0)

    def _pool(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Turn hidden states (n, length, d) and a mask (n, length) into vectors (n, d)."""
        if self.usage.pooling == "pooler":
            vectors = cast(Tensor, self.model.pooler(hidden))  # type: ignore[operator]
        else:
            vectors = pool(hidden, mask, self.usage.pooling)
        return functional.normalize(vectors, dim=-1) if self.usage.normalize else vectors

    def embed(self, texts: Sequence[str], prompt: str = "", label: str = "") -> Embedded:
        """Embed texts without dropout. The vectors are in the order of the texts.

        Args:
            texts: Any strings. Each is embedded alone, with `prompt` in front of it.
            prompt: "", or one of the two prompts of the usage.
            label: The name on the progress bar; "" for no bar.

        Raises:
            RunError: The model returns NaN or infinity, or memory runs out.
        """
        chunks, cut = [], 0
        was_training = self.model.training
        self.model.eval()
        try:
            bar = tqdm(total=len(texts), desc=label, unit="text", disable=not label)
            with errors.memory_named("--max-length"), torch.inference_mode(), bar:
                for ids, cut_here in self._tokenized_chunks(texts, prompt):
                    chunks.append(self._embed_chunk(ids, bar))
                    cut += cut_here
        finally:
            self.model.train(was_training)
        vectors = torch.cat(chunks) if chunks else torch.empty(0, 0)
        if not torch.isfinite(vectors).all():
            what = f"model {self.name} returned vectors with NaN or infinity"
            raise RunError(what, "check its weights (its training may have diverged)")
        return Embedded(vectors, cut)

    def _tokenized_chunks(
        self, texts: Sequence[str], prompt: str
    ) -> Iterator[tuple[list[list[int]], int]]:
        """Yield `_tokenize_and_count` of CHUNK_TEXTS texts at a time. The next chunk is tokenized
        in the background while the caller runs the model.
        """
        with ThreadPoolExecutor(1) as background:
            next_chunk = None
            for start in range(0, len(texts), CHUNK_TEXTS):
                chunk = [prompt + text for text in texts[start : start + CHUNK_TEXTS]]
                ready, next_chunk = next_chunk, background.submit(self._tokenize_and_count, chunk)
                if ready is not None:
                    yield ready.result()
            if next_chunk is not None:
                yield next_chunk.result()

    def _tokenize_and_count(self, texts: list[str]) -> tuple[list[list[int]], int]:
        """Return token ids, and how many texts were cut. To count them, the texts that reach the
        maximum length are tokenized again without a limit.
        """
        limit = self.usage.max_length
        ids = self.tokenize(texts, limit)
        full = [text for text, row in zip(texts, ids, strict=True) if len(row) >= limit]
        return ids, sum(len(row) > limit for row in self.tokenize(full, 10**9)) if full else 0

    def _embed_chunk(self, ids: list[list[int]], bar: "tqdm[Any]") -> Tensor:
        """Return the vectors (n, d) of n tokenized texts, batched by length for speed."""
        vectors, order = [], []
        for batch in packed.split_by_tokens(ids, BATCH_TOKENS[self.device.type]):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                vectors.append(self.forward([ids[i] for i in batch]).float().cpu())
            order += batch
            bar.update(len(batch))
        return torch.cat(vectors)[torch.tensor(order).argsort()]


def pool(hidden: Tensor, mask: Tensor, pooling: AnyPooling) -> Tensor:
    """Turn hidden states into one vector for each text.

    Args:
        hidden: (n, length, d) last hidden states.
        mask: (n, length) bool, true at real tokens. "cls" needs padding on the right; "mean" and
            "last" accept padding on either side.
        pooling: "cls", "mean" or "last".

    Returns:
        (n, d) vectors.
    """
    if pooling == "cls":
        return hidden[:, 0]
    if pooling == "last":
        positions = torch.arange(mask.shape[1], device=mask.device)
        return hidden[torch.arange(len(hidden)), (mask * positions).argmax(dim=1)]
    weights = mask[..., None].to(hidden.dtype)
    return (hidden * weights).sum(dim=1) / weights.sum(dim=1)


def choose_device(device: Device) -> torch.device:
    """Return the device for a `--device` setting; "auto" takes a GPU if torch can use one."""
    has_gpu = torch.cuda.is_available()
    if device == "cuda" and not has_gpu:
        what = "--device cuda: torch finds no CUDA GPU"
        raise UserError(what, "use --device cpu, or install torch's CUDA build")
    return torch.device("cuda" if device != "cpu" and has_gpu else "cpu")


def uses_bf16(precision: Precision, device: torch.device) -> bool:
    """Return whether to compute under bf16 autocast. "auto" means: if the hardware multiplies bf16
    natively (GPUs of compute capability 8.0 or higher; CPUs with AVX512_BF16 or AMX).
    """
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def longest_input(model: Any) -> int:
    """Return how many tokens the model's table of absolute positions allows."""
    positions = getattr(model.config, "max_position_embeddings", 0) or 10**9
    return int(positions) - packed.first_position(model)

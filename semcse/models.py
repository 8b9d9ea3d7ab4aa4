"""How each known model is loaded, pooled, prompted and compared: the recipes, and who wins when
flag, model folder and recipe disagree.

The order is: flag > `semcse.json` in the model's folder > recipe here > the folder's
sentence-transformers files > settings. A flag that contradicts `semcse.json` is refused, because
such a model was trained for that metric and pooling; on any other model it is allowed, printed and
recorded.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import transformers

from semcse.adapters import add_adapter, select_task
from semcse.encoder import Encoder, Usage
from semcse.errors import UserError
from semcse.model_folder import (
    BUNDLED_HUB_ID,
    find_model,
    load_encoder,
    read_marker,
    read_sentence_transformers,
    small_files,
)
from semcse.types import Device, Metric, Pooling

log = logging.getLogger(__name__)


TRANSFORMERS_4 = "transformers==4.57.6"
# The one command that makes an environment for the models whose own code does not run on
# transformers 5.
MAKE_ENVIRONMENT = (
    "python3 -m venv .venv4 && .venv4/bin/pip install torch==2.13.0 numpy==2.4.6 tqdm==4.70.1"
    " tyro==1.0.17"
)


@dataclass(frozen=True)
class Recipe:
    """A model as its authors use it; the benchmark embeds texts alone, whatever `title_first` says.
    "unknown" is what no source we could read says.
    """

    hub_id: str
    usage: Usage
    source: str  # where the usage is known from, and what of it is not
    licence: str = "unknown"
    revision: str = "main"  # full commit hash where one is known to hold what the recipe needs
    remote_code: bool = False  # brings its own Python code
    environment: str = ""  # packages that it needs instead of requirements.txt's
    base: str = ""  # recipe of the model that it is an adapter of
    task: str = ""  # which of its own LoRA adapters is used
    title_first: bool = False  # a paper goes in as title, the tokenizer's separator, abstract
    # the paper's own table: mean ranks of titles, segments and queries; clustering
    published: tuple[float, float, float, float] | None = None


def _instruct(before_text: str) -> str:
    return (
        "Instruct: Given the title of a scientific paper or a search query, retrieve the abstract"
        f" of the paper\nQuery:{before_text}"
    )


# Recipe name -> recipe. Max length 512 where the authors name none. The wording of the task in
# instructions is ours.
RECIPES: dict[str, Recipe] = {
    "SemCSE": Recipe(
        "CLAUSE-Bielefeld/SemCSE",
        Usage("cls", "euclidean", 512),
        "model card; revision of a public reproduction",
        revision="d9b1d2858aafc41bc3061854332a490a41ada83e",
        published=(2.47, 2.68, 1.23, 0.739),
    ),
    "SemCSE_cosine": Recipe(
        "CLAUSE-Bielefeld/SemCSE_cosine",
        Usage("cls", "cosine", 512),
        "authors' main.py and public use; the card could not be read",
    ),
    "SciBERT": Recipe(
        "allenai/scibert_scivocab_uncased",
        Usage("cls", "euclidean", 512),
        "SciRepEval's convention; no official embedding recipe",
        title_first=True,
        published=(807.74, 214.37, 213.45, 0.569),
    ),
    "SciDeBERTa": Recipe(
        "KISTI-AI/Scideberta-full",
        Usage("cls", "euclidean", 512),
        "SciRepEval's convention; no official embedding recipe",
        "cc-by-2.0",
        title_first=True,
        published=(1479.09, 861.55, 2465.26, 0.46),
    ),
    "SPECTER": Recipe(
        "allenai/specter",
        Usage("cls", "euclidean", 512),
        "model card; metric as SciRepEval",
        title_first=True,
        published=(10.25, 12.23, 2.18, 0.692),
    ),
    "SciNCL": Recipe(
        "malteos/scincl",
        Usage("cls", "euclidean", 512),
        "model card; metric as SciRepEval, SemCSE's authors later took cosine",
        title_first=True,
        published=(5.68, 7.35, 2.29, 0.702),
    ),
    "SPECTER2_base": Recipe(
        "allenai/specter2_base",
        Usage("cls", "euclidean", 512),
        "model card; metric as SciRepEval; revision of public code",
        "apache-2.0",
        "3447645e1def9117997203454fa4495937bfbd83",
        title_first=True,
        published=(4.52, 5.1, 1.17, 0.666),
    ),
    "SPECTER2_proximity": Recipe(
        "allenai/specter2",
        Usage("cls", "euclidean", 512),
        "model card; metric as SciRepEval; revision of public code",
        "apache-2.0",
        "2081559630a80fc5851d8f798a05ba81e9468089",
        base="SPECTER2_base",
        title_first=True,
        published=(5.34, 5.8, 1.46, 0.666),
    ),
    "all-MiniLM-L6-v2": Recipe(
        BUNDLED_HUB_ID,
        Usage("mean", "cosine", 256, normalize=True),
        "its sentence-transformers files",
        "apache-2.0",
        published=(3.09, 8.19, 1.11, 0.73),
    ),
    "Jina-v2": Recipe(
        "jinaai/jina-embeddings-v2-base-en",
        Usage("mean", "cosine", 8192),
        "model card; revision as MTEB",
        "apache-2.0",
        "6e85f575bc273f1fd840a658067d0157933c83f0",
        remote_code=True,
        environment=TRANSFORMERS_4,
        published=(3.29, 8.77, 1.29, 0.703),
    ),
    "Jina-v3": Recipe(
        "jinaai/jina-embeddings-v3",
        Usage("mean", "cosine", 8192, normalize=True),
        "model card; revision as MTEB; the choice of the task is ours",
        "cc-by-nc-4.0",
        "215a6e121fa0183376388ac6b1ae230326bfeaed",
        remote_code=True,
        environment=f"{TRANSFORMERS_4} einops",
        task="text-matching",
        published=(3.45, 6.96, 1.01, 0.719),
    ),
    "SimCSE": Recipe(
        "princeton-nlp/sup-simcse-roberta-large",
        Usage("pooler", "cosine", 128),
        "authors' tool, its default length too; that the paper means sup- is a guess",
        published=(23.71, 44.24, 8.92, 0.696),
    ),
    "NV-Embed-v2": Recipe(
        "nvidia/NV-Embed-v2",
        Usage("own", "cosine", 32768, query_prompt=_instruct(" ")),
        "model card; revision as MTEB",
        "cc-by-nc-4.0",
        "7604d305b621f14095a1aa23d351674c2859553a",
        remote_code=True,
        environment="transformers==4.42.4",
        published=(3.38, 3.84, 1.02, 0.721),
    ),
    "granite-embedding-english-r2": Recipe(
        "ibm-granite/granite-embedding-english-r2",
        Usage("cls", "cosine", 8192),
        "model card; revision as MTEB",
        "apache-2.0",
        "6e7b8ce0e76270394ac4669ba4bbd7133b60b7f9",
    ),
    "gte-modernbert-base": Recipe(
        "Alibaba-NLP/gte-modernbert-base",
        Usage("cls", "cosine", 8192),
        "model card; revision of public code (MTEB's is gone)",
        "apache-2.0",
        "e7f32e3c00f91d699e8c43b53106206bcc72bb22",
    ),
    "SciEmbed": Recipe(
        "J0nasW/sciembed-full",
        Usage("mean", "cosine", 512),
        "its release; metric unsaid, so sentence-transformers' default",
        "mit",
    ),
    "Qwen3-Embedding-0.6B": Recipe(
        "Qwen/Qwen3-Embedding-0.6B",
        Usage("last", "cosine", 32768, query_prompt=_instruct("")),
        "model card; a revision whose tokenizer closes each text",
        "apache-2.0",
        "97b0c614be4d77ee51c0cef4e5f07c00f9eb65b3",
    ),
}


def list_of_models() -> str:
    """The recipes as an aligned table, one a line."""
    rows = [
        ("name", "id", "pooling", "metric", "max length", "remote code", "environment", "licence")
    ]
    for name, one in RECIPES.items():
        usage, code = one.usage, "yes" if one.remote_code else "no"
        rows.append(
            (
                name,
                one.hub_id,
                usage.pooling,
                usage.metric,
                str(usage.max_length),
                code,
                one.environment or "-",
                one.licence,
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


# How a model is used that says nothing of itself: as the method uses its own encoder.
DEFAULT_USAGE = Usage("cls", "euclidean", 512)


def find_recipe(name: str) -> Recipe | None:
    """The recipe that a recipe name (in any case) or a Hub id names; a model folder of that name
    comes first.
    """
    if (Path(name) / "config.json").is_file():
        return None
    return next(
        (
            recipe
            for known, recipe in RECIPES.items()
            if name.casefold() in (known.casefold(), recipe.hub_id.casefold())
        ),
        None,
    )


def title_separator(name: str, tokenizer: Any) -> str:
    """What stands between title and abstract where they are one text: the tokenizer's separator
    where the recipe says so, else a space as in MTEB.
    """
    recipe = find_recipe(name)
    return str(tokenizer.sep_token) if recipe and recipe.title_first else " "


def usage_of(
    name: str,
    pooling: Pooling | None = None,
    metric: Metric | None = None,
    max_length: int | None = None,
    *,
    default: Usage = DEFAULT_USAGE,
    trust_remote_code: bool = False,
) -> tuple[Usage, dict[str, str]]:
    """How a model shall be used, and where each part of that was read ("flag", "semcse.json",
    "recipe", "sentence-transformers files", "settings").

    A model that scales its vectors to length 1 and is switched to another metric by flag is
    compared by its raw vectors.

    Raises:
        UserError: the model cannot be found, needs another environment or --trust-remote-code, or a
            flag contradicts its semcse.json.
    """
    if recipe := find_recipe(name):
        _check_environment(name, recipe, trust_remote_code)
    asked = {"pooling": pooling, "metric": metric, "max_length": max_length}
    given = {key: value for key, value in asked.items() if value is not None}
    origin, own = _own_usage(name, given)
    for key in ("metric", "pooling") if origin == "semcse.json" else ():
        if given.get(key, own[key]) != own[key]:
            raise UserError(
                f"--{key} {given[key]} contradicts {name}, which was trained with {key} {own[key]} (its"
                " semcse.json)",
                f"leave --{key} out",
            )
    values = asdict(default) | own
    origins = dict.fromkeys(values, "settings") | dict.fromkeys(own, origin)
    for key, value in given.items():
        if key in own and own[key] != value:
            log.warning("%s: %s %s by flag instead of %s (%s)", name, key, value, own[key], origin)
            values["normalize"] = values["normalize"] and key != "metric"
        values[key], origins[key] = value, "flag"
    return Usage(**values), {key: origins[key] for key in ("pooling", "metric", "max_length")}


def _own_usage(name: str, given: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """(where it was read, fields of Usage) as the model itself or its recipe says; nothing for a
    model that says nothing.
    """
    recipe = find_recipe(name)
    folder = _small_files(name, recipe)
    marker = read_marker(folder) if folder else None
    if marker:
        return "semcse.json", marker
    if recipe:
        return "recipe", asdict(recipe.usage)
    assert folder
    return "sentence-transformers files", read_sentence_transformers(folder, given) or {}


def _small_files(name: str, recipe: Recipe | None) -> Path | None:
    """The folder of a model's JSON files; None for a recipe's model on the Hub, which is not asked:
    no published model has our marker.
    """
    source = find_model(_whole(recipe).hub_id if recipe else name)
    return None if recipe and not isinstance(source, Path) else small_files(source)


def _whole(recipe: Recipe) -> Recipe:
    """The recipe of the model to load: an adapter's base, or the recipe itself."""
    return RECIPES[recipe.base] if recipe.base else recipe


def _check_environment(name: str, recipe: Recipe, trust_remote_code: bool) -> None:
    """Refuse what cannot or may not run here, before anything is downloaded."""
    if recipe.usage.pooling == "own":
        what = (
            f"model {name} pools by its own code, which needs {recipe.environment} and is not run"
            " here"
        )
        raise UserError(what, f"embed with its authors' code, as the card of {recipe.hub_id} says")
    if recipe.environment and int(transformers.__version__.partition(".")[0]) > 4:
        what = (
            f"model {name} needs {recipe.environment}: its own code does not run on transformers"
            f" {transformers.__version__}"
        )
        raise UserError(
            what,
            f"run: {MAKE_ENVIRONMENT} {recipe.environment} ; then the same command with"
            " .venv4/bin/python and --trust-remote-code",
        )
    if recipe.remote_code and not trust_remote_code:
        raise UserError(
            f"model {name} brings its own Python code, without which its vectors are wrong",
            "give --trust-remote-code if you trust it",
        )


def load_model(
    name: str,
    pooling: Pooling | None = None,
    metric: Metric | None = None,
    max_length: int | None = None,
    *,
    default: Usage = DEFAULT_USAGE,
    device: Device = "auto",
    trust_remote_code: bool = False,
) -> Encoder:
    """Load a model by recipe name, Hub id or folder, and say where its usage was read (see
    `usage_of`).

    Raises:
        UserError: it cannot be used or loaded, or brings code that the settings do not allow.
    """
    usage, origins = usage_of(
        name, pooling, metric, max_length, default=default, trust_remote_code=trust_remote_code
    )
    encoder = _load(name, usage, device, trust_remote_code)
    encoder.origins = origins
    recipe = find_recipe(name)
    if recipe and recipe.base:
        add_adapter(encoder, recipe.hub_id, recipe.revision)
    if recipe and recipe.task:
        select_task(encoder, recipe.task)
    log.info(
        "%s: %s",
        name,
        ", ".join(
            f"{key} {getattr(encoder.usage, key)} ({origin})" for key, origin in origins.items()
        ),
    )
    return encoder


def _load(name: str, usage: Usage, device: Device, trust_remote_code: bool) -> Encoder:
    recipe = find_recipe(name)
    place = (_whole(recipe).hub_id, _whole(recipe).revision) if recipe else (name, "main")
    encoder = load_encoder(place[0], usage, device, trust_remote_code, place[1])
    encoder.name = name
    return encoder


def load_for_training(
    name: str, usage: Usage, device: Device = "auto", trust_remote_code: bool = False
) -> Encoder:
    """The encoder that training starts from, used as the settings say, whatever its authors'
    recipe.

    Raises:
        UserError: its semcse.json names another metric or pooling than the settings, or it cannot
            be trained so.
    """
    recipe = find_recipe(name)
    if recipe:
        _check_environment(name, recipe, trust_remote_code)
        if recipe.base:
            raise UserError(
                f"--encoder {name} is an adapter, which one trained folder cannot hold",
                f"give --encoder {recipe.base}",
            )
        if recipe.usage.pooling == "last" and usage.pooling == "cls":
            raise UserError(
                f"--pooling cls: {name} reads from left to right, so its first token knows nothing"
                " of the text",
                "give --pooling mean",
            )
    folder = _small_files(name, recipe)
    marker = read_marker(folder) if folder else None
    for key in ("metric", "pooling"):
        if marker and marker[key] != getattr(usage, key):
            what = (
                f"--{key} {getattr(usage, key)} contradicts {name}, which was trained with {key}"
                f" {marker[key]} (its semcse.json)"
            )
            raise UserError(what, f"give --{key} {marker[key]}")
    return _load(name, usage, device, trust_remote_code)

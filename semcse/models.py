"""How to use a model: the recipes of the published models (recipes.toml), and `load_model`.

`usage_of` has the order of precedence between flags, model folders and recipes.
"""

from __future__ import annotations

import logging
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_args

import transformers

from semcse.adapters import ADAPTER_FILES, add_adapter, select_task
from semcse.encoder import AnyPooling, Encoder, Usage
from semcse.errors import UserError
from semcse.model_folder import (
    fetch_from_hub,
    find_model,
    load_encoder,
    read_marker,
    read_sentence_transformers,
)
from semcse.types import Device, Metric, Pooling

log = logging.getLogger(__name__)

# Makes an environment for the models whose own code does not run on transformers 5.
MAKE_ENVIRONMENT = (
    "python3 -m venv .venv4 && .venv4/bin/pip install torch==2.13.0 numpy==2.4.6 tqdm==4.70.1"
    " tyro==1.0.17"
)
DEFAULT_USAGE = Usage("cls", "euclidean", 512)


@dataclass(frozen=True)
class Recipe:
    """How its authors use a model. The head of recipes.toml explains each field."""

    hub_id: str
    usage: Usage
    source: str
    licence: str = "unknown"
    revision: str = "main"
    remote_code: bool = False
    environment: str = ""
    base: str = ""
    task: str = ""
    title_first: bool = False
    # Mean ranks of title_abstract, abstract_segments and query; purity of clustering.
    published: tuple[float, float, float, float] | None = None


def read_recipes(path: Path) -> dict[str, Recipe]:
    """Read recipes from a TOML file: name -> recipe."""
    recipes = {}
    for name, table in tomllib.loads(path.read_text(encoding="utf-8")).items():
        usage = {
            field.name: table.pop(field.name) for field in fields(Usage) if field.name in table
        }
        if "published" in table:
            table["published"] = tuple(table["published"])
        recipes[name] = Recipe(usage=Usage(**usage), **table)
    return recipes


RECIPES = read_recipes(Path(__file__).with_name("recipes.toml"))


def list_of_models() -> str:
    """Return the recipes as an aligned table, one recipe per line."""
    head = "name", "id", "pooling", "metric", "max length", "remote code", "environment", "licence"
    rows = [head]
    for name, recipe in RECIPES.items():
        usage, code = recipe.usage, "yes" if recipe.remote_code else "no"
        how = usage.pooling, usage.metric, str(usage.max_length), code, recipe.environment or "-"
        rows.append((name, recipe.hub_id, *how, recipe.licence))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def find_recipe(name: str) -> Recipe | None:
    """Return the recipe with this name or Hub id (in upper or lower case), or None.

    A model folder of this name takes precedence: the answer is then None.
    """
    if (Path(name) / "config.json").is_file():
        return None
    for known, recipe in RECIPES.items():
        if name.casefold() in (known.casefold(), recipe.hub_id.casefold()):
            return recipe
    return None


def title_separator(name: str, tokenizer: Any) -> str:
    """Return what to put between a title and an abstract that are embedded as one text.

    This is the tokenizer's separator token if the recipe says so, and a space, as in MTEB, if not.
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
    """Return how to use a model. Each field comes from the first of these places that has it:

    1. a flag, that is an argument of this function. It is refused if it contradicts the pooling or
       the metric in semcse.json, for which the model was trained. On other models it is logged;
    2. `semcse.json` in the model's folder, which training writes;
    3. the model's recipe;
    4. the sentence-transformers files in the model's folder;
    5. `default`: CLS pooling and Euclidean distance, as in SemCSE's model card, and 512 tokens.

    If a flag replaces the metric of a model that scales its vectors to length 1, the vectors are no
    longer scaled.

    Returns:
        The usage, and where its pooling, metric and max_length come from: "flag", "semcse.json",
        "recipe", "sentence-transformers files" or "settings" (the default).

    Raises:
        UserError: the model cannot be found or read, or needs another environment or
            `trust_remote_code`, or an argument contradicts its semcse.json.
    """
    given = {"pooling": pooling, "metric": metric, "max_length": max_length}
    flags = {key: value for key, value in given.items() if value is not None}
    found: dict[str, Any]
    if recipe := find_recipe(name):
        _check_environment(name, recipe, trust_remote_code)
        origin, found = "recipe", asdict(recipe.usage)
    else:
        folder = _config_folder(name)
        if marker := read_marker(folder):
            _check_marker(name, marker, flags, "leave --{key} out")
            origin, found = "semcse.json", marker
        else:
            origin, found = "sentence-transformers files", read_sentence_transformers(folder)
    values = asdict(default) | found | flags
    for key, value in flags.items():
        if key in found and found[key] != value:
            log.warning(
                "%s: %s %s by flag instead of %s (%s)", name, key, value, found[key], origin
            )
            values["normalize"] = values["normalize"] and key != "metric"
    for key, allowed in (("pooling", get_args(AnyPooling)), ("metric", get_args(Metric))):
        if values[key] not in allowed:
            what = f"model {name}: this project cannot compute its {key} {values[key]} ({origin})"
            choices = " or ".join(get_args(Pooling if key == "pooling" else Metric))
            raise UserError(what, f"give --{key} {choices}")
    origins = dict.fromkeys(given, "settings") | dict.fromkeys(found, origin)
    origins |= dict.fromkeys(flags, "flag")
    return Usage(**values), {key: origins[key] for key in given}


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
    """Load any model that turns texts into vectors, to be used as its authors or its training say.

    The arguments take precedence over `semcse.json` in a model's folder, this over the recipe, the
    recipe over sentence-transformers files, and these over `default`.

    Args:
        name: a recipe (`python semantic_benchmark.py --list-models` prints them), a model folder
            such as "runs/quickstart-euclidean/model", or a Hub id such as "allenai/specter".
        pooling: "cls" or "mean", instead of the model's pooling.
        metric: "euclidean" or "cosine", instead of the model's metric.
        max_length: how many tokens to keep of each text, instead of the model's number.
        default: how to use a model about which nothing is known.
        device: "auto" takes a GPU where there is one.
        trust_remote_code: allow the model to run the Python code that it brings.

    Returns:
        An encoder. `encoder.usage` says how it is used and `encoder.origins` where this was read.

    Raises:
        UserError: the model cannot be found, loaded or used like this.

    Example:
        >>> from semcse import load_model
        >>> encoder = load_model("all-MiniLM-L6-v2")
        >>> encoder.embed(["Coral reefs recover.", "A tax on land."]).vectors.shape
        torch.Size([2, 384])
        >>> encoder.usage.metric
        'cosine'
    """
    usage, origins = usage_of(
        name, pooling, metric, max_length, default=default, trust_remote_code=trust_remote_code
    )
    encoder = _load(name, usage, device, trust_remote_code)
    encoder.origins = origins
    recipe = find_recipe(name)
    if recipe and recipe.base:
        add_adapter(encoder, fetch_from_hub(recipe.hub_id, ADAPTER_FILES, recipe.revision))
    if recipe and recipe.task:
        select_task(encoder, recipe.task)
    parts = [f"{key} {getattr(encoder.usage, key)} ({where})" for key, where in origins.items()]
    log.info("%s: %s", name, ", ".join(parts))
    return encoder


def load_for_training(
    name: str, usage: Usage, device: Device = "auto", trust_remote_code: bool = False
) -> Encoder:
    """Load the encoder that training starts from, to be used as `usage` says.

    Neither a recipe nor sentence-transformers files change the usage.

    Raises:
        UserError: the model cannot be loaded, its semcse.json names another metric or pooling, or
            it cannot be trained with this usage.
    """
    if recipe := find_recipe(name):
        _check_environment(name, recipe, trust_remote_code)
        if recipe.base:
            raise UserError(
                f"--encoder {name} is an adapter, and a trained folder cannot hold one",
                f"give --encoder {recipe.base}",
            )
        if recipe.usage.pooling == "last" and usage.pooling == "cls":
            raise UserError(
                f"--pooling cls: {name} reads from left to right, so its first token does not see"
                " the text",
                "give --pooling mean",
            )
    elif marker := read_marker(_config_folder(name)):
        _check_marker(name, marker, asdict(usage), "give --{key} {trained}")
    return _load(name, usage, device, trust_remote_code)


def _load(name: str, usage: Usage, device: Device, trust_remote_code: bool) -> Encoder:
    place, revision = name, "main"
    if recipe := find_recipe(name):
        recipe = RECIPES[recipe.base] if recipe.base else recipe
        place, revision = recipe.hub_id, recipe.revision
    encoder = load_encoder(place, usage, device, trust_remote_code, revision)
    encoder.name = name
    return encoder


def _config_folder(name: str) -> Path:
    """The folder with a model's JSON files, which are downloaded if the model is on the Hub."""
    source = find_model(name)
    if isinstance(source, Path):
        return source
    return fetch_from_hub(source, ["*.json", "1_Pooling/*.json"])


def _check_marker(name: str, marker: dict[str, Any], asked: Mapping[str, Any], fix: str) -> None:
    for key in ("metric", "pooling"):
        trained = marker[key]
        if asked.get(key, trained) != trained:
            raise UserError(
                f"--{key} {asked[key]} contradicts {name}, which was trained with {key} {trained}"
                " (its semcse.json)",
                fix.format(key=key, trained=trained),
            )


def _check_environment(name: str, recipe: Recipe, trust_remote_code: bool) -> None:
    """Refuse a model that cannot or may not run here, before anything is downloaded."""
    if recipe.usage.pooling == "own":
        raise UserError(
            f"model {name} pools by its own code, which needs {recipe.environment} and is not run"
            " here",
            f"embed with its authors' code, as the card of {recipe.hub_id} says",
        )
    if recipe.environment and int(transformers.__version__.partition(".")[0]) > 4:
        raise UserError(
            f"model {name} needs {recipe.environment}, because its code does not run on"
            f" transformers {transformers.__version__}",
            f"run: {MAKE_ENVIRONMENT} {recipe.environment} ; then the same command with"
            " .venv4/bin/python and --trust-remote-code",
        )
    if recipe.remote_code and not trust_remote_code:
        raise UserError(
            f"model {name} brings its own Python code, without which its vectors are wrong",
            "give --trust-remote-code if you trust it",
        )

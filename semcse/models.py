"""How to use a model: the recipes of the published models (recipes.toml), and `load_model`."""

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
    own_code_refused,
    read_marker,
    read_sentence_transformers,
)
from semcse.types import Device, Metric, Pooling

log = logging.getLogger(__name__)

# Command that makes an environment for the models whose own code does not run on transformers 5.
MAKE_ENVIRONMENT = (
    "python3 -m venv .venv4 && .venv4/bin/pip install torch==2.13.0 numpy==2.4.6 tqdm==4.70.1"
    " tyro==1.0.17"
)
DEFAULT_USAGE = Usage("cls", "euclidean", 512)


@dataclass(frozen=True)
class Recipe:
    """How the authors of a model use it. The head of recipes.toml explains each field."""

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
    published: tuple[float, float, float, float] | None = None


def read_recipes(path: Path) -> dict[str, Recipe]:
    """Read recipes from a TOML file: name -> recipe."""
    recipes, in_usage = {}, {field.name for field in fields(Usage)}
    for name, table in tomllib.loads(path.read_text(encoding="utf-8")).items():
        usage = {key: table.pop(key) for key in in_usage & set(table)}
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
    """Return what joins title and abstract: a space, as in MTEB, if no recipe says otherwise."""
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
    """Return how to use a model, and where its pooling, metric and max_length were read.

    Each field comes from the first of these places that has it:

    1. "flag": an argument of this function. It must not contradict the pooling or the metric in
       semcse.json, with which the model was trained. On other models a contradiction is logged;
    2. "semcse.json" in the model's folder, which training writes;
    3. "recipe", in recipes.toml;
    4. "sentence-transformers files" in the model's folder;
    5. "settings": `default`, which is CLS pooling and Euclidean distance, as in SemCSE's model
       card, and 512 tokens.
    """
    given = {"pooling": pooling, "metric": metric, "max_length": max_length}
    flags = {key: value for key, value in given.items() if value is not None}
    origin, found = _read_usage(name, trust_remote_code)
    if origin == "semcse.json":
        _check_marker(name, found, flags)
    values = asdict(default) | found | flags
    for key, value in flags.items():
        if found.get(key, value) != value:
            log.warning("%s: %s %s by flag, not %s (%s)", name, key, value, found[key], origin)
    # Vectors that were scaled to length 1 for one metric are compared unscaled by the other.
    if found and values["metric"] != found["metric"]:
        values["normalize"] = False
    for key, allowed in (("pooling", get_args(AnyPooling)), ("metric", get_args(Metric))):
        if values[key] not in allowed:
            what = f"model {name}: this project cannot compute its {key} {values[key]} ({origin})"
            raise UserError(what, f"choose another with --{key}")
    origins = dict.fromkeys(given, "settings") | dict.fromkeys(found, origin)
    origins |= dict.fromkeys(flags, "flag")
    return Usage(**values), {key: origins[key] for key in given}


def _read_usage(name: str, trust_remote_code: bool) -> tuple[str, dict[str, Any]]:
    """Return where the usage of a model is described, and the fields of Usage found there."""
    if recipe := find_recipe(name):
        _check_environment(name, recipe, trust_remote_code)
        return "recipe", asdict(recipe.usage)
    folder = _config_folder(name)
    if marker := read_marker(folder):
        return "semcse.json", marker
    return "sentence-transformers files", read_sentence_transformers(folder)


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
    """Load any model that turns texts into vectors, with the usage of its authors or its training.

    The encoder's `usage` says how it is used, and its `origins` where this was read.

    Args:
        name: A recipe (`python semantic_benchmark.py --list-models` prints them), a model folder
            such as "runs/quickstart-euclidean/model", or a Hub id such as "allenai/specter".
        pooling, metric, max_length: Replace the model's own values (see `usage_of`).
        default: How to use a model about which nothing is known.
        device: "auto" takes a GPU if there is one.
        trust_remote_code: Whether to run Python code that comes with the model.

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

    No recipe or file changes the usage, but a `semcse.json` must agree with it.
    """
    if recipe := find_recipe(name):
        _check_environment(name, recipe, trust_remote_code)
        if recipe.base:
            # A model folder cannot hold an adapter.
            raise UserError(f"--encoder {name} is an adapter", f"give --encoder {recipe.base}")
        if recipe.usage.pooling == "last" and usage.pooling == "cls":
            what = f"--pooling cls: {name} is a decoder, whose first token does not see the text"
            raise UserError(what, "give --pooling mean")
    elif marker := read_marker(_config_folder(name)):
        _check_marker(name, marker, asdict(usage))
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
    """Return the folder with a model's JSON files. Download them if the model is on the Hub."""
    source = find_model(name)
    if isinstance(source, str):
        return fetch_from_hub(source, ["*.json", "1_Pooling/*.json"])
    return source


def _check_marker(name: str, marker: dict[str, Any], asked: Mapping[str, Any]) -> None:
    """Refuse a metric or a pooling for which the model was not trained."""
    for key in ("metric", "pooling"):
        trained = marker[key]
        if asked.get(key, trained) != trained:
            what = f"--{key} {asked[key]} contradicts {name}: its semcse.json says {key} {trained}"
            raise UserError(what, f"give --{key} {trained}")


def _check_environment(name: str, recipe: Recipe, trust_remote_code: bool) -> None:
    """Refuse a model that cannot or may not run here, before anything is downloaded."""
    if recipe.usage.pooling == "own":
        what = f"model {name} pools by its own code, which needs {recipe.environment}"
        raise UserError(what, f"embed with its authors' code, as the card of {recipe.hub_id} says")
    if recipe.environment and int(transformers.__version__.partition(".")[0]) > 4:
        what = f"the code of model {name} does not run on transformers {transformers.__version__}"
        then = "then the same command with .venv4/bin/python and --trust-remote-code"
        raise UserError(what, f"run: {MAKE_ENVIRONMENT} {recipe.environment} ; {then}")
    if recipe.remote_code and not trust_remote_code:
        raise own_code_refused(name)

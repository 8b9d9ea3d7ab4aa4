"""How each known model is loaded, pooled, prompted and compared: the recipes, and who wins when flag, model folder and recipe disagree.

The order is: flag > `semcse.json` in the model's folder > recipe here > the folder's sentence-transformers files > settings. A flag that contradicts
`semcse.json` is refused, because such a model was trained for that metric and pooling; on any other model it is allowed, printed and recorded.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from encoder import BUNDLED_HUB_ID, Encoder, Usage, find_model, load_encoder, read_marker, read_sentence_transformers, small_files
from files import UserError
from settings import Metric, Pooling, Settings

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipe:
    """A model as its authors use it. `source` says where the recipe is known from."""

    hub_id: str
    usage: Usage
    source: str


# Recipe name -> recipe. Max length 512 where the authors name none.
RECIPES: dict[str, Recipe] = {
    "all-MiniLM-L6-v2": Recipe(BUNDLED_HUB_ID, Usage("mean", "cosine", 256, normalize=True), "its sentence-transformers files"),
    "SemCSE": Recipe("CLAUSE-Bielefeld/SemCSE", Usage("cls", "euclidean", 512), "model card"),
    "SemCSE_cosine": Recipe("CLAUSE-Bielefeld/SemCSE_cosine", Usage("cls", "cosine", 512), "public use; the card could not be read"),
    "SciBERT": Recipe("allenai/scibert_scivocab_uncased", Usage("cls", "euclidean", 512), "SciRepEval's convention; no official embedding recipe"),
    "SciDeBERTa": Recipe("KISTI-AI/Scideberta-full", Usage("cls", "euclidean", 512), "SciRepEval's convention; no official embedding recipe"),
    "SPECTER": Recipe("allenai/specter", Usage("cls", "euclidean", 512), "model card"),
    "SciNCL": Recipe("malteos/scincl", Usage("cls", "euclidean", 512), "model card; metric as SciRepEval"),
    "SPECTER2": Recipe("allenai/specter2_base", Usage("cls", "euclidean", 512), "model card; metric as SciRepEval"),
}


@dataclass(frozen=True)
class Wanted:
    """What the command line asks of a model's use; None leaves it to the model."""

    pooling: Pooling | None = None
    metric: Metric | None = None
    max_length: int | None = None

    def given(self) -> dict[str, Any]:
        """The flags that were given."""
        return {key: value for key, value in asdict(self).items() if value is not None}


def find_recipe(name: str) -> Recipe | None:
    """The recipe that a recipe name (in any case) or a Hub id names; a model folder of that name comes first."""
    if (Path(name) / "config.json").is_file():
        return None
    matches = [recipe for known, recipe in RECIPES.items() if name.casefold() in (known.casefold(), recipe.hub_id.casefold())]
    return matches[0] if matches else None


def usage_of(name: str, wanted: Wanted, settings: Settings) -> tuple[Usage, dict[str, str]]:
    """How a model shall be used, and where each part of that was read ("flag", "semcse.json", "recipe", "sentence-transformers files", "settings").

    A model that scales its vectors to length 1 and is switched to another metric by flag is compared by its raw vectors.

    Raises:
        UserError: the model cannot be found, or a flag contradicts its semcse.json.
    """
    origin, own = _own_usage(name, wanted)
    if origin == "semcse.json":
        _refuse_contradiction(name, own, wanted)
    values = asdict(Usage(settings.pooling, settings.metric, settings.max_length)) | own
    origins = dict.fromkeys(values, "settings") | dict.fromkeys(own, origin)
    for key, given in wanted.given().items():
        if key in own and own[key] != given:
            log.warning("%s: %s %s by flag instead of %s (%s)", name, key, given, own[key], origin)
            values["normalize"] = values["normalize"] and key != "metric"
        values[key], origins[key] = given, "flag"
    return Usage(**values), {key: origins[key] for key in ("pooling", "metric", "max_length")}


def _own_usage(name: str, wanted: Wanted) -> tuple[str, dict[str, Any]]:
    """(where it was read, fields of Usage) as the model itself or its recipe says; nothing for a model that says nothing."""
    recipe = find_recipe(name)
    source = find_model(recipe.hub_id if recipe else name)
    if recipe and not isinstance(source, Path):  # none of the published models has our marker: do not ask the Hub for it
        return "recipe", asdict(recipe.usage)
    folder = small_files(source)
    marker = read_marker(folder)
    if marker:
        return "semcse.json", marker
    if recipe:
        return "recipe", asdict(recipe.usage)
    return "sentence-transformers files", read_sentence_transformers(folder, wanted.given()) or {}


def _refuse_contradiction(name: str, marker: dict[str, Any], wanted: Wanted) -> None:
    for key in ("metric", "pooling"):
        given = wanted.given().get(key)
        if marker and given and given != marker[key]:
            raise UserError(f"--{key} {given} contradicts {name}, which was trained with {key} {marker[key]} (its semcse.json)", f"leave --{key} out")


def load_model(name: str, wanted: Wanted, settings: Settings) -> tuple[Encoder, dict[str, str]]:
    """Load a model by recipe name, Hub id or folder, and say where its usage was read (see `usage_of`)."""
    usage, origins = usage_of(name, wanted, settings)
    recipe = find_recipe(name)
    encoder = load_encoder(recipe.hub_id if recipe else name, usage, settings.device, settings.trust_remote_code)
    encoder.name = name
    log.info("%s: %s", name, ", ".join(f"{key} {getattr(encoder.usage, key)} ({origin})" for key, origin in origins.items()))
    return encoder, origins


def load_for_training(settings: Settings) -> Encoder:
    """The encoder that training starts from, used as the settings say, whatever its authors' recipe.

    Raises:
        UserError: its semcse.json names another metric or pooling than the settings.
    """
    recipe = find_recipe(settings.encoder)
    name = recipe.hub_id if recipe else settings.encoder
    marker = read_marker(small_files(find_model(name)))
    for key in ("metric", "pooling"):
        if marker and marker[key] != getattr(settings, key):
            what = f"--{key} {getattr(settings, key)} contradicts {settings.encoder}, which was trained with {key} {marker[key]} (its semcse.json)"
            raise UserError(what, f"give --{key} {marker[key]}")
    encoder = load_encoder(name, Usage(settings.pooling, settings.metric, settings.max_length), settings.device, settings.trust_remote_code)
    encoder.name = settings.encoder
    return encoder

"""How a model is to be used: who wins when flag, semcse.json, recipe, sentence-transformers files and settings disagree, and how each of them is read."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import sentence
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import modules as st_modules
from torch import Tensor

from baseline_models import RECIPES, Recipe, Wanted, find_recipe, load_for_training, load_model, usage_of
from encoder import Usage, find_model, load_encoder, read_sentence_transformers
from files import UserError
from settings import Metric, Pooling, Settings

TEXTS = [sentence(*range(3)), sentence(*range(30)), "", sentence(4), sentence(*range(2, 50))]
SETTINGS = Settings(device="cpu", pooling="cls", metric="euclidean", max_length=60)
# The layers under a flag, each with a maximum length of its own, by which it can be told.
FILES_USAGE = ("mean", "cosine", 50)
RECIPE_USAGE = ("cls", "cosine", 40)
MARKER_USAGE = ("mean", "euclidean", 30)


@pytest.fixture
def folder(tiny_bert: Path, tmp_path: Path) -> Path:
    """A copy of the tiny BERT: a bare model folder, to which a test adds files."""
    return Path(shutil.copytree(tiny_bert, tmp_path / "Some-Model"))


def write(folder: Path, **contents: object) -> None:
    """Write JSON files: `modules=[...]` becomes modules.json, a double underscore a folder."""
    for name, content in contents.items():
        path = folder / f"{name.replace('__', '/')}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def write_marker(folder: Path, **changes: object) -> None:
    """A semcse.json as training writes it."""
    pooling, metric, max_length = MARKER_USAGE
    usage = {"pooling": pooling, "metric": metric, "max_length": max_length, "query_prompt": "", "document_prompt": "", "normalize": False}
    write(folder, semcse={"format": 1, "base": "x"} | usage | changes)


def write_legacy_files(folder: Path, pooling: str = "mean", metric: str | None = "cosine", max_length: int | None = 50, normalize: bool = False) -> None:
    """The files that sentence-transformers 2 to 5 write."""
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling"), *([("2_Normalize", "Normalize")] if normalize else [])]
    modes = {f"pooling_mode_{mode}": mode == {"cls": "cls_token", "mean": "mean_tokens", "max": "max_tokens"}[pooling] for mode in LEGACY_MODES}
    write(
        folder,
        modules=[{"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"} for i, (path, kind) in enumerate(kinds)],
        config_sentence_transformers={"__version__": {"sentence_transformers": "2.2.2"}, **({"similarity_fn_name": metric} if metric else {})},
        sentence_bert_config={"do_lower_case": False, **({"max_seq_length": max_length} if max_length else {})},
    )
    write(folder, **{"1_Pooling__config": {"word_embedding_dimension": 32, **modes}})


LEGACY_MODES = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")


def write_installed_files(
    folder: Path, tiny_bert: Path, pooling: Any, *, max_length: int | None = None, middle: Any = None, normalize: bool = False, **options: Any
) -> None:
    """The files that the installed sentence-transformers writes."""
    transformer = st_modules.Transformer(str(tiny_bert))
    if max_length:
        transformer.max_seq_length = max_length
    parts = [transformer, st_modules.Pooling(32, pooling), *([middle] if middle else []), *([st_modules.Normalize()] if normalize else [])]
    SentenceTransformer(modules=parts, device="cpu", **options).save(str(folder))


def with_sentence_transformers(folder: Path, **options: Any) -> Tensor:
    vectors = SentenceTransformer(str(folder), device="cpu").encode(TEXTS, convert_to_tensor=True, show_progress_bar=False, **options)
    assert isinstance(vectors, Tensor)
    return vectors


def known_as(monkeypatch: pytest.MonkeyPatch, folder: Path) -> str:
    """Make `folder` a model with a recipe and return the recipe's name."""
    monkeypatch.setitem(RECIPES, "Known", Recipe(str(folder), Usage(*RECIPE_USAGE), "a test"))  # type: ignore[arg-type]
    return "Known"


def refuses(call: Callable[[], object], *words: str) -> None:
    """`call` ends with a UserError (exit 2) of one line that holds all `words`."""
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert caught.value.exit_code == 2
    assert "\n" not in message
    for word in words:
        assert word in message


# Who wins


@pytest.mark.parametrize(
    ("layers", "expected", "origin"),
    [
        ("", ("cls", "euclidean", 60), "settings"),
        ("files", FILES_USAGE, "sentence-transformers files"),
        ("files recipe", RECIPE_USAGE, "recipe"),
        ("files marker", MARKER_USAGE, "semcse.json"),
        ("files recipe marker", MARKER_USAGE, "semcse.json"),
    ],
)
def test_each_layer_overrides_those_below(monkeypatch: pytest.MonkeyPatch, folder: Path, layers: str, expected: tuple[Any, ...], origin: str) -> None:
    if "files" in layers:
        write_legacy_files(folder)
    if "marker" in layers:
        write_marker(folder)
    name = known_as(monkeypatch, folder) if "recipe" in layers else str(folder)
    usage, origins = usage_of(name, Wanted(), SETTINGS)
    assert (usage.pooling, usage.metric, usage.max_length) == expected
    assert origins == {"pooling": origin, "metric": origin, "max_length": origin}


@pytest.mark.parametrize("flags", [{"pooling": "mean"}, {"metric": "euclidean"}, {"max_length": 9}, {"pooling": "cls", "metric": "euclidean"}, {}])
@pytest.mark.parametrize("layer", ["settings", "files", "recipe"])
def test_a_flag_changes_its_own_field_only(monkeypatch: pytest.MonkeyPatch, folder: Path, layer: str, flags: dict[str, Any]) -> None:
    if layer == "files":
        write_legacy_files(folder, normalize=True)
    name = known_as(monkeypatch, folder) if layer == "recipe" else str(folder)
    without, origins_without = usage_of(name, Wanted(), SETTINGS)
    usage, origins = usage_of(name, Wanted(**flags), SETTINGS)
    for field in ("pooling", "metric", "max_length", "query_prompt", "document_prompt"):
        assert getattr(usage, field) == flags.get(field, getattr(without, field)), field
    assert usage.normalize == (without.normalize and usage.metric == without.metric), "vectors scaled for one metric are compared raw by another"
    assert origins == origins_without | dict.fromkeys(flags, "flag")


def test_one_file_leaves_what_it_does_not_say_to_the_settings(folder: Path) -> None:
    write_legacy_files(folder, max_length=None)
    usage, origins = usage_of(str(folder), Wanted(), SETTINGS)
    assert (usage.max_length, origins["max_length"], origins["pooling"]) == (60, "settings", "sentence-transformers files")


@pytest.mark.parametrize(("flag", "value", "trained"), [("metric", "cosine", "euclidean"), ("pooling", "cls", "mean")])
def test_a_flag_that_contradicts_the_marker_is_refused(folder: Path, flag: str, value: str, trained: str) -> None:
    write_marker(folder)
    for call in (usage_of, load_model):
        refuses(lambda call=call: call(str(folder), Wanted(**{flag: value}), SETTINGS), f"--{flag} {value}", str(folder), f"{flag} {trained}", "semcse.json")  # type: ignore[misc, arg-type]
    agreed, _ = usage_of(str(folder), Wanted(**{flag: trained}), SETTINGS)  # type: ignore[arg-type]
    assert agreed == usage_of(str(folder), Wanted(), SETTINGS)[0]


def test_a_shorter_length_is_no_contradiction(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_marker(folder)
    usage, origins = usage_of(str(folder), Wanted(max_length=9), SETTINGS)
    assert (usage.max_length, origins["max_length"], origins["pooling"]) == (9, "flag", "semcse.json")
    assert all(word in caplog.text for word in (str(folder), "max_length 9 by flag", "30", "semcse.json"))


def test_a_flag_on_a_recipe_model_is_logged_and_recorded(monkeypatch: pytest.MonkeyPatch, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    name = known_as(monkeypatch, folder)
    caplog.set_level(logging.INFO)
    model, origins = load_model(name, Wanted(pooling="mean", metric="cosine"), SETTINGS)  # the recipe says cls and, as the flag does, cosine
    assert origins == {"pooling": "flag", "metric": "flag", "max_length": "recipe"}
    assert (model.name, model.usage) == (name, Usage("mean", "cosine", 40))
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1, "a flag that changes nothing needs no warning"
    assert all(word in warnings[0] for word in (name, "pooling mean", "flag", "recipe", "cls"))
    assert f"{name}: pooling mean (flag), metric cosine (flag), max_length 40 (recipe)" in caplog.text
    assert torch.equal(model.embed(TEXTS).vectors, load_encoder(str(folder), Usage("mean", "cosine", 40), "cpu").embed(TEXTS).vectors)


def test_a_flag_over_the_bare_settings_is_no_warning(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A folder that says nothing of its use is contradicted by no flag."""
    usage, _ = usage_of(str(folder), Wanted(pooling="mean"), SETTINGS)
    assert usage.pooling == "mean"
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_the_length_is_that_of_the_model_in_the_end(folder: Path) -> None:
    """The tiny BERT has 64 positions: what is used and logged is what it can take."""
    model, origins = load_model(str(folder), Wanted(max_length=500), SETTINGS)
    assert (model.usage.max_length, origins["max_length"]) == (64, "flag")


# Recipes


@pytest.mark.parametrize("known", RECIPES)
def test_recipes_are_found_by_name_in_any_case_and_by_hub_id(known: str) -> None:
    recipe = RECIPES[known]
    spellings = [known, known.lower(), known.upper(), recipe.hub_id, recipe.hub_id.lower(), recipe.hub_id.upper()]
    assert [find_recipe(name) for name in spellings] == [recipe] * 6
    assert [find_recipe(name) for name in (f"{known}x", known[1:], f"other/{known}", "")] == [None] * 4


def test_recipes_are_those_of_the_models_authors() -> None:
    """Pooling and metric as published; only all-MiniLM scales its vectors."""
    cls = {name: recipe.usage.metric for name, recipe in RECIPES.items() if recipe.usage.pooling == "cls"}
    assert cls == dict.fromkeys(("SemCSE", "SciBERT", "SciDeBERTa", "SPECTER", "SciNCL", "SPECTER2"), "euclidean") | {"SemCSE_cosine": "cosine"}
    assert {name for name, recipe in RECIPES.items() if recipe.usage.normalize} == {"all-MiniLM-L6-v2"}
    assert all(recipe.usage.max_length == 512 for name, recipe in RECIPES.items() if name != "all-MiniLM-L6-v2")


def test_the_bundled_encoders_recipe_is_what_its_own_files_say() -> None:
    bundled = find_model("all-MiniLM-L6-v2")
    assert isinstance(bundled, Path)
    said = read_sentence_transformers(bundled)
    assert said is not None
    assert Usage(**said) == RECIPES["all-MiniLM-L6-v2"].usage


@pytest.mark.parametrize("name", ["all-MiniLM-L6-v2", "ALL-minilm-l6-V2", "sentence-transformers/all-MiniLM-L6-v2"])
def test_a_recipe_name_loads_its_model(name: str) -> None:
    model, origins = load_model(name, Wanted(), SETTINGS)
    assert (model.name, model.usage) == (name, Usage("mean", "cosine", 256, normalize=True))
    assert set(origins.values()) == {"recipe"}


@pytest.mark.parametrize("name", ["SPECTER", "allenai/specter"])
def test_a_recipe_model_out_of_reach_is_one_line(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    refuses(lambda: load_model(name, Wanted(), SETTINGS), "specter", "network")


# Folders with sentence-transformers' files


SPELLINGS = ["legacy", "installed"]
CASES = [("cls", "euclidean", False), ("mean", "cosine", False), ("mean", None, True), ("cls", "cosine", True)]


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize(("pooling", "metric", "normalize"), CASES)
def test_sentence_transformers_files_are_followed(
    folder: Path, tiny_bert: Path, spelling: str, pooling: Pooling, metric: Metric | None, normalize: bool
) -> None:
    """Read as they say (no similarity means cosine), with the vectors that sentence-transformers itself gives."""
    if spelling == "legacy":
        write_legacy_files(folder, pooling, metric, None, normalize)
    else:
        write_installed_files(folder, tiny_bert, pooling, normalize=normalize, similarity_fn_name=metric)
    said = read_sentence_transformers(folder)
    assert said is not None
    assert (said["pooling"], said["metric"], said["normalize"]) == (pooling, metric or "cosine", normalize)
    model, origins = load_model(str(folder), Wanted(), Settings(device="cpu", pooling="mean" if pooling == "cls" else "cls"))
    assert (origins["pooling"], origins["metric"]) == ("sentence-transformers files",) * 2
    vectors = model.embed(TEXTS).vectors
    torch.testing.assert_close(vectors, with_sentence_transformers(folder), rtol=0, atol=1e-5)
    assert bool(((vectors.norm(dim=1) - 1).abs() < 1e-5).all()) is normalize


# sentence-transformers before 6 writes the length into sentence_bert_config.json, 6 into tokenizer_config.json (`model_max_length`).
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_the_files_maximum_length_is_followed(folder: Path, tiny_bert: Path, spelling: str) -> None:
    if spelling == "legacy":
        write_legacy_files(folder, max_length=12)
    else:
        write_installed_files(folder, tiny_bert, "mean", max_length=12)
    model, origins = load_model(str(folder), Wanted(), SETTINGS)
    assert (model.usage.max_length, origins["max_length"]) == (12, "sentence-transformers files")
    found = model.embed(TEXTS)
    assert found.cut == 2
    torch.testing.assert_close(found.vectors, with_sentence_transformers(folder), rtol=0, atol=1e-5)


def test_the_files_prompts_are_followed(folder: Path, tiny_bert: Path) -> None:
    """A model that its authors use with role prompts is measured with them."""
    prompts = {"query": "market school ", "document": "theory "}
    write_installed_files(folder, tiny_bert, "mean", prompts=prompts)
    model, _ = load_model(str(folder), Wanted(), SETTINGS)
    assert (model.usage.query_prompt, model.usage.document_prompt) == ("market school ", "theory ")
    for role, prompt in prompts.items():
        torch.testing.assert_close(model.embed(TEXTS, prompt).vectors, with_sentence_transformers(folder, prompt_name=role), rtol=0, atol=1e-5)


def make_max_pooling(folder: Path, tiny_bert: Path) -> None:
    write_installed_files(folder, tiny_bert, "max", similarity_fn_name="euclidean")


def make_legacy_max_pooling(folder: Path, tiny_bert: Path) -> None:
    write_legacy_files(folder, pooling="max", metric="euclidean")


def make_two_poolings(folder: Path, tiny_bert: Path) -> None:
    write_installed_files(folder, tiny_bert, ("cls", "mean"), similarity_fn_name="euclidean")


def make_last_token(folder: Path, tiny_bert: Path) -> None:
    write_installed_files(folder, tiny_bert, "lasttoken", similarity_fn_name="euclidean")


def make_dot(folder: Path, tiny_bert: Path) -> None:
    write_installed_files(folder, tiny_bert, "mean", similarity_fn_name="dot")


def make_dense(folder: Path, tiny_bert: Path) -> None:
    write_installed_files(folder, tiny_bert, "mean", middle=st_modules.Dense(32, 16))


@pytest.mark.parametrize(
    ("make", "words", "one_flag"),
    [
        # the flag that the message asks for must be enough
        (make_max_pooling, ("--pooling",), {"pooling": "mean"}),
        (make_legacy_max_pooling, ("--pooling",), {"pooling": "mean"}),
        (make_two_poolings, ("--pooling",), {"pooling": "mean"}),
        (make_last_token, ("--pooling",), {"pooling": "mean"}),
        (make_dot, ("dot", "--metric"), {"metric": "euclidean"}),
        (make_dense, ("Dense",), {}),
    ],
)
def test_files_that_cannot_be_followed_are_refused_unless_flags_say(
    folder: Path, tiny_bert: Path, make: Callable[[Path, Path], None], words: tuple[str, ...], one_flag: dict[str, Any]
) -> None:
    make(folder, tiny_bert)
    refuses(lambda: usage_of(str(folder), Wanted(), SETTINGS), str(folder), *words)
    usage, origins = usage_of(str(folder), Wanted("mean", "euclidean"), SETTINGS)
    assert (usage.pooling, usage.metric, origins["pooling"], origins["metric"]) == ("mean", "euclidean", "flag", "flag")
    if one_flag:
        usage, _ = usage_of(str(folder), Wanted(**one_flag), SETTINGS)
        assert (usage.pooling, usage.metric) == ("mean", "euclidean")
    else:
        refuses(lambda: usage_of(str(folder), Wanted(pooling="mean"), SETTINGS), "Dense")


def test_a_folder_without_such_files_says_nothing(tiny_bert: Path) -> None:
    assert read_sentence_transformers(tiny_bert) is None


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("modules", "{"),
        ("modules", '[{"idx": 0}]'),
        ("modules", '{"0": "sentence_transformers.models.Transformer"}'),
        ("1_Pooling__config", "[]"),
        ("1_Pooling__config", "{}"),
        ("config_sentence_transformers", "[]"),
        ("config_sentence_transformers", '{"similarity_fn_name": "none"}'),
        ("config_sentence_transformers", '{"similarity_fn_name": ["cosine"]}'),
        ("sentence_bert_config", '{"max_seq_length": "many"}'),
        ("sentence_bert_config", '{"max_seq_length": -1}'),
        ("semcse", "{"),
        ("semcse", "[]"),
        ("semcse", '{"metric": "cosine"}'),
        ("semcse", '{"metric": "dot", "pooling": "cls", "max_length": 64}'),
        ("semcse", '{"metric": "cosine", "pooling": ["cls"], "max_length": 64}'),
        ("semcse", '{"metric": "cosine", "pooling": "cls", "max_length": "64"}'),
        ("semcse", '{"metric": "cosine", "pooling": "cls", "max_length": null}'),
        ("semcse", '{"metric": "cosine", "pooling": "cls", "max_length": 0}'),
        ("semcse", '{"metric": "cosine", "pooling": "cls", "max_length": 64, "query_prompt": 5}'),
        ("semcse", '{"metric": "cosine", "pooling": "cls", "max_length": 64, "normalize": "no"}'),
    ],
)
def test_spoiled_files_are_one_line_errors_that_name_the_file(folder: Path, name: str, content: str) -> None:
    write_legacy_files(folder)
    write(folder, **{name: content})
    refuses(lambda: load_model(str(folder), Wanted(), SETTINGS), str(folder), f"{name.replace('__', '/')}.json" if name != "modules" else "")


# The encoder that training starts from


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_training_uses_the_settings_whatever_the_recipe_says(metric: Metric) -> None:
    settings = Settings(device="cpu", encoder="all-minilm-l6-v2", pooling="cls", metric=metric, max_length=77)
    model = load_for_training(settings)
    assert (model.name, model.usage) == ("all-minilm-l6-v2", Usage("cls", metric, 77))


def test_training_ignores_sentence_transformers_files(folder: Path, tiny_bert: Path) -> None:
    make_dense(folder, tiny_bert)
    model = load_for_training(Settings(device="cpu", encoder=str(folder), pooling="cls", metric="euclidean", max_length=50))
    assert model.usage == Usage("cls", "euclidean", 50)


def test_training_on_from_a_model_of_another_metric_is_refused(folder: Path) -> None:
    """The metric that contradicts may be the settings' own line: the mend is to give the flag, with the model's value."""
    write_marker(folder)
    agreed = Settings(device="cpu", encoder=str(folder), pooling="mean", metric="euclidean", max_length=20)
    assert load_for_training(agreed).usage == Usage("mean", "euclidean", 20)
    refuses(lambda: load_for_training(Settings(encoder=str(folder), pooling="mean", metric="cosine")), str(folder), "cosine", "--metric euclidean")
    refuses(lambda: load_for_training(Settings(encoder=str(folder), pooling="cls")), str(folder), "cls", "--pooling mean")

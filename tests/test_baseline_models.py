"""How a model is to be used: who wins when flag, semcse.json, recipe, sentence-transformers files
and settings disagree, and how each of them is read.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import ROOT, sentence
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import modules as st_modules
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor

from semcse.encoder import AnyPooling, Encoder, Usage
from semcse.errors import UserError
from semcse.model_folder import find_model, load_encoder, read_sentence_transformers
from semcse.models import (
    MAKE_ENVIRONMENT,
    RECIPES,
    Recipe,
    Wanted,
    find_recipe,
    list_of_models,
    load_for_training,
    load_model,
    usage_of,
)
from semcse.types import Metric
from settings import Settings

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
        path.write_text(
            content if isinstance(content, str) else json.dumps(content), encoding="utf-8"
        )


def write_marker(folder: Path, **changes: object) -> None:
    """A semcse.json as training writes it."""
    pooling, metric, max_length = MARKER_USAGE
    usage = {
        "pooling": pooling,
        "metric": metric,
        "max_length": max_length,
        "query_prompt": "",
        "document_prompt": "",
        "normalize": False,
    }
    write(folder, semcse={"format": 1, "base": "x"} | usage | changes)


def write_legacy_files(
    folder: Path,
    pooling: str = "mean",
    metric: str | None = "cosine",
    max_length: int | None = 50,
    normalize: bool = False,
) -> None:
    """The files that sentence-transformers 2 to 5 write."""
    kinds = [
        ("", "Transformer"),
        ("1_Pooling", "Pooling"),
        *([("2_Normalize", "Normalize")] if normalize else []),
    ]
    chosen = {"cls": "cls_token", "mean": "mean_tokens", "last": "lasttoken", "max": "max_tokens"}[
        pooling
    ]
    modes = {f"pooling_mode_{mode}": mode == chosen for mode in LEGACY_MODES}
    write(
        folder,
        modules=[
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for i, (path, kind) in enumerate(kinds)
        ],
        config_sentence_transformers={
            "__version__": {"sentence_transformers": "2.2.2"},
            **({"similarity_fn_name": metric} if metric else {}),
        },
        sentence_bert_config={
            "do_lower_case": False,
            **({"max_seq_length": max_length} if max_length else {}),
        },
    )
    write(folder, **{"1_Pooling__config": {"word_embedding_dimension": 32, **modes}})


LEGACY_MODES = (
    "cls_token",
    "mean_tokens",
    "max_tokens",
    "mean_sqrt_len_tokens",
    "weightedmean_tokens",
    "lasttoken",
)


def write_installed_files(
    folder: Path,
    tiny_bert: Path,
    pooling: Any,
    *,
    max_length: int | None = None,
    middle: Any = None,
    normalize: bool = False,
    **options: Any,
) -> None:
    """The files that the installed sentence-transformers writes."""
    transformer = st_modules.Transformer(str(tiny_bert))
    if max_length:
        transformer.max_seq_length = max_length
    parts = [
        transformer,
        st_modules.Pooling(32, pooling),
        *([middle] if middle else []),
        *([st_modules.Normalize()] if normalize else []),
    ]
    SentenceTransformer(modules=parts, device="cpu", **options).save(str(folder))


def with_sentence_transformers(folder: Path, **options: Any) -> Tensor:
    vectors = SentenceTransformer(str(folder), device="cpu").encode(
        TEXTS, convert_to_tensor=True, show_progress_bar=False, **options
    )
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
def test_each_layer_overrides_those_below(
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    layers: str,
    expected: tuple[Any, ...],
    origin: str,
) -> None:
    if "files" in layers:
        write_legacy_files(folder)
    if "marker" in layers:
        write_marker(folder)
    name = known_as(monkeypatch, folder) if "recipe" in layers else str(folder)
    usage, origins = usage_of(name, Wanted(), SETTINGS)
    assert (usage.pooling, usage.metric, usage.max_length) == expected
    assert origins == {"pooling": origin, "metric": origin, "max_length": origin}


@pytest.mark.parametrize(
    "flags",
    [
        {"pooling": "mean"},
        {"metric": "euclidean"},
        {"max_length": 9},
        {"pooling": "cls", "metric": "euclidean"},
        {},
    ],
)
@pytest.mark.parametrize("layer", ["settings", "files", "recipe"])
def test_a_flag_changes_its_own_field_only(
    monkeypatch: pytest.MonkeyPatch, folder: Path, layer: str, flags: dict[str, Any]
) -> None:
    if layer == "files":
        write_legacy_files(folder, normalize=True)
    name = known_as(monkeypatch, folder) if layer == "recipe" else str(folder)
    without, origins_without = usage_of(name, Wanted(), SETTINGS)
    usage, origins = usage_of(name, Wanted(**flags), SETTINGS)
    for field in ("pooling", "metric", "max_length", "query_prompt", "document_prompt"):
        assert getattr(usage, field) == flags.get(field, getattr(without, field)), field
    assert usage.normalize == (without.normalize and usage.metric == without.metric), (
        "vectors scaled for one metric are compared raw by another"
    )
    assert origins == origins_without | dict.fromkeys(flags, "flag")


def test_one_file_leaves_what_it_does_not_say_to_the_settings(folder: Path) -> None:
    write_legacy_files(folder, max_length=None)
    usage, origins = usage_of(str(folder), Wanted(), SETTINGS)
    assert (usage.max_length, origins["max_length"], origins["pooling"]) == (
        60,
        "settings",
        "sentence-transformers files",
    )


@pytest.mark.parametrize(
    ("flag", "value", "trained"), [("metric", "cosine", "euclidean"), ("pooling", "cls", "mean")]
)
def test_a_flag_that_contradicts_the_marker_is_refused(
    folder: Path, flag: str, value: str, trained: str
) -> None:
    write_marker(folder)
    for call in (usage_of, load_model):
        wanted: Any = {flag: value}
        refuses(
            partial(call, str(folder), Wanted(**wanted), SETTINGS),
            f"--{flag} {value}",
            str(folder),
            f"{flag} {trained}",
            "semcse.json",
        )
    agreed, _ = usage_of(str(folder), Wanted(**{flag: trained}), SETTINGS)  # type: ignore[arg-type]
    assert agreed == usage_of(str(folder), Wanted(), SETTINGS)[0]


def test_a_shorter_length_is_no_contradiction(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_marker(folder)
    usage, origins = usage_of(str(folder), Wanted(max_length=9), SETTINGS)
    assert (usage.max_length, origins["max_length"], origins["pooling"]) == (
        9,
        "flag",
        "semcse.json",
    )
    assert all(
        word in caplog.text for word in (str(folder), "max_length 9 by flag", "30", "semcse.json")
    )


def test_a_flag_on_a_recipe_model_is_logged_and_recorded(
    monkeypatch: pytest.MonkeyPatch, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name = known_as(monkeypatch, folder)
    caplog.set_level(logging.INFO)
    # the recipe says cls and, as the flag does, cosine
    model, origins = load_model(name, Wanted(pooling="mean", metric="cosine"), SETTINGS)
    assert origins == {"pooling": "flag", "metric": "flag", "max_length": "recipe"}
    assert (model.name, model.usage) == (name, Usage("mean", "cosine", 40))
    warnings = [
        record.getMessage() for record in caplog.records if record.levelno == logging.WARNING
    ]
    assert len(warnings) == 1, "a flag that changes nothing needs no warning"
    assert all(word in warnings[0] for word in (name, "pooling mean", "flag", "recipe", "cls"))
    assert (
        f"{name}: pooling mean (flag), metric cosine (flag), max_length 40 (recipe)" in caplog.text
    )
    assert torch.equal(
        model.embed(TEXTS).vectors,
        load_encoder(str(folder), Usage("mean", "cosine", 40), "cpu").embed(TEXTS).vectors,
    )


def test_a_flag_over_the_bare_settings_is_no_warning(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
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
    spellings = [
        known,
        known.lower(),
        known.upper(),
        recipe.hub_id,
        recipe.hub_id.lower(),
        recipe.hub_id.upper(),
    ]
    assert [find_recipe(name) for name in spellings] == [recipe] * 6
    assert [find_recipe(name) for name in (f"{known}x", known[1:], f"other/{known}", "")] == [
        None
    ] * 4


def test_recipes_are_those_of_the_models_authors() -> None:
    """All systems of the paper's table, and today's choices: pooling and metric as published, role
    prompts, scaling, own code and environment.
    """
    uses: dict[tuple[str, str], set[str]] = {}
    for name, recipe in RECIPES.items():
        uses.setdefault((recipe.usage.pooling, recipe.usage.metric), set()).add(name)
    assert uses == {
        ("cls", "euclidean"): {
            "SemCSE",
            "SciBERT",
            "SciDeBERTa",
            "SPECTER",
            "SciNCL",
            "SPECTER2_base",
            "SPECTER2_proximity",
        },
        ("cls", "cosine"): {"SemCSE_cosine", "granite-embedding-english-r2", "gte-modernbert-base"},
        ("mean", "cosine"): {"all-MiniLM-L6-v2", "Jina-v2", "Jina-v3", "SciEmbed"},
        ("pooler", "cosine"): {"SimCSE"},
        ("last", "cosine"): {"Qwen3-Embedding-0.6B"},
        ("own", "cosine"): {"NV-Embed-v2"},
    }
    assert all(
        recipe.usage.max_length == 512
        for recipe in RECIPES.values()
        if recipe.usage.metric == "euclidean"
    )
    assert {name for name, recipe in RECIPES.items() if recipe.usage.normalize} == {
        "all-MiniLM-L6-v2",
        "Jina-v3",
    }
    assert {name for name, recipe in RECIPES.items() if recipe.usage.query_prompt} == {
        "Qwen3-Embedding-0.6B",
        "NV-Embed-v2",
    }
    assert not [name for name, recipe in RECIPES.items() if recipe.usage.document_prompt]
    own_code = {name for name, recipe in RECIPES.items() if recipe.remote_code}
    assert (
        own_code
        == {name for name, recipe in RECIPES.items() if recipe.environment}
        == {"Jina-v2", "Jina-v3", "NV-Embed-v2"}
    )


def test_pinned_revisions_are_full_commit_hashes() -> None:
    """The Hub takes no shortened ones."""
    pinned = {
        name: recipe.revision for name, recipe in RECIPES.items() if recipe.revision != "main"
    }
    assert len(pinned) == len(set(pinned.values())) > 5
    assert all(re.fullmatch("[0-9a-f]{40}", revision) for revision in pinned.values())


def test_the_list_of_models_is_an_aligned_table() -> None:
    head, *rows = list_of_models().splitlines()
    names = [
        "name",
        "id",
        "pooling",
        "metric",
        "max length",
        "remote code",
        "environment",
        "licence",
    ]
    starts = [head.index(name) for name in names]
    assert [name for name in names if re.search(rf"(^|  ){name}($|  )", head)] == names
    table = [
        [row[start:end].strip() for start, end in zip(starts, [*starts[1:], None], strict=True)]
        for row in rows
    ]
    assert table == [
        [
            name,
            recipe.hub_id,
            recipe.usage.pooling,
            recipe.usage.metric,
            str(recipe.usage.max_length),
            "yes" if recipe.remote_code else "no",
            recipe.environment or "-",
            recipe.licence,
        ]
        for name, recipe in RECIPES.items()
    ]


def test_the_bundled_encoders_recipe_is_what_its_own_files_say() -> None:
    bundled = find_model("all-MiniLM-L6-v2")
    assert isinstance(bundled, Path)
    said = read_sentence_transformers(bundled)
    assert said is not None
    assert Usage(**said) == RECIPES["all-MiniLM-L6-v2"].usage


@pytest.mark.parametrize(
    "name", ["all-MiniLM-L6-v2", "ALL-minilm-l6-V2", "sentence-transformers/all-MiniLM-L6-v2"]
)
def test_a_recipe_name_loads_its_model(name: str) -> None:
    model, origins = load_model(name, Wanted(), SETTINGS)
    assert (model.name, model.usage) == (name, Usage("mean", "cosine", 256, normalize=True))
    assert set(origins.values()) == {"recipe"}


@pytest.mark.parametrize("name", ["SPECTER", "allenai/specter"])
def test_a_recipe_model_out_of_reach_is_one_line(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    refuses(lambda: load_model(name, Wanted(), SETTINGS), "specter", "network")


# What is refused before anything is downloaded


@pytest.fixture
def no_download(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every way to the Hub ends the test."""

    def fetch(*words: object, **options: object) -> None:
        pytest.fail("asked the Hub")

    for place in (
        "snapshot_download",
        "AutoTokenizer.from_pretrained",
        "AutoModel.from_pretrained",
    ):
        monkeypatch.setattr(f"encoder.{place}", fetch)


def in_every_way(name: str, settings: Settings = SETTINGS) -> list[Callable[[], object]]:
    """A model's use, load and training, each to be called."""
    training = dataclasses.replace(settings, encoder=name)
    return [
        lambda: usage_of(name, Wanted(), settings),
        lambda: load_model(name, Wanted(), settings),
        lambda: load_for_training(training),
    ]


@pytest.mark.usefixtures("no_download")
@pytest.mark.parametrize("name", ["Jina-v2", "jinaai/jina-embeddings-v3"])
def test_models_for_transformers_4_are_refused_with_the_command_to_run(name: str) -> None:
    recipe = find_recipe(name)
    assert recipe
    for call in in_every_way(name, dataclasses.replace(SETTINGS, trust_remote_code=True)):
        refuses(
            call,
            name,
            "pip install torch==",
            f" {recipe.environment} ; then",
            ".venv4/bin/python",
            "--trust-remote-code",
        )


def test_the_environment_for_transformers_4_has_the_versions_of_this_one() -> None:
    pins = (ROOT / "requirements.txt").read_text(encoding="utf-8").split()
    named = re.findall(r"\S+==\S+", MAKE_ENVIRONMENT)
    assert {"torch", "numpy", "tqdm", "tyro"} == {pin.partition("==")[0] for pin in named}
    assert set(named) <= set(pins)


@pytest.mark.usefixtures("no_download")
@pytest.mark.parametrize("name", ["Jina-v2", "jinaai/jina-embeddings-v3"])
def test_remote_code_is_refused_in_the_right_environment_too(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(transformers, "__version__", "4.57.6")
    _, load, train = in_every_way(name)
    refuses(load, name, "--trust-remote-code")
    refuses(train, name, "--trust-remote-code")


@pytest.mark.usefixtures("no_download")
@pytest.mark.parametrize("version", ["5.23.0", "4.42.4"])
def test_a_model_that_pools_by_its_own_code_is_refused_everywhere(
    monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    monkeypatch.setattr(transformers, "__version__", version)
    for call in in_every_way("NV-Embed-v2", dataclasses.replace(SETTINGS, trust_remote_code=True)):
        refuses(call, "NV-Embed-v2", "transformers==4.42.4", "nvidia/NV-Embed-v2")


@pytest.mark.parametrize(
    ("name", "expected"),
    [("SemCSE", "SemCSE"), ("SPECTER", "SPECTER"), ("SPECTER2_proximity", "SPECTER2_base")],
)
def test_a_model_of_the_hub_is_asked_for_at_its_revision(
    monkeypatch: pytest.MonkeyPatch, name: str, expected: str
) -> None:
    """An adapter's base is the model to load, at the base's own revision."""
    asked = []

    def fetch(source: str, **options: Any) -> None:
        asked.append((source, options["revision"]))
        raise OSError("no network")

    monkeypatch.setattr("semcse.encoder.AutoTokenizer.from_pretrained", fetch)
    refuses(lambda: load_model(name, Wanted(), SETTINGS), "no network")
    assert asked == [(RECIPES[expected].hub_id, RECIPES[expected].revision)]


def test_an_adapter_of_the_hub_is_asked_for_at_its_own_revision(
    monkeypatch: pytest.MonkeyPatch, tiny_bert: Path
) -> None:
    asked = []

    def fetch(hub_id: str, allow_patterns: list[str], revision: str) -> None:
        asked.append((hub_id, revision))
        raise OSError

    monkeypatch.setattr("semcse.encoder.snapshot_download", fetch)
    monkeypatch.setitem(
        RECIPES,
        "SPECTER2_base",
        dataclasses.replace(RECIPES["SPECTER2_base"], hub_id=str(tiny_bert)),
    )
    refuses(
        lambda: load_model("SPECTER2_proximity", Wanted(), SETTINGS), "allenai/specter2", "network"
    )
    assert asked == [("allenai/specter2", RECIPES["SPECTER2_proximity"].revision)]


# Each recipe on a tiny random checkpoint with the files and layout of the published one, beside a
# plain computation of it


LONG = sentence(*range(150))


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, folder: Path, **changes: Any) -> Encoder:
    """The recipe `name` loaded from `folder` instead of from the Hub."""
    monkeypatch.setitem(
        RECIPES,
        name,
        dataclasses.replace(RECIPES[name], hub_id=str(folder), environment="", **changes),
    )
    model, origins = load_model(
        name, Wanted(), dataclasses.replace(SETTINGS, trust_remote_code=True)
    )
    assert set(origins.values()) == {"recipe"}
    return model


def write_bpe(folder: Path, special: Sequence[str]) -> Any:
    """A byte-level BPE tokenizer's vocab.json and merges.txt, special tokens first; returns it."""
    folder.mkdir()
    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [sentence(*range(40))],
        trainers.BpeTrainer(
            vocab_size=330, special_tokens=list(special), initial_alphabet=alphabet
        ),
    )
    tokenizer.model.save(str(folder))
    return tokenizer


SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}


def make(model_class: Any, config_class: Any, **options: Any) -> Any:
    """A random model in evaluation mode, its weights large enough for texts to differ clearly."""
    torch.manual_seed(0)
    return model_class(
        config_class(vocab_size=340, initializer_range=0.1, **SIZES, **options)
    ).eval()


def plain_model(model_class: Any, folder: Path) -> Any:
    """The reference: a class of transformers, in evaluation mode and float32."""
    return model_class.from_pretrained(folder, dtype=torch.float32).eval()


def plain_tokenizer(folder: Path, **options: Any) -> Any:
    return transformers.AutoTokenizer.from_pretrained(folder, **options)


@torch.no_grad()
def each_alone(
    model: Any, tokenizer: Any, texts: Sequence[str], length: int, pick: Callable[[Tensor], Tensor]
) -> Tensor:
    """`pick` of the last hidden states (tokens, d) of each text alone, so without any padding."""
    ids = [
        tokenizer(text, truncation=True, max_length=length, return_tensors="pt")["input_ids"]
        for text in texts
    ]
    return torch.stack([pick(model(input_ids=one).last_hidden_state[0]) for one in ids])


def check_vectors(model: Encoder, expected: Tensor, texts: Sequence[str], prompt: str = "") -> None:
    torch.testing.assert_close(model.embed(texts, prompt).vectors, expected, rtol=0, atol=1e-5)
    assert torch.cdist(expected, expected).fill_diagonal_(9).min() > 1e-3, (
        "the reference must tell the texts apart"
    )


def first(states: Tensor) -> Tensor:
    return states[0]


@pytest.mark.parametrize("name", ["SciBERT", "SPECTER", "SciNCL", "SPECTER2_base"])
def test_bert_as_pickled_weights_and_a_vocabulary(
    monkeypatch: pytest.MonkeyPatch, tiny_bert: Path, tmp_path: Path, name: str
) -> None:
    """config.json, pytorch_model.bin and vocab.txt are all there is; the tokenizer lower-cases by
    default.
    """
    folder = tmp_path / "bert"
    folder.mkdir()
    for file in ("config.json", "vocab.txt"):
        shutil.copy(tiny_bert / file, folder)
    plain = plain_model(transformers.BertModel, tiny_bert)
    torch.save(plain.state_dict(), folder / "pytorch_model.bin")
    texts = [*TEXTS, LONG, "Soil RIVER"]
    vocabulary = {word: i for i, word in enumerate((folder / "vocab.txt").read_text().splitlines())}
    expected = each_alone(plain, plain_tokenizer(tiny_bert), texts[:-1], 64, first)
    by_hand = (
        plain(
            input_ids=torch.tensor(
                [[vocabulary[word] for word in ("[CLS]", "soil", "river", "[SEP]")]]
            )
        )
        .last_hidden_state[0, :1]
        .detach()
    )
    check_vectors(stand_in(monkeypatch, name, folder), torch.cat([expected, by_hand]), texts)


@pytest.mark.parametrize("name", ["SemCSE", "SemCSE_cosine", "SciDeBERTa"])
def test_deberta_as_half_weights_and_a_sentencepiece_model(
    monkeypatch: pytest.MonkeyPatch, tiny_deberta: Path, name: str
) -> None:
    tokenizer = plain_tokenizer(tiny_deberta)
    plain = plain_model(transformers.DebertaV2Model, tiny_deberta)
    texts = [*TEXTS, sentence(*range(300))]
    check_vectors(
        stand_in(monkeypatch, name, tiny_deberta),
        each_alone(plain, tokenizer, texts, 512, first),
        texts,
    )


def test_roberta_with_its_pooler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """SimCSE: vocab.json, merges.txt and pickled weights; the vector is tanh(W h + b) of the first
    token's state h, cut at 128 tokens.
    """
    folder = tmp_path / "roberta"
    write_bpe(folder, ("<s>", "<pad>", "</s>", "<unk>", "<mask>"))
    plain = make(
        transformers.RobertaModel,
        transformers.RobertaConfig,
        max_position_embeddings=514,
        type_vocab_size=1,
        pad_token_id=1,
    )
    plain.config.save_pretrained(folder)
    torch.save(plain.state_dict(), folder / "pytorch_model.bin")
    texts = [*TEXTS, LONG]
    tokenizer = plain_tokenizer(folder)
    states = each_alone(plain, tokenizer, texts, 128, first)
    weight, bias = (
        plain.state_dict()["pooler.dense.weight"],
        plain.state_dict()["pooler.dense.bias"],
    )
    model = stand_in(monkeypatch, "SimCSE", folder)
    check_vectors(model, torch.tanh(states @ weight.T + bias), texts)
    longer = [len(tokenizer(text)["input_ids"]) > 128 for text in texts]
    assert model.embed(texts).cut == sum(longer) > 0


@pytest.mark.parametrize(
    "name", ["granite-embedding-english-r2", "gte-modernbert-base", "SciEmbed"]
)
def test_modernbert(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    """tokenizer.json and safetensors; layers with a window of 8 tokens between full ones, so that
    padding inside a window would show.
    """
    folder = tmp_path / "modernbert"
    tokenizer = write_bpe(folder, ("[CLS]", "[SEP]", "[PAD]", "[UNK]", "[MASK]"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 0), ("[SEP]", 1)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {
        f"{word}_token": f"[{word.upper()}]" for word in ("cls", "sep", "pad", "unk", "mask")
    }
    write(
        folder,
        tokenizer_config={
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": 8192,
            **special,
        },
    )
    ids = {
        "pad_token_id": 2,
        "cls_token_id": 0,
        "sep_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    plain = make(
        transformers.ModernBertModel,
        transformers.ModernBertConfig,
        max_position_embeddings=8192,
        local_attention=8,
        **ids,
    )
    plain.save_pretrained(folder)
    texts = [*TEXTS, sentence(*range(600))]
    pick = (lambda states: states.mean(dim=0)) if RECIPES[name].usage.pooling == "mean" else first
    fast: Any = transformers.PreTrainedTokenizerFast
    loaded = plain_model(transformers.ModernBertModel, folder)
    expected = each_alone(
        loaded,
        fast(tokenizer_object=tokenizer, **special),
        texts,
        RECIPES[name].usage.max_length,
        pick,
    )
    model = stand_in(monkeypatch, name, folder)
    check_vectors(model, expected, texts)
    assert model.embed(texts).cut == (name == "SciEmbed")


def test_decoder_with_the_last_token_and_an_instruction(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Qwen3: tokenizer.json closes each text with <|endoftext|>; the model card pads on the left
    and takes the last position. Queries only are instructed.
    """
    folder = tmp_path / "qwen"
    tokenizer = write_bpe(folder, ("<|endoftext|>", "<|im_end|>"))
    closed = processors.TemplateProcessing(
        single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", 0)]
    )
    tokenizer.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=False), closed]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    write(
        folder,
        tokenizer_config={
            "tokenizer_class": "Qwen2Tokenizer",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "model_max_length": 131072,
        },
    )
    make(
        transformers.Qwen3Model,
        transformers.Qwen3Config,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=32768,
    ).save_pretrained(folder)
    model = stand_in(monkeypatch, "Qwen3-Embedding-0.6B", folder)
    instruction = model.usage.query_prompt
    assert re.fullmatch(r"Instruct: .+\nQuery:", instruction)
    assert model.model(input_ids=torch.tensor([[5, 0]])).past_key_values is None, (
        "a cache for generation would fill the memory"
    )
    card = plain_tokenizer(folder, padding_side="left")
    plain = plain_model(transformers.Qwen3Model, folder)
    for prompt in ("", instruction):
        batch = card([prompt + text for text in TEXTS], padding=True, return_tensors="pt")
        assert batch["input_ids"][:, -1].tolist() == [0] * len(TEXTS), "the closing token"
        with torch.no_grad():
            check_vectors(model, plain(**batch).last_hidden_state[:, -1], TEXTS, prompt)


def with_own_code(folder: Path, tiny_bert: Path, body: str) -> Path:
    """A BERT folder whose model type, "bert", transformers knows too, but which brings its own
    model class, as Jina's do.
    """
    shutil.copytree(tiny_bert, folder)
    config = json.loads((folder / "config.json").read_text())
    write(
        folder,
        config=config
        | {"auto_map": {"AutoConfig": "own_jina.OwnConfig", "AutoModel": "own_jina.OwnModel"}},
    )
    head = (
        "import torch\nfrom transformers import BertConfig, BertModel\n\nclass"
        " OwnConfig(BertConfig):\n    pass\n\nclass OwnModel(BertModel):\n"
    )
    (folder / "own_jina.py").write_text(f"{head}    config_class = OwnConfig\n{body}")
    return folder


@pytest.fixture
def own_modules(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Models' own code is copied to a folder of the test's."""
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )


@pytest.mark.usefixtures("own_modules")
def test_own_code_is_what_makes_the_vectors(
    monkeypatch: pytest.MonkeyPatch, tiny_bert: Path, tmp_path: Path
) -> None:
    """Jina v2: mean pooling of what its own class returns."""
    body = """
    def forward(self, input_ids=None, attention_mask=None):
        output = super().forward(input_ids=input_ids, attention_mask=attention_mask)
        output.last_hidden_state = output.last_hidden_state * torch.arange(1, 33)
        return output
"""
    plain = plain_model(transformers.BertModel, tiny_bert)
    tokenizer = plain_tokenizer(tiny_bert)
    expected = each_alone(
        plain, tokenizer, TEXTS, 64, lambda states: states.mean(dim=0) * torch.arange(1, 33)
    )
    check_vectors(
        stand_in(monkeypatch, "Jina-v2", with_own_code(tmp_path / "jina", tiny_bert, body)),
        expected,
        TEXTS,
    )


LORA = """
    _adaptation_map = {"retrieval.query": 0, "retrieval.passage": 1, "separation": 2, "classification": 3, "text-matching": 4}

    def forward(self, input_ids=None, attention_mask=None, adapter_mask=None):
        output = super().forward(input_ids=input_ids, attention_mask=attention_mask)
        assert adapter_mask.dtype == torch.int32
        output.last_hidden_state = output.last_hidden_state * (adapter_mask[:, None, None] + torch.arange(32))
        return output
"""


@pytest.mark.usefixtures("own_modules")
def test_own_lora_adapter_is_switched_on(
    monkeypatch: pytest.MonkeyPatch, tiny_bert: Path, tmp_path: Path
) -> None:
    """Jina v3: `adapter_mask` names the task text-matching for each text; mean pooling, scaled to
    length 1.
    """
    plain = plain_model(transformers.BertModel, tiny_bert)
    pooled = each_alone(
        plain,
        plain_tokenizer(tiny_bert),
        TEXTS,
        64,
        lambda states: states.mean(dim=0) * torch.arange(4, 36),
    )
    folder = with_own_code(tmp_path / "jina", tiny_bert, LORA)
    check_vectors(
        stand_in(monkeypatch, "Jina-v3", folder), pooled / pooled.norm(dim=1, keepdim=True), TEXTS
    )
    refuses(lambda: stand_in(monkeypatch, "Jina-v3", tiny_bert), "Jina-v3", "text-matching")
    refuses(lambda: stand_in(monkeypatch, "Jina-v3", folder, task="no-such-task"), "no-such-task")


def test_an_adapter_stands_on_its_base(
    monkeypatch: pytest.MonkeyPatch, tiny_bert: Path, tmp_path: Path
) -> None:
    """SPECTER2's proximity adapter, here one that adds a constant b before each layer's last
    LayerNorm; both are found in folders.

    test_encoder.py compares adapters with the whole computation.
    """
    adapter = tmp_path / "adapter"
    write_zero_adapter(adapter, bias=torch.linspace(-0.2, 0.2, 32))
    plain = plain_model(transformers.BertModel, tiny_bert)
    for layer in plain.encoder.layer:
        layer.output.dense.bias.data += torch.linspace(-0.2, 0.2, 32)
    expected = each_alone(plain, plain_tokenizer(tiny_bert), TEXTS, 64, first)
    monkeypatch.setitem(
        RECIPES,
        "SPECTER2_base",
        dataclasses.replace(RECIPES["SPECTER2_base"], hub_id=str(tiny_bert)),
    )
    model = stand_in(monkeypatch, "SPECTER2_proximity", adapter)
    check_vectors(model, expected, TEXTS)
    assert model.name == "SPECTER2_proximity"
    base, _ = load_model("SPECTER2_base", Wanted(), SETTINGS)
    assert (base.embed(TEXTS).vectors - expected).abs().max() > 0.1, "the base alone must differ"


def write_zero_adapter(folder: Path, bias: Tensor) -> None:
    """An adapter for two layers that adds `bias` whatever its input."""
    folder.mkdir()
    write(
        folder,
        adapter_config={
            "config": {
                "non_linearity": "relu",
                "original_ln_before": True,
                "residual_before_ln": True,
            }
        },
    )
    zeros = {
        "down.0.weight": torch.zeros(2, 32),
        "down.0.bias": torch.zeros(2),
        "up.weight": torch.zeros(32, 2),
        "up.bias": bias,
    }
    weights = {
        f"bert.encoder.layer.{layer}.output.adapters.prx.adapter_{part}": tensor
        for layer in (0, 1)
        for part, tensor in zeros.items()
    }
    torch.save(weights, folder / "pytorch_adapter.bin")


# Folders with sentence-transformers' files


SPELLINGS = ["legacy", "installed"]
CASES = [
    ("cls", "euclidean", False),
    ("mean", "cosine", False),
    ("mean", None, True),
    ("cls", "cosine", True),
    ("last", "cosine", False),
]


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize(("pooling", "metric", "normalize"), CASES)
def test_sentence_transformers_files_are_followed(
    folder: Path,
    tiny_bert: Path,
    spelling: str,
    pooling: AnyPooling,
    metric: Metric | None,
    normalize: bool,
) -> None:
    """Read as they say (no similarity means cosine), with the vectors that sentence-transformers
    itself gives.
    """
    if spelling == "legacy":
        write_legacy_files(folder, pooling, metric, None, normalize)
    else:
        write_installed_files(
            folder,
            tiny_bert,
            "lasttoken" if pooling == "last" else pooling,
            normalize=normalize,
            similarity_fn_name=metric,
        )
    said = read_sentence_transformers(folder)
    assert said is not None
    assert (said["pooling"], said["metric"], said["normalize"]) == (
        pooling,
        metric or "cosine",
        normalize,
    )
    model, origins = load_model(
        str(folder), Wanted(), Settings(device="cpu", pooling="mean" if pooling == "cls" else "cls")
    )
    assert (origins["pooling"], origins["metric"]) == ("sentence-transformers files",) * 2
    vectors = model.embed(TEXTS).vectors
    torch.testing.assert_close(vectors, with_sentence_transformers(folder), rtol=0, atol=1e-5)
    assert bool(((vectors.norm(dim=1) - 1).abs() < 1e-5).all()) is normalize


# sentence-transformers before 6 writes the length into sentence_bert_config.json, 6 into
# tokenizer_config.json (`model_max_length`).
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
        torch.testing.assert_close(
            model.embed(TEXTS, prompt).vectors,
            with_sentence_transformers(folder, prompt_name=role),
            rtol=0,
            atol=1e-5,
        )


def make_max_pooling(folder: Path, tiny_bert: Path) -> None:
    write_installed_files(folder, tiny_bert, "max", similarity_fn_name="euclidean")


def make_legacy_max_pooling(folder: Path, tiny_bert: Path) -> None:
    write_legacy_files(folder, pooling="max", metric="euclidean")


def make_two_poolings(folder: Path, tiny_bert: Path) -> None:
    write_installed_files(folder, tiny_bert, ("cls", "mean"), similarity_fn_name="euclidean")


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
        (make_dot, ("dot", "--metric"), {"metric": "euclidean"}),
        (make_dense, ("Dense",), {}),
    ],
)
def test_files_that_cannot_be_followed_are_refused_unless_flags_say(
    folder: Path,
    tiny_bert: Path,
    make: Callable[[Path, Path], None],
    words: tuple[str, ...],
    one_flag: dict[str, Any],
) -> None:
    make(folder, tiny_bert)
    refuses(lambda: usage_of(str(folder), Wanted(), SETTINGS), str(folder), *words)
    usage, origins = usage_of(str(folder), Wanted("mean", "euclidean"), SETTINGS)
    assert (usage.pooling, usage.metric, origins["pooling"], origins["metric"]) == (
        "mean",
        "euclidean",
        "flag",
        "flag",
    )
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
def test_spoiled_files_are_one_line_errors_that_name_the_file(
    folder: Path, name: str, content: str
) -> None:
    write_legacy_files(folder)
    write(folder, **{name: content})
    refuses(
        lambda: load_model(str(folder), Wanted(), SETTINGS),
        str(folder),
        f"{name.replace('__', '/')}.json" if name != "modules" else "",
    )


# The encoder that training starts from


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_training_uses_the_settings_whatever_the_recipe_says(metric: Metric) -> None:
    settings = Settings(
        device="cpu", encoder="all-minilm-l6-v2", pooling="cls", metric=metric, max_length=77
    )
    model = load_for_training(settings)
    assert (model.name, model.usage) == ("all-minilm-l6-v2", Usage("cls", metric, 77))


def test_training_ignores_sentence_transformers_files(folder: Path, tiny_bert: Path) -> None:
    make_dense(folder, tiny_bert)
    model = load_for_training(
        Settings(
            device="cpu", encoder=str(folder), pooling="cls", metric="euclidean", max_length=50
        )
    )
    assert model.usage == Usage("cls", "euclidean", 50)


def test_training_on_from_a_model_of_another_metric_is_refused(folder: Path) -> None:
    """The metric that contradicts may be the settings' own line: the mend is to give the flag, with
    the model's value.
    """
    write_marker(folder)
    agreed = Settings(
        device="cpu", encoder=str(folder), pooling="mean", metric="euclidean", max_length=20
    )
    assert load_for_training(agreed).usage == Usage("mean", "euclidean", 20)
    refuses(
        lambda: load_for_training(Settings(encoder=str(folder), pooling="mean", metric="cosine")),
        str(folder),
        "cosine",
        "--metric euclidean",
    )
    refuses(
        lambda: load_for_training(Settings(encoder=str(folder), pooling="cls")),
        str(folder),
        "cls",
        "--pooling mean",
    )


def test_training_needs_a_model_that_can_be_trained_so(
    monkeypatch: pytest.MonkeyPatch, tiny_bert: Path
) -> None:
    """A folder cannot hold an adapter, and a decoder's first token has seen nothing of the text."""
    refuses(
        lambda: load_for_training(Settings(encoder="SPECTER2_proximity")),
        "SPECTER2_proximity",
        "--encoder SPECTER2_base",
    )
    refuses(
        lambda: load_for_training(Settings(encoder="Qwen/Qwen3-Embedding-0.6B")),
        "--pooling cls",
        "--pooling mean",
    )
    monkeypatch.setitem(
        RECIPES,
        "Qwen3-Embedding-0.6B",
        dataclasses.replace(RECIPES["Qwen3-Embedding-0.6B"], hub_id=str(tiny_bert)),
    )
    assert (
        load_for_training(
            Settings(encoder="Qwen3-Embedding-0.6B", pooling="mean", device="cpu")
        ).usage.pooling
        == "mean"
    )

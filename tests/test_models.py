"""Recipes, the order of precedence of flag, semcse.json, recipe, sentence-transformers files and
default, and each recipe against a plain computation on a tiny model of the same kind.
"""

from __future__ import annotations

import dataclasses
import doctest
import functools
import json
import logging
import pydoc
import re
import shutil
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import transformers
from conftest import ROOT, run_script, sentence
from model_files import (
    TEXTS,
    close,
    embed_each,
    first,
    make_model,
    mean,
    plain_model,
    plain_tokenizer,
    refuses,
    with_sentence_transformers,
    write,
    write_adapter,
    write_bpe,
    write_legacy_files,
    write_roberta,
)
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import modules as st_modules
from tokenizers import processors
from torch import Tensor

import semcse
from semcse.adapters import add_adapter
from semcse.encoder import AnyPooling, Encoder, Usage
from semcse.model_folder import find_model, load_encoder, read_sentence_transformers
from semcse.models import (
    MAKE_ENVIRONMENT,
    RECIPES,
    Recipe,
    find_recipe,
    list_of_models,
    load_for_training,
    load_model,
    title_separator,
    usage_of,
)
from semcse.types import Metric, Pooling

# Each source has a maximum length of its own, which shows where a usage was read.
DEFAULT = Usage("cls", "euclidean", 60)
FILES_USAGE = Usage("mean", "cosine", 50)
RECIPE_USAGE = Usage("cls", "cosine", 40)
MARKER_USAGE = Usage("mean", "euclidean", 30)


@pytest.fixture
def folder(tiny_bert: Path, tmp_path: Path) -> Path:
    """A copy of the tiny BERT, to which a test adds files."""
    return Path(shutil.copytree(tiny_bert, tmp_path / "Some-Model"))


def write_marker(folder: Path) -> None:
    write(folder, semcse={"format": 1, "base": "x"} | dataclasses.asdict(MARKER_USAGE))


def with_recipe(monkeypatch: pytest.MonkeyPatch, folder: Path) -> str:
    """Add a recipe for the model in `folder`, and return the recipe's name."""
    monkeypatch.setitem(RECIPES, "Known", Recipe(str(folder), RECIPE_USAGE, "a test"))
    return "Known"


def write_installed_files(
    folder: Path, pooling: Any, middle: Any = None, normalize: bool = False, **options: Any
) -> None:
    """The files that the installed sentence-transformers writes."""
    transformer = st_modules.Transformer(str(folder))
    if "max_length" in options:
        transformer.max_seq_length = options.pop("max_length")
    parts = [transformer, st_modules.Pooling(32, pooling)]
    parts += [middle] if middle else []
    parts += [st_modules.Normalize()] if normalize else []
    SentenceTransformer(modules=parts, device="cpu", **options).save(str(folder))


# The order of precedence


@pytest.mark.parametrize(
    ("sources", "expected", "origin"),
    [
        ("", DEFAULT, "settings"),
        ("files", FILES_USAGE, "sentence-transformers files"),
        ("files recipe", RECIPE_USAGE, "recipe"),
        ("files marker", MARKER_USAGE, "semcse.json"),
    ],
)
def test_each_source_takes_precedence_over_those_below(
    monkeypatch: pytest.MonkeyPatch, folder: Path, sources: str, expected: Usage, origin: str
) -> None:
    if "files" in sources:
        write_legacy_files(folder)
    if "marker" in sources:
        write_marker(folder)
    name = with_recipe(monkeypatch, folder) if "recipe" in sources else str(folder)
    usage, origins = usage_of(name, default=DEFAULT)
    assert usage == expected
    assert origins == {"pooling": origin, "metric": origin, "max_length": origin}


@pytest.mark.parametrize(
    "flags",
    [{"pooling": "mean"}, {"metric": "euclidean"}, {"max_length": 9}, {"metric": "cosine"}, {}],
)
@pytest.mark.parametrize("source", ["default", "files", "recipe"])
def test_a_flag_changes_only_its_field(
    monkeypatch: pytest.MonkeyPatch, folder: Path, source: str, flags: dict[str, Any]
) -> None:
    if source == "files":
        write_legacy_files(folder, normalize=True)
    name = with_recipe(monkeypatch, folder) if source == "recipe" else str(folder)
    without, origins_without = usage_of(name)
    usage, origins = usage_of(name, **flags)
    # Vectors that were scaled for one metric are compared unscaled by the other.
    scaled = without.normalize and usage.metric == without.metric
    assert usage == dataclasses.replace(without, **flags, normalize=scaled)
    assert origins == origins_without | dict.fromkeys(flags, "flag")


def test_what_the_files_do_not_say_comes_from_the_default(folder: Path) -> None:
    write_legacy_files(folder, max_length=None)
    usage, origins = usage_of(str(folder), default=DEFAULT)
    assert (usage.max_length, origins["max_length"]) == (60, "settings")
    assert (usage.pooling, origins["pooling"]) == ("mean", "sentence-transformers files")


@pytest.mark.parametrize(
    ("flag", "value", "trained"), [("metric", "cosine", "euclidean"), ("pooling", "cls", "mean")]
)
def test_a_flag_that_contradicts_semcse_json_is_refused(
    folder: Path, flag: str, value: str, trained: str
) -> None:
    write_marker(folder)
    words = (f"--{flag} {value}", str(folder), f"{flag} {trained}", "semcse.json")
    for call in (usage_of, load_model):
        contradicting: Any = {flag: value}
        refuses(functools.partial(call, str(folder), **contradicting), *words)
    agreeing: Any = {flag: trained}
    assert usage_of(str(folder), **agreeing)[0] == MARKER_USAGE


def test_a_shorter_length_does_not_contradict_semcse_json(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_marker(folder)
    usage, origins = usage_of(str(folder), max_length=9)
    assert usage == dataclasses.replace(MARKER_USAGE, max_length=9)
    assert (origins["max_length"], origins["pooling"]) == ("flag", "semcse.json")
    assert f"{folder}: max_length 9 by flag, not 30 (semcse.json)" in caplog.text


def test_a_flag_on_a_recipe_is_logged_and_recorded(
    monkeypatch: pytest.MonkeyPatch, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name = with_recipe(monkeypatch, folder)
    caplog.set_level(logging.INFO)
    model = load_model(name, pooling="mean", metric="cosine", device="cpu")
    assert model.origins == {"pooling": "flag", "metric": "flag", "max_length": "recipe"}
    assert (model.name, model.usage) == (name, Usage("mean", "cosine", 40))
    # The flag that changes nothing, --metric cosine, needs no warning.
    assert [one.getMessage() for one in caplog.records if one.levelno == logging.WARNING] == [
        f"{name}: pooling mean by flag, not cls (recipe)"
    ]
    used = f"{name}: pooling mean (flag), metric cosine (flag), max_length 40 (recipe)"
    assert used in caplog.text
    expected = load_encoder(str(folder), Usage("mean", "cosine", 40), "cpu").embed(TEXTS)
    assert torch.equal(model.embed(TEXTS).vectors, expected.vectors)


def test_a_flag_over_the_default_is_no_warning(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert usage_of(str(folder), "mean")[0].pooling == "mean"
    assert not [one for one in caplog.records if one.levelno >= logging.WARNING]


def test_the_length_is_the_one_that_the_model_can_take(folder: Path) -> None:
    """The tiny BERT has 64 positions."""
    model = load_model(str(folder), max_length=500, device="cpu")
    assert (model.usage.max_length, model.origins["max_length"]) == (64, "flag")


# recipes.toml


def test_every_table_of_the_recipe_file_is_valid() -> None:
    """Its keys are those that the head of the file explains, and its values have their types."""
    text = (ROOT / "semcse" / "recipes.toml").read_text(encoding="utf-8")
    explained = re.findall(r"^# (\w+) {2,}", text, flags=re.MULTILINE)
    tables = tomllib.loads(text)
    assert list(RECIPES) == list(tables)
    assert {key for table in tables.values() for key in table} <= set(explained)
    types: dict[str, type] = {"max_length": int, "published": list}
    types |= dict.fromkeys(("normalize", "title_first", "remote_code"), bool)
    for name, table in tables.items():
        assert {"hub_id", "pooling", "metric", "max_length", "source"} <= set(table), name
        assert table["pooling"] in get_args(AnyPooling), name
        assert table["metric"] in get_args(Metric), name
        assert table["max_length"] >= 128, name
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", table["hub_id"]), name
        # The Hub does not take shortened hashes.
        assert re.fullmatch("[0-9a-f]{40}", table.get("revision", "0" * 40)), name
        assert table.get("base", name) in tables, name
        assert ("environment" in table) == table.get("remote_code", False), name
        assert [key for key in table if type(table[key]) is not types.get(key, str)] == [], name
        assert len(table.get("published", range(4))) == 4, name
    assert len({table["hub_id"] for table in tables.values()}) == len(tables)


@pytest.mark.parametrize("known", RECIPES)
def test_recipes_are_found_by_name_and_by_hub_id_in_any_case(known: str) -> None:
    recipe = RECIPES[known]
    for name in (known, recipe.hub_id):
        assert [find_recipe(one) for one in (name, name.lower(), name.upper())] == [recipe] * 3
    for name in (f"{known}x", known[1:], f"other/{known}", ""):
        assert find_recipe(name) is None


def test_a_model_folder_takes_precedence_over_a_recipe_of_its_name(
    monkeypatch: pytest.MonkeyPatch, tiny_bert: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_bert, tmp_path / "SciBERT")
    monkeypatch.chdir(tmp_path)
    assert find_recipe("SciBERT") is None
    assert load_model("SciBERT", device="cpu").origins["pooling"] == "settings"


def test_the_list_of_models_is_an_aligned_table() -> None:
    head, *rows = list_of_models().splitlines()
    names = re.split(" {2,}", head)
    assert names == [
        *("name", "id", "pooling", "metric", "max length", "remote code", "environment", "licence")
    ]
    starts = [0, *(head.index(f"  {name}") + 2 for name in names[1:])]
    for row, (name, recipe) in zip(rows, RECIPES.items(), strict=True):
        ends = [*starts[1:], None]
        cells = [row[start:end].strip() for start, end in zip(starts, ends, strict=True)]
        usage, code = recipe.usage, "yes" if recipe.remote_code else "no"
        how = [usage.pooling, usage.metric, str(usage.max_length), code, recipe.environment or "-"]
        assert cells == [name, recipe.hub_id, *how, recipe.licence]


def test_the_recipe_of_the_bundled_encoder_is_what_its_files_say() -> None:
    bundled = find_model("all-MiniLM-L6-v2")
    assert isinstance(bundled, Path)
    assert Usage(**read_sentence_transformers(bundled)) == RECIPES["all-MiniLM-L6-v2"].usage


def test_the_bundled_encoder_equals_sentence_transformers() -> None:
    long = "A tax on land shifts the burden from tenants to owners. " * 60
    texts = [
        "The reef recovered within a decade once grazing fish had returned.",
        "Coral cover rebounded after herbivores came back.",
        "",
        "\ufb01ne-grained \u2464 na\u00efve caf\u00e9 \u2026 \u571f\u58cc",
        long,
    ]
    bundled = find_model("all-MiniLM-L6-v2")
    assert isinstance(bundled, Path)
    for name in ("ALL-minilm-l6-V2", "sentence-transformers/all-MiniLM-L6-v2"):
        model = load_model(name, device="cpu")
        assert (model.name, model.usage) == (name, Usage("mean", "cosine", 256, normalize=True))
        assert set(model.origins.values()) == {"recipe"}
    found = model.embed(texts)
    assert close(found.vectors, with_sentence_transformers(bundled, texts))
    assert found.cut == 1
    near, far = (1 - found.vectors[[1, 4]] @ found.vectors[0]).tolist()
    assert near < 0.6 < far, "texts of similar meaning must be nearer than others"


def test_the_separator_between_title_and_abstract(folder: Path) -> None:
    tokenizer = plain_tokenizer(folder)
    assert [title_separator(name, tokenizer) for name in ("SPECTER", "SemCSE", str(folder))] == [
        *("[SEP]", " ", " ")
    ]


# load_model in a notebook


def test_a_notebook_in_the_repository_finds_load_model() -> None:
    """`import semcse` alone does not import torch."""
    code = "import sys, semcse; print('load_model' in dir(semcse), 'torch' in sys.modules)"
    assert run_script("-c", code).stdout == "True False\n"
    assert semcse.load_model is load_model
    text = pydoc.plain(pydoc.render_doc(load_model))
    assert "load_model(name: str" in text
    assert 'encoder = load_model("all-MiniLM-L6-v2")' in text


def test_the_example_of_load_model_gives_what_it_shows() -> None:
    (example,) = doctest.DocTestFinder(recurse=False).find(load_model, "load_model", globs={})
    assert len(example.examples) == 4
    assert doctest.DocTestRunner().run(example).failed == 0


# What is refused before anything is downloaded


@pytest.fixture
def no_download(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every way to the Hub ends the test."""

    def fetch(*words: object, **options: object) -> None:
        pytest.fail("asked the Hub")

    for name in ("snapshot_download", "AutoTokenizer.from_pretrained", "AutoModel.from_pretrained"):
        monkeypatch.setattr(f"semcse.model_folder.{name}", fetch)


def every_use(name: str, trust: bool = True) -> list[Callable[[], object]]:
    """Finding out how a model is used, loading it, and training from it, each to be called."""
    return [
        lambda: usage_of(name, trust_remote_code=trust),
        lambda: load_model(name, trust_remote_code=trust),
        lambda: load_for_training(name, DEFAULT, trust_remote_code=trust),
    ]


@pytest.mark.usefixtures("no_download")
@pytest.mark.parametrize("name", ["Jina-v2", "jinaai/jina-embeddings-v3"])
def test_models_that_need_transformers_4(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The error gives the commands to run; in that environment, --trust-remote-code is needed."""
    recipe = find_recipe(name)
    assert recipe
    command = f"{MAKE_ENVIRONMENT} {recipe.environment} ; then"
    for call in every_use(name):
        refuses(call, name, command, ".venv4/bin/python and --trust-remote-code")
    monkeypatch.setattr("semcse.models.transformers.__version__", "4.57.6")
    for call in every_use(name, trust=False):
        refuses(call, name, "give --trust-remote-code")


def test_the_environment_for_transformers_4_has_the_versions_of_this_one() -> None:
    pins = (ROOT / "requirements.txt").read_text(encoding="utf-8").split()
    named = re.findall(r"\S+==\S+", MAKE_ENVIRONMENT)
    assert {"torch", "numpy", "tqdm", "tyro"} == {pin.partition("==")[0] for pin in named}
    assert set(named) <= set(pins)


@pytest.mark.usefixtures("no_download")
@pytest.mark.parametrize("version", ["5.23.0", "4.42.4"])
def test_a_model_that_pools_by_its_own_code_is_refused_everywhere(
    monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    monkeypatch.setattr("semcse.models.transformers.__version__", version)
    for call in every_use("NV-Embed-v2"):
        refuses(call, "NV-Embed-v2", "transformers==4.42.4", "nvidia/NV-Embed-v2")


@pytest.mark.parametrize(
    ("name", "expected"),
    [("SemCSE", "SemCSE"), ("SPECTER", "SPECTER"), ("SPECTER2_proximity", "SPECTER2_base")],
)
def test_a_model_on_the_hub_is_loaded_at_its_revision(
    monkeypatch: pytest.MonkeyPatch, name: str, expected: str
) -> None:
    """For an adapter, this is the base model at its own revision."""
    asked = []

    def fetch(source: str, **options: Any) -> None:
        asked.append((source, options["revision"]))
        raise OSError("no network")

    monkeypatch.setattr("semcse.model_folder.AutoTokenizer.from_pretrained", fetch)
    refuses(lambda: load_model(name), "no network")
    assert asked == [(RECIPES[expected].hub_id, RECIPES[expected].revision)]


# Each recipe on a tiny random model with the files of the published one, against a plain
# computation


LONG = sentence(*range(150))


def change_recipe(monkeypatch: pytest.MonkeyPatch, name: str, **changes: Any) -> None:
    monkeypatch.setitem(RECIPES, name, dataclasses.replace(RECIPES[name], **changes))


def load_from(monkeypatch: pytest.MonkeyPatch, name: str, folder: Path, **changes: Any) -> Encoder:
    """The recipe `name` loaded from `folder` instead of from the Hub."""
    change_recipe(monkeypatch, name, hub_id=str(folder), environment="", **changes)
    model = load_model(name, device="cpu", trust_remote_code=True)
    assert set(model.origins.values()) == {"recipe"}
    return model


def check_vectors(model: Encoder, expected: Tensor, texts: Sequence[str], prompt: str = "") -> None:
    assert close(model.embed(texts, prompt).vectors, expected)
    distances = torch.cdist(expected, expected).fill_diagonal_(9)
    assert distances.min() > 1e-3, "the reference must tell the texts apart"


@pytest.mark.parametrize("name", ["SciBERT", "SPECTER", "SciNCL", "SPECTER2_base"])
def test_bert_as_pickled_weights_and_a_vocabulary(
    monkeypatch: pytest.MonkeyPatch, tiny_bert: Path, tmp_path: Path, name: str
) -> None:
    """The folder holds config.json, pytorch_model.bin and vocab.txt. The tokenizer lower-cases."""
    folder = tmp_path / "bert"
    folder.mkdir()
    for file in ("config.json", "vocab.txt"):
        shutil.copy(tiny_bert / file, folder)
    plain = plain_model(tiny_bert, transformers.BertModel)
    torch.save(plain.state_dict(), folder / "pytorch_model.bin")
    words = (folder / "vocab.txt").read_text().splitlines()
    ids = [[words.index(word) for word in ("[CLS]", "soil", "river", "[SEP]")]]
    by_hand = plain(input_ids=torch.tensor(ids)).last_hidden_state[0, :1].detach()
    texts = [*TEXTS, LONG]
    expected = torch.cat([embed_each(plain, plain_tokenizer(tiny_bert), texts), by_hand])
    check_vectors(load_from(monkeypatch, name, folder), expected, [*texts, "Soil RIVER"])


@pytest.mark.parametrize("name", ["SemCSE", "SemCSE_cosine", "SciDeBERTa"])
def test_deberta_as_float16_weights_and_a_sentencepiece_model(
    monkeypatch: pytest.MonkeyPatch, tiny_deberta: Path, name: str
) -> None:
    plain = plain_model(tiny_deberta, transformers.DebertaV2Model)
    texts = [*TEXTS, sentence(*range(300))]
    expected = embed_each(plain, plain_tokenizer(tiny_deberta), texts, max_length=512)
    check_vectors(load_from(monkeypatch, name, tiny_deberta), expected, texts)


def test_roberta_with_its_pooler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """SimCSE: the vector is tanh(W h + b) of the first token's state h, cut at 128 tokens."""
    plain = write_roberta(tmp_path / "roberta")
    tokenizer, texts = plain_tokenizer(tmp_path / "roberta"), [*TEXTS, LONG]
    states = embed_each(plain, tokenizer, texts, first, 128)
    dense = plain.pooler.dense
    model = load_from(monkeypatch, "SimCSE", tmp_path / "roberta")
    check_vectors(model, torch.tanh(states @ dense.weight.T + dense.bias).detach(), texts)
    longer = [len(tokenizer(text)["input_ids"]) > 128 for text in texts]
    assert model.embed(texts).cut == sum(longer) > 0


@pytest.mark.parametrize(
    "name", ["granite-embedding-english-r2", "gte-modernbert-base", "SciEmbed"]
)
def test_modernbert(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    """Some layers see a window of 8 tokens only, in which padding would show."""
    folder = tmp_path / "modernbert"
    words = ("cls", "sep", "pad", "unk", "mask")
    special = {f"{word}_token": f"[{word.upper()}]" for word in words}
    tokenizer = write_bpe(folder, list(special.values()))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 0), ("[SEP]", 1)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 8192}
    write(folder, tokenizer_config=config | special)
    ids = {"pad_token_id": 2, "cls_token_id": 0, "sep_token_id": 1}
    make_model(
        transformers.ModernBertModel,
        transformers.ModernBertConfig,
        max_position_embeddings=8192,
        local_attention=8,
        bos_token_id=0,
        eos_token_id=1,
        **ids,
    ).save_pretrained(folder)
    plain = plain_model(folder, transformers.ModernBertModel)
    usage, texts = RECIPES[name].usage, [*TEXTS, sentence(*range(600))]
    fast: Any = transformers.PreTrainedTokenizerFast
    pool = mean if usage.pooling == "mean" else first
    plain_fast = fast(tokenizer_object=tokenizer, **special)
    model = load_from(monkeypatch, name, folder)
    check_vectors(model, embed_each(plain, plain_fast, texts, pool, usage.max_length), texts)
    assert model.embed(texts).cut == (name == "SciEmbed")


def test_a_decoder_with_the_last_token_and_an_instruction(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Qwen3: tokenizer.json ends each text with <|endoftext|>. The model card pads on the left,
    takes the last position, and puts the instruction in front of queries only.
    """
    folder, end = tmp_path / "qwen", "<|endoftext|>"
    tokenizer = write_bpe(folder, (end, "<|im_end|>"))
    closed = processors.TemplateProcessing(single=f"$A {end}", special_tokens=[(end, 0)])
    bytes_first = processors.ByteLevel(trim_offsets=False)
    tokenizer.post_processor = processors.Sequence([bytes_first, closed])
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"eos_token": "<|im_end|>", "pad_token": end, "model_max_length": 131072}
    write(folder, tokenizer_config={"tokenizer_class": "Qwen2Tokenizer"} | special)
    make_model(
        transformers.Qwen3Model,
        transformers.Qwen3Config,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=32768,
    ).save_pretrained(folder)
    model = load_from(monkeypatch, "Qwen3-Embedding-0.6B", folder)
    instruction = model.usage.query_prompt
    assert re.fullmatch(r"Instruct: .+\nQuery:", instruction)
    output = model.model(input_ids=torch.tensor([[5, 0]]))
    assert output.past_key_values is None, "a cache for generation would fill the memory"
    card = plain_tokenizer(folder, padding_side="left")
    plain = plain_model(folder, transformers.Qwen3Model)
    for prompt in ("", instruction):
        batch = card([prompt + text for text in TEXTS], padding=True, return_tensors="pt")
        assert batch["input_ids"][:, -1].tolist() == [0] * len(TEXTS), "the closing token"
        with torch.no_grad():
            check_vectors(model, plain(**batch).last_hidden_state[:, -1], TEXTS, prompt)


# The class of a model that brings its own Python code: Jina v2 changes the states, Jina v3 takes
# the number of a task's adapter for each text.
JINA_V2 = """
    def forward(self, input_ids=None, attention_mask=None):
        output = super().forward(input_ids=input_ids, attention_mask=attention_mask)
        output.last_hidden_state = output.last_hidden_state * torch.arange(1, 33)
        return output
"""
JINA_V3 = """
    _adaptation_map = {"retrieval.query": 0, "separation": 2, "text-matching": 4}

    def forward(self, input_ids=None, attention_mask=None, adapter_mask=None):
        output = super().forward(input_ids=input_ids, attention_mask=attention_mask)
        assert adapter_mask.dtype == torch.int32
        factors = adapter_mask[:, None, None] + torch.arange(32)
        output.last_hidden_state = output.last_hidden_state * factors
        return output
"""


@pytest.mark.parametrize(
    ("name", "body", "factors"),
    [("Jina-v2", JINA_V2, torch.arange(1, 33)), ("Jina-v3", JINA_V3, torch.arange(4, 36))],
)
def test_models_with_their_own_code(
    monkeypatch: pytest.MonkeyPatch,
    tiny_bert: Path,
    folder: Path,
    tmp_path: Path,
    name: str,
    body: str,
    factors: Tensor,
) -> None:
    """Both pool by the mean. Jina v3 selects the task text-matching and scales to length 1."""
    modules = str(tmp_path / "modules")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", modules)
    config = json.loads((folder / "config.json").read_text())
    auto_map = {"AutoConfig": "own_code.OwnConfig", "AutoModel": "own_code.OwnModel"}
    write(folder, config=config | {"auto_map": auto_map})
    (folder / "own_code.py").write_text(
        "import torch\nfrom transformers import BertConfig, BertModel\n"
        "class OwnConfig(BertConfig):\n    pass\n"
        f"class OwnModel(BertModel):\n    config_class = OwnConfig\n{body}"
    )
    plain, tokenizer = plain_model(tiny_bert), plain_tokenizer(tiny_bert)
    expected = embed_each(plain, tokenizer, TEXTS, mean) * factors
    if name == "Jina-v3":
        expected = expected / expected.norm(dim=1, keepdim=True)
    check_vectors(load_from(monkeypatch, name, folder), expected, TEXTS)
    if name == "Jina-v3":
        unknown = functools.partial(load_from, monkeypatch, name, folder, task="no-such-task")
        refuses(unknown, "no-such-task")


def test_an_adapter_is_added_to_its_base(
    monkeypatch: pytest.MonkeyPatch, tiny_bert: Path, tmp_path: Path
) -> None:
    """SPECTER2's proximity adapter is fetched at its revision. test_model_folder.py compares
    adapters with the computation by hand.
    """
    adapter, asked = write_adapter(tmp_path / "adapter"), []

    def fetch(hub_id: str, allow_patterns: list[str], revision: str) -> str:
        asked.append((hub_id, sorted(allow_patterns), revision))
        return str(adapter)

    monkeypatch.setattr("semcse.model_folder.snapshot_download", fetch)
    change_recipe(monkeypatch, "SPECTER2_base", hub_id=str(tiny_bert))
    base = load_model("SPECTER2_base", device="cpu")
    model = load_model("SPECTER2_proximity", device="cpu")
    recipe = RECIPES["SPECTER2_proximity"]
    files = ["adapter_config.json", "pytorch_adapter.bin"]
    assert asked == [(recipe.hub_id, files, recipe.revision)]
    assert model.name == "SPECTER2_proximity"
    before = base.embed(TEXTS).vectors
    add_adapter(base, adapter)
    check_vectors(model, base.embed(TEXTS).vectors, TEXTS)
    assert (model.embed(TEXTS).vectors - before).abs().max() > 0.1, "the adapter must show"


# Folders with sentence-transformers files


@pytest.mark.parametrize("files", ["legacy", "installed"])
@pytest.mark.parametrize(
    ("pooling", "metric", "normalize"),
    [("cls", "euclidean", False), ("mean", None, True), ("last", "cosine", False)],
)
def test_sentence_transformers_files_are_followed(
    folder: Path, files: str, pooling: AnyPooling, metric: Metric | None, normalize: bool
) -> None:
    """The vectors equal those of sentence-transformers; no similarity means cosine."""
    legacy = {"cls": "cls_token", "mean": "mean_tokens", "last": "lasttoken"}[pooling]
    if files == "legacy":
        write_legacy_files(folder, legacy, metric, 12, normalize)
    else:
        mode = legacy if pooling == "last" else pooling
        options: dict[str, Any] = {"normalize": normalize, "similarity_fn_name": metric}
        write_installed_files(folder, mode, max_length=12, **options)
    default = Usage("mean" if pooling == "cls" else "cls", "euclidean", 60)
    model = load_model(str(folder), default=default, device="cpu")
    assert model.usage == Usage(pooling, metric or "cosine", 12, normalize=normalize)
    assert set(model.origins.values()) == {"sentence-transformers files"}
    found = model.embed(TEXTS)
    assert found.cut == 2
    assert close(found.vectors, with_sentence_transformers(folder, TEXTS))
    assert bool(((found.vectors.norm(dim=1) - 1).abs() < 1e-5).all()) is normalize


def test_prompts_in_sentence_transformers_files_are_followed(folder: Path) -> None:
    prompts = {"query": "market school ", "document": "theory "}
    write_installed_files(folder, "mean", prompts=prompts)
    model = load_model(str(folder), device="cpu")
    assert (model.usage.query_prompt, model.usage.document_prompt) == ("market school ", "theory ")
    for role, prompt in prompts.items():
        theirs = with_sentence_transformers(folder, TEXTS, prompt_name=role)
        assert close(model.embed(TEXTS, prompt).vectors, theirs)


@pytest.mark.parametrize(
    ("pooling", "metric", "flag", "words"),
    [
        ("max", "euclidean", {"pooling": "mean"}, ("max", "--pooling")),
        (("cls", "mean"), "euclidean", {"pooling": "mean"}, ("cls", "--pooling")),
        ("mean", "dot", {"metric": "euclidean"}, ("dot", "--metric")),
    ],
)
def test_files_that_cannot_be_followed_are_refused_unless_a_flag_decides(
    folder: Path, pooling: Any, metric: str, flag: Any, words: tuple[str, ...]
) -> None:
    write_installed_files(folder, pooling, similarity_fn_name=metric)
    refuses(lambda: usage_of(str(folder)), str(folder), *words)
    usage, origins = usage_of(str(folder), **flag)
    assert (usage.pooling, usage.metric) == ("mean", "euclidean")
    assert [key for key, origin in origins.items() if origin == "flag"] == list(flag)


def test_modules_that_cannot_be_computed_are_refused(folder: Path) -> None:
    write_installed_files(folder, "mean", st_modules.Dense(32, 16))
    refuses(lambda: usage_of(str(folder), "mean", "cosine"), str(folder), "Dense")
    # Training starts from the transformer alone.
    assert load_for_training(str(folder), DEFAULT, "cpu").usage == DEFAULT


GOOD_MARKER = {"format": 1} | dataclasses.asdict(MARKER_USAGE)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("modules", "{"),
        ("modules", [{"idx": 0}]),
        ("modules", {"0": "sentence_transformers.models.Transformer"}),
        ("1_Pooling__config", []),
        ("1_Pooling__config", {}),
        ("config_sentence_transformers", []),
        ("config_sentence_transformers", {"similarity_fn_name": "none"}),
        ("config_sentence_transformers", {"similarity_fn_name": ["cosine"]}),
        ("config_sentence_transformers", {"prompts": {"query": 5}}),
        ("config_sentence_transformers", {"prompts": ["query"]}),
        ("sentence_bert_config", {"max_seq_length": "many"}),
        ("sentence_bert_config", {"max_seq_length": -1}),
        ("semcse", "{"),
        ("semcse", []),
        ("semcse", {"metric": "cosine"}),
        ("semcse", GOOD_MARKER | {"metric": "dot"}),
        ("semcse", GOOD_MARKER | {"pooling": ["cls"]}),
        ("semcse", GOOD_MARKER | {"max_length": "64"}),
        ("semcse", GOOD_MARKER | {"max_length": None}),
        ("semcse", GOOD_MARKER | {"max_length": 0}),
        ("semcse", GOOD_MARKER | {"query_prompt": 5}),
        ("semcse", GOOD_MARKER | {"normalize": "no"}),
    ],
)
def test_spoiled_files_are_refused(folder: Path, name: str, content: object) -> None:
    write_legacy_files(folder)
    write(folder, **{name: content})
    refuses(lambda: load_model(str(folder)), str(folder))


# The encoder that training starts from


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_training_uses_the_settings_whatever_the_recipe_says(metric: Metric) -> None:
    usage = Usage("cls", metric, 77)
    model = load_for_training("all-minilm-l6-v2", usage, "cpu")
    assert (model.name, model.usage) == ("all-minilm-l6-v2", usage)


def test_training_on_from_a_model_of_another_metric_is_refused(folder: Path) -> None:
    """The value that contradicts may come from a line of settings.py, so the fix is a flag."""
    write_marker(folder)
    agreed = dataclasses.replace(MARKER_USAGE, max_length=20)
    assert load_for_training(str(folder), agreed, "cpu").usage == agreed
    contradicting: list[tuple[Pooling, Metric, str]] = [
        ("mean", "cosine", "--metric euclidean"),
        ("cls", "euclidean", "--pooling mean"),
    ]
    for pooling, metric, fix in contradicting:
        usage = Usage(pooling, metric, 20)
        refuses(functools.partial(load_for_training, str(folder), usage), str(folder), fix)


def test_training_needs_a_model_that_can_be_trained_so(
    monkeypatch: pytest.MonkeyPatch, tiny_bert: Path
) -> None:
    """A folder cannot hold an adapter, and a decoder's first token does not see the text."""
    adapter, decoder = "SPECTER2_proximity", "Qwen/Qwen3-Embedding-0.6B"
    refuses(lambda: load_for_training(adapter, DEFAULT), adapter, "--encoder SPECTER2_base")
    refuses(lambda: load_for_training(decoder, DEFAULT), "--pooling cls", "--pooling mean")
    change_recipe(monkeypatch, "Qwen3-Embedding-0.6B", hub_id=str(tiny_bert))
    usage = Usage("mean", "euclidean", 60)
    assert load_for_training("Qwen3-Embedding-0.6B", usage, "cpu").usage == usage

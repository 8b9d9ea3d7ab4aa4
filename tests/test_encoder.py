"""Encoder: pooling by arithmetic, and vectors equal to those of transformers alone."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import WORDS, sentence
from torch import Tensor
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertModel,
    MPNetConfig,
    MPNetModel,
    RobertaConfig,
    RobertaModel,
)

from semcse import encoder
from semcse.encoder import AnyPooling, Encoder, Usage, choose_device, longest_input, pool
from semcse.errors import RunError, UserError
from semcse.model_folder import load_encoder
from semcse.types import Pooling

# Of 6, 33, 2, 4, 58, 10, 4 and 15 tokens in the tiny BERT's vocabulary.
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


@pytest.fixture(params=["tiny_bert", "tiny_deberta"])
def tiny(request: pytest.FixtureRequest) -> Path:
    """Each of the two tiny models in turn."""
    folder = request.getfixturevalue(request.param)
    assert isinstance(folder, Path)
    return folder


def load(folder: Path, usage: Usage = CLS) -> Encoder:
    return load_encoder(str(folder), usage, "cpu")


@functools.lru_cache
@torch.no_grad()
def hidden_states(folder: Path, texts: tuple[str, ...]) -> list[Tensor]:
    """(length, d) for each text, by transformers alone: one text at a time, so without padding."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    return [
        model(input_ids=tokenizer(text, return_tensors="pt")["input_ids"]).last_hidden_state[0]
        for text in texts
    ]


def reference(folder: Path, texts: Sequence[str], pooling: Pooling) -> Tensor:
    """Vectors (n, d) by transformers alone."""
    states = hidden_states(folder, tuple(texts))
    return torch.stack([one[0] if pooling == "cls" else one.mean(dim=0) for one in states])


def close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() < 1e-5)


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        ("cls", [[1.0, 2.0], [-4.0, 0.0]]),
        ("mean", [[2.0, 4.0], [1.0, 3.0]]),
        ("last", [[3.0, 6.0], [2.0, 6.0]]),
    ],
)
def test_pool_by_arithmetic(pooling: AnyPooling, expected: list[list[float]]) -> None:
    """The first text has two tokens and one padded position, which must not count."""
    hidden = torch.tensor(
        [[[1.0, 2.0], [3.0, 6.0], [999.0, -999.0]], [[-4.0, 0.0], [5.0, 3.0], [2.0, 6.0]]]
    )
    mask = torch.tensor([[True, True, False], [True, True, True]])
    assert pool(hidden, mask, pooling).tolist() == expected
    if pooling != "cls":
        padded_left = torch.stack([hidden[0].roll(1, dims=0), hidden[1]])
        mask = torch.tensor([[False, True, True], [True, True, True]])
        assert pool(padded_left, mask, pooling).tolist() == expected


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_embed_equals_transformers_on_each_text_alone(tiny: Path, pooling: Pooling) -> None:
    found = load(tiny, Usage(pooling, "cosine", 64)).embed(TEXTS)
    expected = reference(tiny, TEXTS, pooling)
    assert close(found.vectors, expected)
    assert found.vectors.dtype == torch.float32
    assert not found.vectors.requires_grad
    assert found.cut == 0
    different = [0, 1, 2, 3, 4, 5, 7]  # text 6 repeats text 3
    distances = torch.cdist(expected[different], expected[different]).fill_diagonal_(9)
    assert distances.min() > 1e-3, "the reference must tell the texts apart"


@pytest.mark.parametrize(
    ("chunk", "tokens", "passes"), [(1, 4096, 8), (3, 4096, 3), (4096, 1, 8), (4096, 80, 3)]
)
def test_chunks_and_batches_bound_memory_and_change_nothing(
    tiny_bert: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, tokens: int, passes: int
) -> None:
    """Batches of 80 tokens hold the texts of 58, of 33 and 15, and all others."""
    model, sizes = load(tiny_bert, MEAN), []
    forward = model.forward

    def recording(ids: Sequence[Sequence[int]]) -> Tensor:
        sizes.append((len(ids), max(map(len, ids))))
        return forward(ids)

    monkeypatch.setattr(model, "forward", recording)
    monkeypatch.setattr(encoder, "CHUNK_TEXTS", chunk)
    monkeypatch.setitem(encoder.BATCH_TOKENS, "cpu", tokens)
    assert close(model.embed(TEXTS).vectors, reference(tiny_bert, TEXTS, "mean"))
    assert sum(texts for texts, _ in sizes) == len(TEXTS)
    assert all(n <= chunk and (n == 1 or n * longest <= tokens) for n, longest in sizes)
    assert len(sizes) == passes


@pytest.mark.parametrize("method", ["forward", "forward_padded"])
def test_forward_keeps_order_and_gradient(tiny_bert: Path, method: str) -> None:
    """The weight gradient of a batch is the sum of the gradients of its texts."""
    model = load(tiny_bert, MEAN)
    model.model.eval()
    forward, ids = getattr(model, method), model.tokenize(TEXTS, 64)
    vectors = forward(ids)
    assert close(vectors, reference(tiny_bert, TEXTS, "mean"))
    # Each text has another factor, so that a wrong order changes the gradient too.
    factors = torch.arange(1.0, 9.0)[:, None]
    weight = model.model.get_parameter("encoder.layer.0.output.dense.weight")
    (found,) = torch.autograd.grad((factors * vectors.square()).sum(), weight)
    expected = sum(
        torch.autograd.grad(factor * forward([row]).square().sum(), weight)[0]
        for factor, row in zip(factors.flatten(), ids, strict=True)
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_no_texts_have_no_vectors(tiny_bert: Path) -> None:
    found = load(tiny_bert).embed([])
    assert (len(found.vectors), found.cut) == (0, 0)


def test_prompt_is_put_in_front_and_counts_towards_the_length(tiny_bert: Path) -> None:
    model = load(tiny_bert, Usage("mean", "cosine", 10))
    texts = [" ".join(WORDS[:7]), " ".join(WORDS[:8])]  # 9 and 10 tokens with the special ones
    prompted = model.embed(texts, prompt="market ")
    assert torch.equal(prompted.vectors, model.embed([f"market {text}" for text in texts]).vectors)
    assert not close(prompted.vectors, model.embed(texts).vectors)
    assert (model.embed(texts).cut, prompted.cut) == (0, 1)


def test_only_texts_longer_than_the_limit_count_as_cut(tiny: Path) -> None:
    text = sentence(*range(12))
    whole = len(AutoTokenizer.from_pretrained(tiny)(text)["input_ids"])
    texts = [text, "soil", text, "", f"{text} ."]  # the last one is longer
    assert [
        load(tiny, Usage("cls", "cosine", limit)).embed(texts).cut
        for limit in (whole + 5, whole, whole - 1)
    ] == [0, 1, 3]


@torch.no_grad()
def test_a_cut_text_keeps_its_first_tokens_and_the_closing_one(tiny: Path) -> None:
    text = sentence(*range(12))
    whole = AutoTokenizer.from_pretrained(tiny)(text)["input_ids"]
    model: Any = AutoModel.from_pretrained(tiny, dtype=torch.float32).eval()
    kept = torch.tensor([[*whole[:9], whole[-1]]])
    expected = model(input_ids=kept).last_hidden_state.mean(dim=1)
    found = load(tiny, Usage("mean", "cosine", 10)).embed(["soil", text]).vectors
    assert close(found[1:], expected)


def test_normalize_scales_to_length_one(tiny_bert: Path) -> None:
    raw = load(tiny_bert, MEAN).embed(TEXTS).vectors
    unit = load(tiny_bert, Usage("mean", "cosine", 64, normalize=True)).embed(TEXTS).vectors
    assert close(unit, raw / raw.square().sum(dim=1, keepdim=True).sqrt())


@pytest.mark.parametrize("training", [True, False])
def test_embed_switches_dropout_off_and_restores_the_mode(tiny_bert: Path, training: bool) -> None:
    model, expected = load(tiny_bert), reference(tiny_bert, TEXTS, "cls")
    model.model.train(training)
    with torch.no_grad():
        trained = model.forward(model.tokenize(TEXTS, 64))
    assert close(trained, expected) is not training, "dropout must show in training mode"
    assert close(model.embed(TEXTS).vectors, expected)
    assert model.model.training is training


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_weights_are_an_error(tiny_bert: Path, bad: float) -> None:
    model = load(tiny_bert)
    model.model.train()
    with torch.no_grad():
        next(model.model.parameters())[5:8] = bad  # the words "soil", "river" and "cell"
    assert torch.isfinite(model.embed(["market school"]).vectors).all()
    message = f"model {tiny_bert} returned vectors with NaN or infinity; "
    with pytest.raises(RunError, match=re.escape(message)):
        model.embed(["market", "soil", "school"])
    assert model.model.training


def test_an_interrupt_restores_the_mode(tiny_bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise an interrupted validation would let training go on without dropout."""
    model = load(tiny_bert)
    model.model.train()

    def interrupt(ids: Sequence[Sequence[int]]) -> Tensor:
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "forward", interrupt)
    with pytest.raises(KeyboardInterrupt):
        model.embed(["soil"])
    assert model.model.training


def test_progress_bar_counts_texts(tiny_bert: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = load(tiny_bert)
    capsys.readouterr()
    model.embed(TEXTS)
    assert capsys.readouterr() == ("", "")
    model.embed(TEXTS, label="abstracts")
    out, err = capsys.readouterr()
    assert out == ""
    assert "abstracts: 100%" in err
    assert "8/8" in err


def test_cuda_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"^--device cuda: .*; use --device cpu"):
        choose_device("cuda")
    assert choose_device("auto").type == "cpu"


@pytest.mark.parametrize(
    ("config_class", "model_class", "limit"),
    [(BertConfig, BertModel, 40), (RobertaConfig, RobertaModel, 38), (MPNetConfig, MPNetModel, 38)],
)
def test_longest_input(config_class: Any, model_class: Any, limit: int) -> None:
    """40 positions with padding id 1 leave 38 tokens to models that number positions after it."""
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = config_class(
        vocab_size=9, intermediate_size=8, max_position_embeddings=40, pad_token_id=1, **sizes
    )
    model = model_class(config).eval()
    assert longest_input(model) == limit
    model(input_ids=torch.full((1, limit), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, limit + 1), 5))

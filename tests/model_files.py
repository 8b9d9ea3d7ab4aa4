"""Files of model folders for the tests, and reference computations of vectors with plain
transformers and sentence-transformers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import sentence
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from semcse.errors import UserError

TEXTS = [sentence(*range(3)), sentence(*range(30)), "", sentence(4), sentence(*range(2, 50))]


def refuses(call: Callable[[], object], *words: str) -> None:
    """Check that `call` raises a UserError (exit code 2) whose line says WHAT; HOW TO FIX IT."""
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert caught.value.exit_code == 2
    assert "\n" not in message
    assert "; " in message
    for word in words:
        assert word in message


def close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() < 1e-5)


# Reference computations


def plain_model(folder: Path, model_class: Any = transformers.AutoModel) -> Any:
    return model_class.from_pretrained(folder, dtype=torch.float32).eval()


def plain_tokenizer(folder: Path, **options: Any) -> Any:
    return transformers.AutoTokenizer.from_pretrained(folder, **options)


def first(states: Tensor) -> Tensor:
    """CLS pooling of one text's hidden states, (tokens, d) -> (d,)."""
    return states[0]


def mean(states: Tensor) -> Tensor:
    return states.mean(dim=0)


@torch.no_grad()
def embed_each(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    pool: Callable[[Tensor], Tensor] = first,
    max_length: int = 64,
) -> Tensor:
    """Vectors of texts that are run one at a time, so without any padding."""
    ids = [
        tokenizer(text, truncation=True, max_length=max_length, return_tensors="pt")["input_ids"]
        for text in texts
    ]
    return torch.stack([pool(model(input_ids=one).last_hidden_state[0]) for one in ids])


def with_sentence_transformers(folder: Path, texts: Sequence[str], **options: Any) -> Tensor:
    vectors = SentenceTransformer(str(folder), device="cpu").encode(
        list(texts), convert_to_tensor=True, show_progress_bar=False, **options
    )
    assert isinstance(vectors, Tensor)
    return vectors


# Files


def write(folder: Path, **contents: object) -> None:
    """Write JSON files: `modules=[...]` becomes modules.json; a double underscore is a slash."""
    for name, content in contents.items():
        path = folder / f"{name.replace('__', '/')}.json"
        path.parent.mkdir(exist_ok=True)
        text = content if isinstance(content, str) else json.dumps(content)
        path.write_text(text, encoding="utf-8")


def write_legacy_files(
    folder: Path,
    pooling: str = "mean_tokens",
    metric: str | None = "cosine",
    max_length: int | None = 50,
    normalize: bool = False,
) -> None:
    """The files that sentence-transformers 2 to 5 write."""
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling")]
    if normalize:
        kinds.append(("2_Normalize", "Normalize"))
    modes = ("cls_token", "mean_tokens", "max_tokens", "weightedmean_tokens", "lasttoken")
    write(
        folder,
        modules=[
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for i, (path, kind) in enumerate(kinds)
        ],
        config_sentence_transformers={"similarity_fn_name": metric} if metric else {},
        sentence_bert_config={"max_seq_length": max_length, "do_lower_case": False},
        **{
            "1_Pooling__config": {"word_embedding_dimension": 32}
            | {f"pooling_mode_{mode}": mode == pooling for mode in modes}
        },
    )


def write_bpe(folder: Path, special: Sequence[str]) -> Any:
    """Write a byte-level BPE tokenizer as vocab.json and merges.txt, and return it."""
    folder.mkdir(exist_ok=True)
    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([sentence(*range(40))], trainer)
    tokenizer.model.save(str(folder))
    return tokenizer


def make_model(model_class: Any, config_class: Any, **options: Any) -> Any:
    """A random three-layer model whose weights are large enough for texts to differ clearly."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = config_class(
        vocab_size=340, intermediate_size=64, initializer_range=0.1, **sizes, **options
    )
    return model_class(config).eval()


def write_roberta(folder: Path) -> Any:
    """Write a random RoBERTa as the Hub has them, with pickled weights, and return the model."""
    write_bpe(folder, ("<s>", "<pad>", "</s>", "<unk>", "<mask>"))
    model = make_model(
        transformers.RobertaModel,
        transformers.RobertaConfig,
        max_position_embeddings=514,
        type_vocab_size=1,
        pad_token_id=1,
    )
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return model


def write_adapter(
    folder: Path,
    layers: Sequence[int] = (0, 1),
    size: int = 32,
    prefix: str = "bert.",
    **changes: Any,
) -> Path:
    """A random adapter with the files, keys and configuration that the adapters library (1.3.0)
    writes for "seq_bn" on a BERT; `changes` are of its configuration.
    """
    folder.mkdir()
    config: dict[str, Any] = {
        "adapter_residual_before_ln": False,
        "cross_adapter": False,
        "dropout": 0.0,
        "inv_adapter": None,
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
    about = {"hidden_size": size, "name": "[PRX]", "version": "adapters.1.3.0"}
    write(folder, adapter_config={"config": config | changes, **about})
    torch.manual_seed(1)
    shapes = {
        "down.0.weight": (size // 4, size),
        "down.0.bias": (size // 4,),
        "up.weight": (size, size // 4),
        "up.bias": (size,),
    }
    weights = {
        f"{prefix}encoder.layer.{layer}.output.adapters.[PRX].adapter_{part}": 0.4
        * torch.randn(shape)
        for layer in layers
        for part, shape in shapes.items()
    }
    torch.save(weights, folder / "pytorch_adapter.bin")
    return folder

"""Shared parts of the speed measurements: random texts, models of the measured shapes, interleaved
timing, the matrix-multiply peak, and one row of results.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import DebertaV2Config, DebertaV2Model

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from semcse.encoder import Encoder, Usage
from semcse.model_folder import find_model, load_encoder

MINILM = "all-MiniLM-L6-v2"
# The shape of DeBERTa-v3-base, which we assume for SciDeBERTa. Random weights do not change the
# speed.
DEBERTA = {
    "vocab_size": 128_100,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "relative_attention": True,
    "position_buckets": 256,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": ["p2c", "c2p"],
    "max_relative_positions": -1,
    "position_biased_input": False,
    "max_position_embeddings": 512,
    "type_vocab_size": 0,
}


def texts(count: int, shortest: int, longest: int, seed: int = 0) -> list[str]:
    """Return random texts of `shortest` to `longest` tokens, special tokens included, with uniform
    lengths. Each word is one token in the bundled vocabulary.
    """
    vocabulary = json.loads(
        (Path(find_model(MINILM)) / "tokenizer.json").read_text(encoding="utf-8")
    )["model"]["vocab"]
    words = np.array(
        [word for word in vocabulary if word.isalpha() and word.isascii() and len(word) > 2]
    )
    rng = np.random.default_rng(seed)
    return [
        " ".join(rng.choice(words, size))
        for size in rng.integers(shortest - 2, longest - 1, size=count)
    ]


def deberta_folder(folder: Path) -> Path:
    """Save a random model of DeBERTa-v3-base's shape to `folder`, with the tokenizer of the bundled
    encoder, which this project and its peers read in the same way.
    """
    torch.manual_seed(0)
    DebertaV2Model(DebertaV2Config(**DEBERTA)).save_pretrained(folder)  # type: ignore[arg-type]
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
        if (Path(find_model(MINILM)) / name).exists():
            shutil.copy(Path(find_model(MINILM)) / name, folder / name)
    return folder


def our_encoder(name: str | Path, metric: Any = "cosine") -> Encoder:
    """Load a model in this project, with mean pooling as in the peers."""
    return load_encoder(str(name), Usage("mean", metric, 512), "cpu")


def interleaved(works: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Return the best wall time of each piece of work in seconds. Each round runs all pieces, so a
    slow phase of the machine affects all of them.
    """
    best = dict.fromkeys(works, float("inf"))
    for _ in range(rounds):
        for name, work in works.items():
            started = time.perf_counter()
            work()
            best[name] = min(best[name], time.perf_counter() - started)
    return best


def gemm_peak(dtype: torch.dtype) -> float:
    """Return the operations per second of a 2048-cubed matrix product, the best of six."""
    a, b = torch.randn(2, 2048, 2048).to(dtype)
    seconds = interleaved({"gemm": lambda: a @ b}, 6)["gemm"]
    return 2 * 2048**3 / seconds


def linear_operations(model: Any) -> int:
    """Return the operations of a forward pass per token: 2 for each weight of the layers' matrices.
    Embeddings, norms and attention are not counted.
    """
    return 2 * sum(
        int(p.numel()) for name, p in model.named_parameters() if ".layer." in name and p.dim() == 2
    )


def row(
    operation: str,
    peer: str,
    version: str,
    ours: float,
    theirs: float,
    goal: float | None,
    **more: Any,
) -> dict[str, Any]:
    """Return one row of results.json. A `ratio` above 1 means that ours is faster."""
    found = {
        "operation": operation,
        "peer": peer,
        "peer_version": version,
        "ours_s": round(ours, 4),
        "theirs_s": round(theirs, 4),
    }
    found |= {
        "ratio": round(theirs / ours, 3),
        "goal": goal,
        "share_of_gemm_peak": None,
        "agreement": "",
    } | more
    sys.stderr.write(
        f"{operation}: {found['ratio']} (goal {goal}), ours {ours:.3f} s, {peer} {theirs:.3f} s\n"
    )
    return found


def smallest_cosine(a: Any, b: Any) -> float:
    """Return the smallest cosine similarity of row i of `a` and row i of `b`, over all i."""
    return float(
        torch.nn.functional.cosine_similarity(
            torch.as_tensor(a).float(), torch.as_tensor(b).float()
        ).min()
    )

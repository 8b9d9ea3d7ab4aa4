"""Speed of embedding abstracts, compared with sentence-transformers: its defaults on torch, and its
OpenVINO backend if the environment .venv-openvino exists.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import sentence_transformers
import torch
from common import (
    MINILM,
    ROOT,
    deberta_folder,
    gemm_peak,
    interleaved,
    linear_operations,
    our_encoder,
    row,
    smallest_cosine,
    texts,
)
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

from semantic_benchmark import evaluate, read_evaluation_papers
from semcse.encoder import Encoder
from semcse.model_folder import find_model
from semcse.tables import main_score

OPENVINO = ROOT / ".venv-openvino" / "bin" / "python"


def rank_shift(half: Encoder, full: Encoder) -> str:
    """Describe how much the benchmark's mean ranks on the sample papers change in bf16."""
    papers = read_evaluation_papers(str(ROOT / "data" / "sample_test.jsonl"))
    one, other = (evaluate(encoder, papers, 0).report["tasks"] for encoder in (half, full))
    shifts = {
        task: abs(one[task]["mean_rank"] - other[task]["mean_rank"])
        for task in one
        if main_score(task) == "mean_rank"
    }
    return f"mean ranks of {len(papers)} sample papers move by {max(shifts.values()):.4f} or less"


def measure(
    name: str, folder: str, abstracts: list[str], rounds: int, operation: str
) -> list[dict[str, Any]]:
    """Return the rows that compare our bf16 and float32 with sentence-transformers' defaults."""
    transformer = Transformer(folder)
    peer = SentenceTransformer(
        modules=[transformer, Pooling(transformer.get_embedding_dimension(), "mean")], device="cpu"
    )
    peer.max_seq_length = 512
    half, full = our_encoder(folder), our_encoder(folder)
    half.bf16 = True
    kept: dict[str, Any] = {}
    works = {
        "bf16": lambda: kept.update(bf16=half.embed(abstracts).vectors),
        "float32": lambda: kept.update(float32=full.embed(abstracts).vectors),
        "theirs": lambda: kept.update(
            theirs=peer.encode(abstracts, show_progress_bar=False, convert_to_tensor=True)
        ),
    }
    half.embed(abstracts[:64])
    best = interleaved(works, rounds)
    tokens = sum(map(len, full.tokenize(abstracts, 512)))
    share = linear_operations(full.model) * tokens / best["bf16"] / gemm_peak(torch.bfloat16)
    version = f"sentence-transformers {sentence_transformers.__version__}"
    close = f"cosine to float32 {smallest_cosine(kept['bf16'], kept['theirs']):.6f} or more"
    if folder == str(find_model(MINILM)):  # the ranks of a model with random weights mean nothing
        close += f"; {rank_shift(half, full)}"
    exact = f"largest difference {float((kept['float32'] - kept['theirs']).abs().max()):.0e}"
    unit = {
        "unit": (
            f"seconds for {len(abstracts)} abstracts of {tokens / len(abstracts):.0f} tokens,"
            f" {name}"
        )
    }
    found = [
        row(
            operation,
            f"{version}, float32",
            version,
            best["bf16"],
            best["theirs"],
            2.0,
            share_of_gemm_peak=round(share, 3),
            agreement=close,
            **unit,
        ),
        row(
            f"{operation}_float32",
            f"{version}, float32",
            version,
            best["float32"],
            best["theirs"],
            None,
            agreement=exact,
            **unit,
        ),
    ]
    if OPENVINO.exists() and folder == str(find_model(MINILM)):
        found.append(openvino(abstracts, best["bf16"], kept["theirs"], unit))
    return found


def openvino(
    abstracts: list[str], ours: float, exact: torch.Tensor, unit: dict[str, str]
) -> dict[str, Any]:
    """Return the row of the OpenVINO backend, measured in another process and environment."""
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "texts.json").write_text(json.dumps(abstracts), encoding="utf-8")
        script = ROOT / "bench" / "openvino_peer.py"
        command = [OPENVINO, script, find_model(MINILM), scratch]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        seconds, version = json.loads(done.stdout.splitlines()[-1])
        vectors = np.load(Path(scratch) / "vectors.npy")
    close = f"its cosine to float32 {smallest_cosine(vectors, exact):.6f} or more"
    return row(
        "encode_minilm_vs_openvino",
        f"sentence-transformers, OpenVINO {version}",
        version,
        ours,
        seconds,
        None,
        agreement=close,
        **unit,
    )


def run(quick: bool) -> list[dict[str, Any]]:
    """Measure all rows of this part."""
    found = measure(
        "MiniLM",
        str(find_model(MINILM)),
        texts(256 if quick else 2_000, 150, 300),
        2,
        "encode_minilm_vs_st",
    )
    with tempfile.TemporaryDirectory() as scratch:
        folder = deberta_folder(Path(scratch))
        found += measure(
            "DeBERTa-v3-base's shape",
            str(folder),
            texts(32 if quick else 128, 250, 250),
            1 if quick else 2,
            "encode_deberta_vs_st",
        )
    return found

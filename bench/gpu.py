"""Speed of the DeBERTa shape on a CUDA GPU: training at 40 tokens and encoding at 250 in bf16, ours
compared with transformers' padded forward pass, and the agreement of CPU and GPU.

python bench/gpu.py [--peak TFLOPS] [--device cuda]      about 3 minutes on one GPU; writes
bench/results_gpu.json

The share of the peak counts the operations of the layers' matrices on real tokens only. It is
relative to the matrix-multiply peak measured in the same run, and also to --peak if that is given
(989 for the dense bf16 of an H100 or H200). Goals: 30% in training, 35% in encoding. `--device cpu`
runs the same code on small sizes, as a trial.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import ROOT, deberta_folder, linear_operations, smallest_cosine, texts

from semcse import files, run_folder
from semcse.encoder import Encoder, Usage
from semcse.model_folder import load_encoder
from train_embedding_model import contrastive_loss


def seconds(work: Callable[[], Any], device: torch.device, rounds: int = 5) -> float:
    """Return the best time of several rounds, with the GPU's queue empty before and after each."""
    best = float("inf")
    for _ in range(rounds + 1):  # the first warms up
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return best


def training_step(
    encoder: Encoder, forward: Callable[..., Any], ids: list[list[int]], optimizer: Any
) -> Callable[[], None]:
    """Return a training step: forward pass, InfoNCE over the batch, backward pass, AdamW."""

    def step() -> None:
        encoder.model.train()
        with torch.autocast(encoder.device.type, torch.bfloat16):
            vectors = forward(ids)
        anchors, positives = vectors.float().split(len(ids) // 2)
        loss: Any = contrastive_loss(anchors, positives, "cosine", "infonce", 0.1, 0.05).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def encoding(
    encoder: Encoder, forward: Callable[..., Any], ids: list[list[int]]
) -> Callable[[], None]:
    """Return a function that embeds all texts without dropout."""

    def embed() -> None:
        encoder.model.eval()
        with torch.inference_mode(), torch.autocast(encoder.device.type, torch.bfloat16):
            for start in range(0, len(ids), 256):
                forward(ids[start : start + 256])

    return embed


def measure(device: torch.device, peak: float | None) -> list[dict[str, Any]]:
    """Measure training and encoding, and return one row for each."""
    small = device.type == "cpu"
    with tempfile.TemporaryDirectory() as scratch:
        folder = str(deberta_folder(Path(scratch)))
        encoder = load_encoder(
            folder, Usage("cls", "cosine", 512), "cuda" if device.type == "cuda" else "cpu"
        )
        reference = load_encoder(folder, Usage("cls", "cosine", 512), "cpu")
    matrix = torch.randn(
        1024 if small else 8192, 1024 if small else 8192, device=device, dtype=torch.bfloat16
    )
    measured = 2 * len(matrix) ** 3 / seconds(lambda: matrix @ matrix, device)
    short = encoder.tokenize(texts(16 if small else 1024, 20, 60), 128)
    long = encoder.tokenize(texts(4 if small else 2048, 250, 250), 512)
    some = texts(4 if small else 32, 60, 250, 3)
    agreement = smallest_cosine(encoder.embed(some).vectors, reference.embed(some).vectors)
    optimizer = torch.optim.AdamW(encoder.model.parameters(), fused=True)
    forwards = {"ours": encoder.forward, "theirs": lambda ids: encoder.forward_padded(ids)}
    rows = []
    for operation, ids, times, goal in (
        ("gpu_train_deberta", short, 3, 0.30),
        ("gpu_encode_deberta", long, 1, 0.35),
    ):
        best = {}
        for name, forward in forwards.items():
            work = (
                training_step(encoder, forward, ids, optimizer)
                if times == 3
                else encoding(encoder, forward, ids)
            )
            best[name] = seconds(work, device, 1 if small else 5)
        rate = times * linear_operations(encoder.model) * sum(map(len, ids)) / best["ours"]
        rows.append(
            {
                "operation": operation,
                "peer": "transformers' padded forward pass, bf16 autocast",
                "ours_s": best["ours"],
                "theirs_s": best["theirs"],
                "ratio": best["theirs"] / best["ours"],
                "goal": goal,
                "share_of_gemm_peak": rate / measured,
                "share_of_stated_peak": rate / peak if peak else None,
                "texts_per_second": len(ids) / best["ours"],
                "agreement": f"CPU and GPU float32 vectors: cosine {agreement:.7f} or more",
            }
        )
    return rows


def main() -> None:
    """Parse the command line, measure, and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument(
        "--peak", type=float, help="the GPU's dense bf16 peak as its maker states it, in TFLOP/s"
    )
    wanted = parser.parse_args()
    if wanted.device == "cuda" and not torch.cuda.is_available():
        sys.exit(
            "error: torch finds no CUDA GPU; run this on a machine that has one, or try it with"
            " --device cpu"
        )
    device = torch.device(wanted.device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    rows = [
        row | {"hardware": name, "versions": run_folder.versions()}
        for row in measure(device, wanted.peak and wanted.peak * 1e12)
    ]
    files.write_json(ROOT / "bench" / "results_gpu.json", rows)
    for row in rows:
        sys.stdout.write(
            f"{row['operation']}: {row['ratio']:.2f} x transformers,"
            f" {row['share_of_gemm_peak']:.0%} of the peak (goal {row['goal']:.0%})\n"
        )


if __name__ == "__main__":
    main()

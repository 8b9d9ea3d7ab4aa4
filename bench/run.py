"""Measure every speed figure of the README, ours and those of other libraries, in one run on one
machine, and write bench/results.json and bench/results.md (`make bench`).

    python bench/run.py [--quick] [--only training encoding startup llm]

--quick takes small samples. The script runs in .venv-bench (bench/requirements.txt). A ratio is the
time of the other library divided by our time. Do not use the machine for anything else meanwhile.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import platform
import sys
from pathlib import Path
from typing import Any

import torch
from common import ROOT, gemm_peak

from semcse import files, run_folder

PARTS = ("training", "encoding", "startup", "llm")


def machine() -> dict[str, Any]:
    """Return the hardware and versions, and measure the matrix-multiply peaks."""
    lines = (
        Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        if Path("/proc/cpuinfo").exists()
        else []
    )
    model = next(
        (line.partition(":")[2].strip() for line in lines if "model name" in line),
        platform.processor(),
    )
    units = [name for name in ("avx512_bf16", "amx_bf16") if torch.cpu.get_capabilities().get(name)]
    peaks = {
        name: round(gemm_peak(dtype) / 1e9)
        for name, dtype in {"float32": torch.float32, "bf16": torch.bfloat16}.items()
    }
    return {
        "cpu": model,
        "bf16_units": units,
        "threads": torch.get_num_threads(),
        "gemm_gflops": peaks,
        "versions": run_folder.versions(),
    }


def measure(part: str, quick: bool) -> list[dict[str, Any]]:
    """Measure one part and return its rows."""
    if part == "llm":
        import llm_client

        return [llm_client.measure()]
    return list(importlib.import_module(part).run(quick))


def markdown(results: list[dict[str, Any]], about: dict[str, Any]) -> str:
    """Return the README's table, with the rows that compare bf16 with bf16 first."""
    rows = [row for row in results if "ratio" in row]
    rows.sort(key=lambda row: not ("bf16" in row["operation"] or "flash" in row["operation"]))
    lines = ["| operation | peer | ours | theirs | ratio | goal |", "|---|---|---|---|---|---|"]
    for row in rows:
        lines.append(
            f"| {row['operation']} | {row['peer']} | {row['ours_s']:.3g} s | {row['theirs_s']:.3g}"
            f" s | **{row['ratio']:.2f}** | {row['goal'] or ''} |"
        )
    peaks = (
        f"matrix-multiply peak {about['gemm_gflops']['float32']} GFLOP/s in float32,"
        f" {about['gemm_gflops']['bf16']} in bf16"
    )
    lines.append(
        f"\n{about['date']}, {about['cpu']} ({', '.join(about['bf16_units'])}), {about['threads']}"
        f" threads, {peaks}."
    )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure the wanted parts and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="use smaller samples, fewer rounds")
    parser.add_argument("--only", nargs="*", choices=PARTS, default=PARTS, help="parts to measure")
    wanted = parser.parse_args()
    about = machine() | {"date": datetime.date.today().isoformat(), "quick": wanted.quick}
    rows: list[dict[str, Any]] = []
    for part in wanted.only:
        rows += [row | about for row in measure(part, wanted.quick)]
        files.write_json(ROOT / "bench" / "results.json", rows)
    files.write_text(ROOT / "bench" / "results.md", markdown(rows, about))
    sys.stdout.write(markdown(rows, about))


if __name__ == "__main__":
    main()

"""Measure how soon `main.py --help` answers, and how long each stage of the quickstart takes. The
lines of its log mark the ends of the stages.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from typing import Any

from common import ROOT, interleaved

# Text on stderr that marks the end of a stage -> the name of the stage and its purpose.
STAGES = {
    "papers to train on": (
        "start: Python, torch and transformers are imported, papers read and checked for overlap"
    ),
    "training on": "benchmark before training, the reference every gain is measured from",
    "best validation": "training with its validations and checkpoints",
    "the trained model is": "benchmark after training, and of the encoder as its authors use it",
}


def help_seconds() -> float:
    """Return the seconds until `python main.py --help` has answered."""
    command = [sys.executable, str(ROOT / "main.py"), "--help"]
    return interleaved(
        {"help": lambda: subprocess.run(command, check=True, capture_output=True)}, 5
    )["help"]


def quickstart_stages() -> dict[str, float]:
    """Return the seconds of each stage of one quickstart run."""
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "main.py"), "--output-dir", f"{folder}/run"]
        started = last = time.perf_counter()
        with subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        ) as process:
            assert process.stderr is not None
            for line in process.stderr:
                for mark, stage in STAGES.items():
                    if mark in line and stage not in found:
                        found[stage], last = (
                            round(time.perf_counter() - last, 2),
                            time.perf_counter(),
                        )
        assert process.returncode == 0
    return found | {
        "result page": round(time.perf_counter() - last, 2),
        "all": round(time.perf_counter() - started, 2),
    }


def run(quick: bool) -> list[dict[str, Any]]:
    """Measure both, and return two rows, which have no peer."""
    seconds = help_seconds()
    sys.stderr.write(f"main.py --help: {seconds:.2f} s\n")
    stages = quickstart_stages()
    return [
        {
            "operation": "start_up_help",
            "ours_s": round(seconds, 3),
            "goal": 1.0,
            "unit": "seconds, below the goal is good",
        },
        {
            "operation": "quickstart_stages",
            "ours_s": stages["all"],
            "goal": None,
            "unit": "seconds",
            "stages": stages,
        },
    ]

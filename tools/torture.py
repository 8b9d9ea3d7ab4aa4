"""Does every kind of fault to the scripts, again and again, and writes how often they recovered:
docs/reliability.md (`make torture`, within 40 minutes).

python tools/torture.py                                   all of it
python tools/torture.py --only kill-generation --times 2  one kind, twice; writes nothing, prints the
table

The faults themselves are in tests/killing.py (training) and tests/faults.py (the rest); their first
lines say what "recovered" means.
"""

from __future__ import annotations

import datetime
import functools
import os
import platform
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from semcse import command_line, errors, files, run_folder

LISTED = ("bad-input", "nasty-paper")  # each trial is another entry of a list, not another draw
Trial = Callable[[Path, int], dict[str, Any]]


@dataclass(frozen=True)
class Command:
    """Do every kind of fault to the scripts and write docs/reliability.md; exit 1 if anything was
    lost.
    """

    # kinds to try, all if none is named; the table is then printed, not written
    only: tuple[str, ...] = ()
    times: int = 0  # trials of each kind; 0: as many as the table wants
    seed: int = 0  # of the moments and places of the faults
    output: str = "docs/reliability.md"  # where the table goes


@dataclass(frozen=True)
class Kind:
    """A row of the table."""

    name: str  # what the table calls it
    times: int
    trial: Trial


def kinds() -> dict[str, Kind]:
    """Every kind of fault by its name on the command line."""
    import faults
    import killing
    from hostile import NASTY

    killed, terminated = (
        functools.partial(killing.kill_and_resume_training, signal=name)
        for name in ("SIGKILL", "SIGTERM")
    )
    terminated_generation = functools.partial(faults.kill_generation, number=signal.SIGTERM)
    return {
        "bad-input": Kind("bad input, each of another kind", len(faults.BAD), faults.bad_input),
        "nasty-paper": Kind(
            "strange but right papers, each of another kind", len(NASTY), faults.nasty_paper
        ),
        "kill-generation": Kind("kill -9 in generation", 30, faults.kill_generation),
        "sigterm-generation": Kind("SIGTERM in generation", 10, terminated_generation),
        "disk-full-generation": Kind("disk full in generation", 10, faults.disk_full_generation),
        "corrupt-journal": Kind("damaged journal of a generation", 20, faults.corrupt_journal),
        "kill-embedding": Kind("kill -9 in embedding", 10, faults.kill_embedding),
        "kill-training": Kind("kill -9 in training", 30, killed),
        "sigterm-training": Kind("SIGTERM in training", 8, terminated),
        "disk-full-training": Kind("disk full in training", 6, killing.disk_full),
        "corrupt-checkpoint": Kind("damaged checkpoints", 8, killing.corrupt_checkpoint),
        "dead-rank": Kind("one of two training processes killed (-9)", 6, killing.dead_rank),
    }


def main() -> None:
    """Try everything, print as it goes, write the table."""
    command = command_line.parse_command_line(Command, None, Command())
    known = kinds()
    if unknown := sorted(set(command.only) - set(known)):
        raise errors.UserError(
            f"--only {unknown[0]} is no kind of fault", f"choose among {', '.join(known)}"
        )
    begun, outcomes = time.monotonic(), dict[str, list[dict[str, Any]]]()
    with tempfile.TemporaryDirectory() as folder:
        for name in command.only or known:
            most = known[name].times if name in LISTED else sys.maxsize
            numbers = range(min(command.times or known[name].times, most))
            outcomes[name] = [
                attempt(
                    known[name], Path(folder), number if name in LISTED else command.seed + number
                )
                for number in numbers
            ]
    minutes = (time.monotonic() - begun) / 60
    lines = table({known[name].name: tried for name, tried in outcomes.items()})
    print("\n".join(lines))
    if not command.only and not command.times:
        files.write_text(
            Path(command.output), "\n".join([*header(minutes), *lines, *footer(outcomes)]) + "\n"
        )
    if lost := sum(not one["recovered"] for tried in outcomes.values() for one in tried):
        raise errors.RunError(f"{lost} trials were lost", "see their lines above")


def attempt(kind: Kind, folder: Path, seed: int) -> dict[str, Any]:
    """One trial; one that cannot even be carried out counts as lost."""
    begun = time.monotonic()
    try:
        outcome = kind.trial(folder, seed)
    except Exception as error:
        outcome = {
            "fault": kind.name,
            "recovered": False,
            "detail": f"{type(error).__name__}: {error}"[:500],
        }
    said = (
        f"{kind.name} {seed}: {'recovered' if outcome['recovered'] else 'LOST'}"
        f" ({outcome['fault']}: {outcome['detail']}; {time.monotonic() - begun:.1f} s)"
    )
    print(errors.printable(said), file=sys.stderr, flush=True)
    return outcome


def table(outcomes: dict[str, list[dict[str, Any]]]) -> list[str]:
    """The Markdown table, and every lost trial by name."""
    lines = ["| fault | tried | lost | recovered |", "|---|---|---|---|"]
    for name, tried in outcomes.items():
        recovered = sum(one["recovered"] for one in tried)
        lines.append(f"| {name} | {len(tried)} | {len(tried) - recovered} | {recovered} |")
    lost = [
        f"- {name}: {one['fault']}: {one['detail']}"
        for name, tried in outcomes.items()
        for one in tried
        if not one["recovered"]
    ]
    return [*lines, *(["", "Lost:", "", *map(errors.printable, lost)] if lost else [])]


def header(minutes: float) -> list[str]:
    """What the figures are, and what they were made with."""
    versions = ", ".join(
        f"{name} {value}" for name, value in run_folder.versions().items() if value
    )
    return [
        "# Reliability",
        "",
        (
            f"Made by `make torture` on {datetime.date.today()} in {minutes:.0f} minutes:"
            f" {versions}; {_processor()}, {_memory()}, {platform.system()}."
        ),
        "",
        (
            "Every trial harms one run at a moment, place or way drawn by its number, gives the"
            " same command once more, and compares. Recovered: the harmed run"
        ),
        (
            "ended as documented, with its exit code and one error line; the second ended well;"
            " what it made is bit by bit what a run left alone makes (weights,"
        ),
        (
            "metrics and scores of training, papers file of generation, vectors of embedding); no"
            " answer of a language model that had arrived was asked for again."
        ),
        (
            "Training is a tiny model for 120 steps, generation 120 texts from a stand-in server"
            " that spoils a quarter of the requests. Bad input is recovered"
        ),
        (
            "from if the reader and a script refuse it in one printable line with exit code 2 and"
            " write nothing; a strange but right paper, if it comes out as it"
        ),
        "went in.",
        "",
    ]


def footer(outcomes: dict[str, list[dict[str, Any]]]) -> list[str]:
    """The kinds of bad input by name."""
    names = [one["fault"] for name in LISTED for one in outcomes[name]]
    return ["", "Kinds of bad input, and strange papers: " + "; ".join(names) + "."]


def _processor() -> str:
    found = (
        re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
        if Path("/proc/cpuinfo").exists()
        else None
    )
    return f"{os.cpu_count()} cores of {found[1] if found else platform.machine()}"


def _memory() -> str:
    return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"


if __name__ == "__main__":
    sys.exit(command_line.run_command(main))

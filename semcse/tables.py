"""Markdown tables of benchmark results, and the names of the tasks and of a run's result files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from semcse.bootstrap import RESAMPLES

# Result file of a run (without .json) -> its row in tables and its name in pictures.
ROWS = {
    "before": "before SemCSE training",
    "benchmark": "after SemCSE training",
    "recipe": "as its authors use it",
}

TASKS = ("title_abstract", "abstract_segments", "query", "clustering")


def main_score(task: str) -> str:
    """The score that tables show: "purity" (higher is better) or "mean_rank" (lower is better)."""
    return "purity" if task == "clustering" else "mean_rank"


def _digits(task: str) -> int:
    return 3 if task == "clustering" else 2


def table_lines(
    named: Mapping[str, Mapping[str, Any]], perf: Mapping[str, float | None] | None = None
) -> list[str]:
    """The lines of a table with one row per model: main scores with their 95% intervals.

    Args:
        named: row name -> object of benchmark.json; pool sizes in the head are those of the first.
        perf: row name -> Perf; adds a column.
    """
    tasks = next(iter(named.values()))["tasks"]
    rows = [["", *(_head(task, tasks[task]) for task in TASKS)]]
    rows += [
        [name, *(_cell(task, one["tasks"][task]) for task in TASKS)] for name, one in named.items()
    ]
    if perf:
        rows[0].append("Perf")
        for row in rows[1:]:
            value = perf.get(row[0])
            row.append("-" if value is None else f"{value:.3f}")
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]


def _head(task: str, result: Mapping[str, Any]) -> str:
    neighbors = f", k {result['k']}" if "k" in result else ""
    pool = f" (pool {result['pool']}{neighbors})" if "pool" in result else ""
    return f"{task}{pool} {'higher' if task == 'clustering' else 'lower'} is better"


def _cell(task: str, result: Mapping[str, Any]) -> str:
    score, digits = result[main_score(task)], _digits(task)
    if score is None:
        return "no data"
    low, high = result["ci95"]
    return f"{score:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def paired_lines(paired: list[dict[str, Any]]) -> list[str]:
    """The lines of a table of `semcse.bootstrap.paired_differences`; none for a single model."""
    if not paired:
        return []
    lines = [
        "",
        "Paired differences: the first model's values minus the second's on the same papers. An"
        " interval that does not contain 0 shows a difference.",
        "",
        f"| | {' | '.join(TASKS)} |",
        "|---" * 5 + "|",
    ]
    for row in paired:
        cells = [_difference(task, row["tasks"].get(task)) for task in TASKS]
        lines.append(f"| {' - '.join(row['models'])} | {' | '.join(cells)} |")
    return lines


def _difference(task: str, found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "no data"
    (low, high), digits = found["ci95"], _digits(task)
    return f"{found['difference']:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def markdown(title: str, table: list[str], notes: list[str]) -> str:
    """The text of benchmark.md: a title, a table, and a list of notes."""
    return "\n".join([f"# {title}", "", *table, "", *(f"- {note}" for note in notes), ""])


def notes_on(report: Mapping[str, Any]) -> list[str]:
    """What a reader of a table must know: the data, missing tasks, and left-out papers."""
    notes = [
        f"{report['n_papers']} papers of {report['eval_file']}; mean ranks and purity with"
        f" bootstrap 95% intervals over papers ({RESAMPLES} resamples)."
    ]
    for task, result in report["tasks"].items():
        if "reason" in result:
            notes.append(f"{task}: no data, {result['reason']}.")
        if result.get("left_out"):
            notes.append(f"{task}: {result['left_out']} papers left out.")
    return notes

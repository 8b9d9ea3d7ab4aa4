"""TODO: say what this file is for: semcse.tables."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    pass
from semcse.bootstrap import RESAMPLES

log = logging.getLogger(__name__)

# A run's result files: what tables call them; what pictures call them, with colour and marker.
ROWS = {
    "before": "before SemCSE training",
    "benchmark": "after SemCSE training",
    "recipe": "as its authors use it",
}

TASKS = ("title_abstract", "abstract_segments", "query", "clustering")


def main_score(task: str) -> str:
    """The score that tables show of a task: "purity" (higher is better) or "mean_rank" (lower is
    better).
    """
    return "purity" if task == "clustering" else "mean_rank"


def table_lines(
    named: Mapping[str, Mapping[str, Any]], perf: Mapping[str, float | None] | None = None
) -> list[str]:
    """A markdown table, one row a model: main scores with 95% intervals; the pools stand in the
    head.
    """
    some = next(iter(named.values()))["tasks"]
    heads = [_column_head(task, some[task]) for task in TASKS] + (["Perf"] if perf else [])
    rows = [["", *heads]]
    for name, result in named.items():
        perf_cell = [_number(perf.get(name), 3)] if perf else []
        rows.append([name, *(_cell(task, result["tasks"][task]) for task in TASKS), *perf_cell])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]


def paired_lines(paired: list[dict[str, Any]]) -> list[str]:
    """A markdown table of paired differences, headed; nothing for a single model."""
    if not paired:
        return []
    lines = [
        "",
        (
            "Paired differences: the first model's values minus the second's on the same papers; an"
            " interval without 0 is a difference."
        ),
        "",
    ]
    lines += [f"| | {' | '.join(TASKS)} |", "|---" * 5 + "|"]
    for row in paired:
        cells = [
            _difference_cell(task, row["tasks"][task]) if task in row["tasks"] else "no data"
            for task in TASKS
        ]
        lines.append(f"| {' - '.join(row['models'])} | {' | '.join(cells)} |")
    return lines


def _difference_cell(task: str, found: Mapping[str, Any]) -> str:
    digits = 3 if task == "clustering" else 2
    low, high = found["ci95"]
    return f"{found['difference']:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def _column_head(task: str, result: Mapping[str, Any]) -> str:
    pool = (
        f" (pool {result['pool']}" + (f", k {result['k']})" if "k" in result else ")")
        if "pool" in result
        else ""
    )
    return f"{task}{pool} {'higher' if task == 'clustering' else 'lower'} is better"


def _cell(task: str, result: Mapping[str, Any]) -> str:
    score, digits = result[main_score(task)], 3 if task == "clustering" else 2
    if score is None:
        return "no data"
    return (
        f"{_number(score, digits)}"
        f" [{', '.join(_number(bound, digits) for bound in result['ci95'])}]"
    )


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def markdown(title: str, table: list[str], notes: list[str]) -> str:
    """The text of benchmark.md."""
    return "\n".join([f"# {title}", "", *table, "", *(f"- {note}" for note in notes), ""])


def notes_on(report: Mapping[str, Any]) -> list[str]:
    """What a reader of a table must know: data, sizes, left-out papers, missing tasks."""
    tasks = report["tasks"]
    notes = [
        f"{report['n_papers']} papers of {report['eval_file']}; mean ranks and purity with"
        f" bootstrap 95% intervals over papers ({RESAMPLES} resamples)."
    ]
    notes += [
        f"{name}: no data, {task['reason']}." for name, task in tasks.items() if "reason" in task
    ]
    notes += [
        f"{name}: {task['left_out']} papers left out."
        for name, task in tasks.items()
        if task.get("left_out")
    ]
    return notes

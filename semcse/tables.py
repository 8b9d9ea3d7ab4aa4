"""Markdown tables of benchmark results, and the names of the tasks and of a run's result files."""

from collections.abc import Mapping, Sequence
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
    """Return a task's main score: "purity" (higher is better) or "mean_rank" (lower is better)."""
    return "purity" if task == "clustering" else "mean_rank"


def markdown_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table, its columns padded. The first row is its head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [f"| {' | '.join(map(str.ljust, row, widths))} |" for row in rows]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return [lines[0], rule, *lines[1:]]


def table_lines(
    named: Mapping[str, Mapping[str, Any]], perf: Mapping[str, float | None] | None = None
) -> list[str]:
    """Return the lines of a table with one row per model: main scores with their 95% intervals.

    Args:
        named: Row name -> object of benchmark.json; pool sizes in the head are those of the first.
        perf: Row name -> Perf; adds a column.
    """
    tasks = next(iter(named.values()))["tasks"]
    rows = [["", *(_head(task, tasks[task]) for task in TASKS)]]
    for name, one in named.items():
        rows.append([name, *(_cell(task, one["tasks"][task], main_score(task)) for task in TASKS)])
    if perf:
        rows[0].append("Perf")
        for row in rows[1:]:
            value = perf.get(row[0])
            row.append("-" if value is None else f"{value:.3f}")
    return markdown_table(rows)


def _head(task: str, result: Mapping[str, Any]) -> str:
    neighbours = f", k {result['k']}" if "k" in result else ""
    pool = f" (pool {result['pool']}{neighbours})" if "pool" in result else ""
    return f"{task}{pool} {'higher' if task == 'clustering' else 'lower'} is better"


def _cell(task: str, result: Mapping[str, Any], key: str, sign: str = "") -> str:
    """Return the value `key` of a task with its interval; `sign` "+" is for differences."""
    if result.get(key) is None:
        return "no data"
    form = f"{sign}.{3 if task == 'clustering' else 2}f"
    low, high = result["ci95"]
    return f"{result[key]:{form}} [{low:{form}}, {high:{form}}]"


def paired_lines(paired: list[dict[str, Any]]) -> list[str]:
    """Return the lines of a table of `bootstrap.paired_differences`; none for a single model."""
    if not paired:
        return []
    rows = [["", *TASKS]]
    for pair in paired:
        cells = [_cell(task, pair["tasks"].get(task, {}), "difference", "+") for task in TASKS]
        rows.append([" - ".join(pair["models"]), *cells])
    text = (
        "Paired differences: the first model's values minus the second's on the same papers. An"
        " interval that does not contain 0 shows a difference."
    )
    return ["", text, "", *markdown_table(rows)]


def markdown(title: str, table: list[str], notes: list[str]) -> str:
    """Return the text of benchmark.md: a title, a table, and a list of notes."""
    return "\n".join([f"# {title}", "", *table, "", *(f"- {note}" for note in notes), ""])


def notes_on(report: Mapping[str, Any]) -> list[str]:
    """Return what a reader of a table must know: the data, missing tasks, and left-out papers."""
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

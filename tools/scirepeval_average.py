"""The category scores and the average of SciRepEval, as SemCSE's paper reports them, from the
result file of SciRepEval's own code.

    python tools/scirepeval_average.py scirepeval_results.json --s2and 93.0

How the paper forms them is not stated. Inferred: the weights from its twelve rows, which they
reproduce; the rest from public result files of two of its models (docs/other_harnesses.md). A
task's score is the mean over its metrics; a task with few-shot runs counts half by its complete
run, half by the mean of those. The ninth proximity task, S2AND, has a script and a result file of
its own.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))

from semcse import command_line, errors, files

WEIGHTS = {"classification": 6, "regression": 5, "proximity": 9, "search": 3}  # numbers of tasks
Metrics = tuple[str, ...]
# Category -> task of scirepeval_tasks.jsonl -> its metrics.
TASKS: dict[str, dict[str, Metrics]] = {
    "classification": {
        "Biomimicry": ("f1",),
        **dict.fromkeys(
            ["DRSM", "SciDocs MAG", "SciDocs MeSH", "Fields of study", "MeSH"], ("f1_macro",)
        ),
    },
    "regression": dict.fromkeys(
        ["Peer Review Score", "Max hIndex", "Tweet Mentions", "Citation Count", "Publication Year"],
        ("kendalltau",),
    ),
    "proximity": {
        **dict.fromkeys(
            ["SciDocs Cite", "SciDocs CoView", "SciDocs CoCite", "SciDocs CoRead"], ("map", "ndcg")
        ),
        **dict.fromkeys(["Same Author Detection", "Highly Influential Citations"], ("map",)),
        "RELISH": ("ndcg",),
        "Paper-Reviewer Matching": ("hard_P_5", "hard_P_10", "soft_P_5", "soft_P_10"),
    },
    "search": dict.fromkeys(["Search", "TREC-CoVID", "NFCorpus"], ("ndcg",)),
}
FEW_SHOT = ("Biomimicry", "DRSM", "Fields of study")


@dataclass(frozen=True)
class Command:
    """Print the category scores and the average of a SciRepEval result file."""

    results: tyro.conf.Positional[str]  # the JSON file that scirepeval.py wrote
    s2and: float | None = None  # B3 F1 in percent, of SciRepEval's separate S2AND script


def average(categories: Mapping[str, float | None]) -> float | None:
    """The mean of the four category scores, weighted 6 : 5 : 9 : 3; None if one is missing."""
    scores = {category: categories.get(category) for category in WEIGHTS}
    known = {category: score for category, score in scores.items() if score is not None}
    return (
        sum(WEIGHTS[category] * score for category, score in known.items()) / sum(WEIGHTS.values())
        if len(known) == len(WEIGHTS)
        else None
    )


def category_scores(
    results: Mapping[str, Any], s2and: float | None = None
) -> tuple[dict[str, float | None], list[str]]:
    """(category -> mean over all its tasks, None where a task has no score; the reasons).

    Args:
        results: task -> its results, or {"complete": results, "few_shot": [{"results": results},
            ...]}, in percent.
        s2and: score of the ninth proximity task; without it the mean is over the eight others.
    """
    categories: dict[str, float | None] = {}
    reasons = []
    for category, tasks in TASKS.items():
        scores = {
            task: task_score(results.get(task), metrics, task in FEW_SHOT)
            for task, metrics in tasks.items()
        }
        missing = [task for task, score in scores.items() if score is None]
        reasons += [
            f"{category}: {task}: {_reason(results.get(task), tasks[task])}" for task in missing
        ]
        known = [score for score in scores.values() if score is not None] + (
            [s2and] if category == "proximity" and s2and is not None else []
        )
        categories[category] = None if missing else math.fsum(known) / len(known)
    return categories, reasons


def task_score(result: Any, metrics: Metrics, few_shot: bool) -> float | None:
    """A task's score in percent; None if a metric or a run is missing or not a number."""
    if not isinstance(result, dict):
        return None
    if not few_shot:
        values = [
            value
            for metric in metrics
            if isinstance(value := result.get(metric), (int, float)) and math.isfinite(value)
        ]
        return math.fsum(values) / len(values) if len(values) == len(metrics) else None
    runs = result.get("few_shot")
    shots = (
        [task_score(run.get("results"), metrics, False) for run in runs if isinstance(run, dict)]
        if isinstance(runs, list)
        else []
    )
    known = [shot for shot in shots if shot is not None]
    complete = task_score(result.get("complete"), metrics, False)
    return (
        None
        if complete is None or not known or len(known) < len(shots)
        else (complete + math.fsum(known) / len(known)) / 2
    )


def _reason(result: Any, metrics: Metrics) -> str:
    if result is None:
        return "not in the file"
    return (
        f"failed: {result['error']}"
        if isinstance(result, dict) and "error" in result
        else f"lacks {' or '.join(metrics)}, or its few-shot runs"
    )


def report_lines(results: Mapping[str, Any], s2and: float | None) -> list[str]:
    """The table row of a result file, and what a reader must know about it."""
    categories, reasons = category_scores(results, s2and)
    scores = categories | {"average": average(categories)}
    lines = [f"| {' | '.join(scores)} |", "|---" * len(scores) + "|"]
    lines += [
        (
            f"| {' | '.join('no data' if score is None else f'{score:.2f}' for score in scores.values())} |"
        ),
        "",
    ]
    lines += [f"- {reason}; no mean is formed without it." for reason in reasons]
    lines += [
        f"- {task}: not one of the 22 tasks, left out."
        for task in results
        if not any(task in tasks for tasks in TASKS.values())
    ]
    if s2and is None:
        lines.append(
            "- S2AND is scored by a script of its own: without --s2and proximity is over eight"
            " tasks, about 1.5 lower than the paper's column."
        )
    return lines


def main() -> None:
    """The script: parse, read, print."""
    command = command_line.parse_command_line(Command, None, Command(""))
    if command.s2and is not None and not 0 <= command.s2and <= 100:
        raise errors.UserError(f"--s2and {command.s2and} is not in percent", "give 0 to 100")
    results = files.read_json(Path(command.results))
    if not isinstance(results, dict):
        raise errors.UserError(
            f"{command.results}: not an object of tasks", "give the file that scirepeval.py wrote"
        )
    print("\n".join(report_lines(results, command.s2and)))


if __name__ == "__main__":
    sys.exit(command_line.run_command(main))

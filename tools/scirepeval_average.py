"""Form the category scores and the average that the SemCSE table reports from the result file of
SciRepEval's own code.

    python tools/scirepeval_average.py scirepeval_results.json --s2and 93.0

The authors' README, model card and main.py do not contain the formulas. We inferred the weights of
the average from the twelve rows of the table, which they reproduce, and the category scores from
public result files of two of its models (docs/other_harnesses.md). The score of a task is the mean
over its metrics. For a task with few-shot runs it is the mean of the complete run and of the mean
few-shot run. The ninth proximity task, S2AND, has a separate script and result file.
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

from semcse import command_line, files
from semcse.errors import UserError

WEIGHTS = {"classification": 6, "regression": 5, "proximity": 9, "search": 3}  # numbers of tasks
# Category, metrics, and the tasks of scirepeval_tasks.jsonl with these metrics.
TASKS = (
    ("classification", ["f1"], ["Biomimicry"]),
    ("classification", ["f1_macro"], ["DRSM", "SciDocs MAG", "SciDocs MeSH"]),
    ("classification", ["f1_macro"], ["Fields of study", "MeSH"]),
    ("regression", ["kendalltau"], ["Peer Review Score", "Max hIndex", "Tweet Mentions"]),
    ("regression", ["kendalltau"], ["Citation Count", "Publication Year"]),
    ("proximity", ["map", "ndcg"], ["SciDocs Cite", "SciDocs CoView"]),
    ("proximity", ["map", "ndcg"], ["SciDocs CoCite", "SciDocs CoRead"]),
    ("proximity", ["map"], ["Same Author Detection", "Highly Influential Citations"]),
    ("proximity", ["ndcg"], ["RELISH"]),
    ("proximity", ["hard_P_5", "hard_P_10", "soft_P_5", "soft_P_10"], ["Paper-Reviewer Matching"]),
    ("search", ["ndcg"], ["Search", "TREC-CoVID", "NFCorpus"]),
)
FEW_SHOT = ("Biomimicry", "DRSM", "Fields of study")


@dataclass(frozen=True)
class Command:
    """Print the category scores and the average of a SciRepEval result file."""

    results: tyro.conf.Positional[str]  # the JSON file that scirepeval.py wrote
    s2and: float | None = None  # B3 F1 in percent, from SciRepEval's separate S2AND script


def average(categories: Mapping[str, float | None]) -> float | None:
    """The mean of the four category scores, weighted 6 : 5 : 9 : 3; None if one is missing."""
    scores = {name: score for name, score in categories.items() if score is not None}
    if len(scores) < len(WEIGHTS):
        return None
    return sum(WEIGHTS[name] * score for name, score in scores.items()) / sum(WEIGHTS.values())


def category_scores(
    results: Mapping[str, Any], s2and: float | None = None
) -> tuple[dict[str, float | None], list[str]]:
    """The mean over all tasks of each category.

    Args:
        results: task -> metric -> percent, or for a few-shot task {"complete": metrics,
            "few_shot": [{"results": metrics}, ...]}.
        s2and: score of the ninth proximity task; without it the mean is over the eight others.

    Returns:
        Category -> score, None if one of its tasks has no score; and the reasons for this.
    """
    scores: dict[str, list[float | None]] = {category: [] for category in WEIGHTS}
    if s2and is not None:
        scores["proximity"].append(s2and)
    reasons = []
    for category, metrics, tasks in TASKS:
        for task in tasks:
            score = task_score(results.get(task), metrics, task in FEW_SHOT)
            scores[category].append(score)
            if score is None:
                reasons.append(f"{category}: {task}: {_reason(results.get(task), metrics)}")
    return {category: _mean(values) for category, values in scores.items()}, reasons


def task_score(result: Any, metrics: list[str], few_shot: bool) -> float | None:
    """The score of a task in percent; None if a metric or run is missing or is not a number."""
    if not isinstance(result, dict):
        return None
    if not few_shot:
        return _mean([result.get(metric) for metric in metrics])
    runs = result.get("few_shot") or []
    shots = _mean([task_score(run.get("results"), metrics, False) for run in runs])
    return _mean([task_score(result.get("complete"), metrics, False), shots])


def _mean(values: list[Any]) -> float | None:
    """The mean; None without values, or if one of them is not a finite number."""
    if not values or not all(isinstance(x, int | float) and math.isfinite(x) for x in values):
        return None
    return math.fsum(values) / len(values)


def _reason(result: Any, metrics: list[str]) -> str:
    if result is None:
        return "not in the file"
    if isinstance(result, dict) and "error" in result:
        return f"failed: {result['error']}"
    return f"lacks {' or '.join(metrics)}, or its few-shot runs"


def report_lines(results: Mapping[str, Any], s2and: float | None) -> list[str]:
    """The table row of a result file, and what a reader must know about it."""
    categories, reasons = category_scores(results, s2and)
    scores = categories | {"average": average(categories)}
    cells = ["no data" if score is None else f"{score:.2f}" for score in scores.values()]
    lines = [f"| {' | '.join(scores)} |", "|---" * 5 + "|", f"| {' | '.join(cells)} |", ""]
    lines += [f"- {reason}; the category has no mean without it." for reason in reasons]
    known = {task for _, _, tasks in TASKS for task in tasks}
    lines += [
        f"- {task}: not one of the 22 tasks, left out." for task in results if task not in known
    ]
    if s2and is None:
        lines.append(
            "- S2AND is scored by a separate script. Without --s2and, proximity is the mean of the"
            " eight other tasks, about 1.5 lower than in the published column."
        )
    return lines


def main() -> None:
    """Read a result file and print its scores."""
    command = command_line.parse_command_line(Command, None, Command(tyro.MISSING))
    if command.s2and is not None and not 0 <= command.s2and <= 100:
        raise UserError(f"--s2and {command.s2and} is not in percent", "give 0 to 100")
    results = files.read_json(Path(command.results))
    if not isinstance(results, dict):
        raise UserError(
            f"{command.results}: is not an object of tasks",
            "give the file that scirepeval.py wrote",
        )
    print("\n".join(report_lines(results, command.s2and)))


if __name__ == "__main__":
    sys.exit(command_line.run_command(main))

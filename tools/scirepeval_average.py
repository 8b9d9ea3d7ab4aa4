"""Form the category scores and the average that the SemCSE table reports from the result file of
SciRepEval's own code.

    python tools/scirepeval_average.py scirepeval_results.json --s2and 93.0

The authors' README, model card and main.py do not contain the formulas. We inferred the weights of
the average from the twelve rows of the table, which they reproduce, and the category scores from
public result files of two of its models (docs/other_harnesses.md). The ninth proximity task, S2AND,
has a separate script and result file.
"""

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import StatisticsError, fmean
from typing import Any

import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))

from semcse import command_line, files
from semcse.tables import markdown_table

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


def average(categories: Mapping[str, float]) -> float:
    """Return the mean of the four scores, weighted 6 : 5 : 9 : 3; NaN if one of them is NaN."""
    scores = [WEIGHTS[name] * score for name, score in categories.items()]
    return sum(scores) / sum(WEIGHTS.values())


def category_scores(
    results: Mapping[str, Any], s2and: float | None = None
) -> tuple[dict[str, float], list[str]]:
    """Compute the mean over all tasks of each category.

    Args:
        results: Task -> metric -> percent, or for a few-shot task {"complete": metrics,
            "few_shot": [{"results": metrics}, ...]}.
        s2and: Score of the ninth proximity task; without it the mean is over the eight others.

    Returns:
        Category -> score, NaN if a task has no score; and the names of the tasks without a score.
    """
    scores: dict[str, dict[str, float]] = {category: {} for category in WEIGHTS}
    for category, metrics, tasks in TASKS:
        scores[category] |= {task: task_score(results, task, metrics) for task in tasks}
    if s2and is not None:
        scores["proximity"]["S2AND"] = s2and
    missing = [task for one in scores.values() for task, score in one.items() if math.isnan(score)]
    return {category: fmean(one.values()) for category, one in scores.items()}, missing


def task_score(results: Mapping[str, Any], task: str, metrics: list[str]) -> float:
    """Return the mean over a task's metrics; NaN if the task failed or a metric or run is missing.

    For a few-shot task, it is the mean of the complete run and of the mean few-shot run.
    """
    try:
        result = results[task]
        if task not in FEW_SHOT:
            return fmean(result[metric] for metric in metrics)
        shots = [fmean(run["results"][metric] for metric in metrics) for run in result["few_shot"]]
        return fmean([fmean(result["complete"][metric] for metric in metrics), fmean(shots)])
    except (KeyError, TypeError, StatisticsError):
        return math.nan


def main() -> None:
    """Read a result file, and print its table row and what a reader must know about it."""
    command = command_line.parse_command_line(Command, None, Command(tyro.MISSING))
    categories, missing = category_scores(files.read_json(Path(command.results)), command.s2and)
    scores = categories | {"average": average(categories)}
    cells = ["no data" if math.isnan(score) else f"{score:.2f}" for score in scores.values()]
    print("\n".join([*markdown_table([list(scores), cells]), ""]))
    for task in missing:
        print(f"- {task} has no score in the file, so its category has none.")
    if command.s2and is None:
        print("- Without --s2and, proximity is about 1.5 lower than in the published column.")


if __name__ == "__main__":
    sys.exit(command_line.run_command(main))

"""The category scores and the average of SciRepEval results, against the published table."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, run_script

from tools.scirepeval_average import FEW_SHOT, WEIGHTS, average, category_scores

# Facts of the published table (arXiv 2507.13105, README of its repository): classification,
# regression, proximity, search, average.
PUBLISHED = {
    "SciBERT": (63.86, 27.34, 66.25, 68.19, 57.42),
    "SciDeBERTa": (60.99, 27.00, 62.74, 67.83, 55.18),
    "SPECTER": (67.73, 25.37, 80.05, 74.89, 64.28),
    "SciNCL": (68.04, 25.22, 81.18, 77.32, 65.08),
    "SPECTER2 (base)": (66.95, 27.75, 81.10, 78.42, 65.46),
    "SPECTER2 (proximity)": (66.37, 26.85, 81.41, 77.75, 65.15),
    "all-MiniLM-L6-v2": (64.04, 20.06, 80.74, 79.63, 63.05),
    "Jina-v2": (63.99, 23.76, 80.11, 80.40, 63.69),
    "Jina-v3": (65.66, 24.84, 79.98, 80.60, 64.34),
    "RoBERTa SimCSE": (67.16, 22.95, 75.51, 76.97, 62.10),
    "NvEmbed-V2": (65.62, 29.94, 81.16, 82.84, 66.19),
    "SemCSE": (69.52, 27.58, 80.21, 78.56, 65.76),
}
# Facts of SciRepEval's result files for two of those models (repository J0nasW/SciEmbed-release,
# results/scirepeval, MIT): task, its metrics, and the numbers of each model. For few-shot tasks
# these are the complete run and the two few-shot runs.
MODELS = ("SPECTER2 (base)", "SciNCL")
FACTS: list[tuple[str, str, tuple[float, ...], tuple[float, ...]]] = [
    ("Biomimicry", "f1", (74.21, 39.2054, 14.4871), (69.74, 40.1502, 21.2564)),
    ("DRSM", "f1_macro", (76.49, 55.6758, 43.3149), (74.73, 61.239, 49.6806)),
    ("Fields of study", "f1_macro", (42.16, 21.7554, 13.4559), (43.48, 30.0196, 22.3452)),
    ("SciDocs MAG", "f1_macro", (81.03,), (81.11,)),
    ("SciDocs MeSH", "f1_macro", (89.0,), (89.1,)),
    ("MeSH", "f1_macro", (86.75,), (86.16,)),
    ("Peer Review Score", "kendalltau", (20.84,), (20.06,)),
    ("Max hIndex", "kendalltau", (15.75,), (14.97,)),
    ("Tweet Mentions", "kendalltau", (27.71,), (27.58,)),
    ("Citation Count", "kendalltau", (38.43,), (34.72,)),
    ("Publication Year", "kendalltau", (35.58,), (30.02,)),
    ("RELISH", "ndcg", (91.63,), (90.67,)),
    (
        "Paper-Reviewer Matching",
        "hard_P_10 hard_P_5 soft_P_10 soft_P_5",
        (25.42, 34.02, 55.51, 66.73),
        (25.42, 34.21, 55.42, 66.54),
    ),
    ("SciDocs Cite", "map ndcg", (91.97, 96.69), (93.55, 97.35)),
    ("SciDocs CoView", "map ndcg", (85.52, 92.5), (85.28, 92.23)),
    ("SciDocs CoCite", "map ndcg", (91.7, 96.56), (91.66, 96.44)),
    ("SciDocs CoRead", "map ndcg", (87.17, 93.71), (87.69, 94.0)),
    ("Same Author Detection", "map", (87.0,), (87.47,)),
    ("Highly Influential Citations", "map", (44.96,), (43.39,)),
    ("NFCorpus", "ndcg", (72.03,), (70.85,)),
    ("TREC-CoVID", "ndcg", (89.46,), (87.67,)),
    ("Search", "ndcg", (73.76,), (73.46,)),
]


def result_file(model: str) -> dict[str, Any]:
    """The object that SciRepEval's code writes for one of MODELS."""
    results: dict[str, Any] = {}
    for task, metrics, *numbers in FACTS:
        values = numbers[MODELS.index(model)]
        if task in ("Biomimicry", "DRSM", "Fields of study"):
            shots = [{"results": {metrics: value}} for value in values[1:]]
            results[task] = {"complete": {metrics: values[0]}, "few_shot": shots}
        else:
            results[task] = dict(zip(metrics.split(), values, strict=True))
    return results


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_average_reproduces_the_published_rows(name: str) -> None:
    *scores, published = PUBLISHED[name]
    categories = dict(zip(WEIGHTS, scores, strict=True))
    assert average(categories) == pytest.approx(published, abs=0.006)
    assert math.isnan(average(categories | {"search": math.nan}))


@pytest.mark.parametrize("name", MODELS)
def test_categories_of_public_result_files_are_near_the_published_ones(name: str) -> None:
    """Two runs of one benchmark differ by their solvers. Other formulas (few-shot runs left out, or
    S2AND) are off by 1.5 to 8 points.
    """
    classification, regression, proximity, search, _ = PUBLISHED[name]
    found, missing = category_scores(result_file(name))
    assert missing == []
    assert found["classification"] == pytest.approx(classification, abs=0.3)
    assert found["regression"] == pytest.approx(regression, abs=0.3)
    assert found["search"] == pytest.approx(search, abs=0.01)
    s2and = 9 * proximity - 8 * found["proximity"]
    assert 92 < s2and < 95
    with_s2and, _ = category_scores(result_file(name), s2and)
    assert with_s2and["proximity"] == pytest.approx(proximity)


def test_categories_by_hand() -> None:
    results: dict[str, Any] = {}
    for task, metrics, *_ in FACTS:
        values = dict.fromkeys(metrics.split(), 50.0)
        few_shot = {"complete": values, "few_shot": [{"results": values}]}
        results[task] = few_shot if task in FEW_SHOT else values
    shots = [{"results": {"f1": 20.0}}, {"results": {"f1": 40.0}}]
    results["Biomimicry"] = {"complete": {"f1": 80.0}, "few_shot": shots}  # (80 + 30) / 2 = 55
    numbers = {"hard_P_5": 10.0, "hard_P_10": 20.0, "soft_P_5": 30.0, "soft_P_10": 100.0}
    results["Paper-Reviewer Matching"] = numbers  # 40
    results["SciDocs Cite"] = {"map": 40.0, "ndcg": 70.0}  # 55
    found, missing = category_scores(results, 70.0)
    assert missing == []
    proximity = (6 * 50 + 55 + 40 + 70) / 9
    expected = {"classification": 305 / 6, "regression": 50, "proximity": proximity, "search": 50}
    assert found == pytest.approx(expected)
    assert average(found) == pytest.approx((305 + 250 + 9 * proximity + 150) / 23)


FIFTY = {"f1_macro": 50.0}


@pytest.mark.parametrize(
    ("category", "task", "result"),
    [
        ("search", "Search", {"error": "CUDA out of memory"}),
        ("search", "Search", {"ndcg": math.nan}),
        ("search", "Search", {"map": 50.0}),
        ("search", "Search", 50.0),
        ("proximity", "SciDocs Cite", {"map": 50.0}),
        ("classification", "DRSM", {"complete": FIFTY, "few_shot": []}),
        (
            "classification",
            "DRSM",
            {"complete": FIFTY, "few_shot": [{"results": FIFTY}, {"results": {}}]},
        ),
        ("regression", "Max hIndex", None),
    ],
)
def test_a_category_has_no_mean_if_a_task_is_missing(category: str, task: str, result: Any) -> None:
    results = result_file("SciNCL") | {task: result}
    if result is None:
        del results[task]
    found, missing = category_scores(results, 93.0)
    assert [name for name, score in found.items() if math.isnan(score)] == [category]
    assert missing == [task]
    assert math.isnan(average(found))


def test_the_command_prints_the_row_and_what_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "scirepeval_results.json"

    def lines(results: Any, *words: str) -> list[str]:
        path.write_text(json.dumps(results), encoding="utf-8")
        done = run_script(ROOT / "tools/scirepeval_average.py", path, *words)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    results = result_file("SPECTER2 (base)")
    with_s2and = lines(results | {"Feeds-1": {"map": 80.0}}, "--s2and", "93.0")
    categories = ["classification", "regression", "proximity", "search", "average"]
    assert with_s2and[0].split()[1::2] == categories
    assert with_s2and[2].split()[1::2] == ["66.70", "27.66", "81.10", "78.42", "65.38"]
    assert with_s2and[4:] == []
    without = lines(results)
    assert without[2].split()[5] == "79.61"
    assert "--s2and" in without[-1]
    failed = lines(results | {"Search": {"error": "CUDA"}}, "--s2and", "93")
    assert failed[2].endswith("| no data | no data |")
    assert failed[4] == "- Search has no score in the file, so its category has none."


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    done = run_script(ROOT / "tools/scirepeval_average.py", tmp_path / "nowhere.json")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)

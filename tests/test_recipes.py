"""The scripts beside docs/experiments.md: the development split, and the command that repeats the
recipes.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, SHARED, make_paper, run_script

from semantic_benchmark import evaluate, read_evaluation_papers
from semcse.errors import UserError
from semcse.models import Wanted, load_model
from semcse.near_duplicates import SeenPapers
from semcse.papers import read_papers
from semcse.tables import TASKS, main_score
from settings import Settings

sys.path.insert(0, str(ROOT / "docs"))
reproduce_recipe: Any = importlib.import_module("reproduce_recipe")


def test_the_parts_of_the_split_share_no_paper() -> None:
    ids = json.loads((ROOT / "docs" / "development_ids.json").read_text(encoding="utf-8"))
    assert {part: len(found) for part, found in ids.items()} == {
        "evaluation": 1_100,
        "validation": 500,
        "more_validation": 800,
    }
    assert len(set().union(*ids.values())) == 2_400


@pytest.mark.skipif(not SHARED.is_dir(), reason="the development papers are not here")
def test_nothing_of_the_evaluation_stands_in_the_training_file(tmp_path: Path) -> None:
    done = run_script("tools/development_split.py", "--data", SHARED, "--output-dir", tmp_path)
    assert (
        done.stdout.strip() == "evaluation 1100, validation 500, more_validation 1300, train 2895"
    ), done.stderr
    evaluation = read_evaluation_papers(str(tmp_path / "evaluation.jsonl"))
    seen = SeenPapers(evaluation)
    assert not any(
        seen.reason(paper)
        for name in ("train", "more_validation")
        for paper in read_papers(tmp_path / f"{name}.jsonl")
    )
    assert sum(bool(paper.query) for paper in evaluation) == 200
    assert sum(bool(paper.field) for paper in evaluation) == 900


def test_the_recipes_table_holds_paired_differences_of_every_seed(
    tiny_bert: Path,
    papers_file: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(
        reproduce_recipe.RECIPES,
        "b",
        {
            "encoder": str(tiny_bert),
            "pooling": "mean",
            "metric": "cosine",
            "max_steps": 2,
            "validate_every": 1,
        },
    )
    train = papers_file(
        [{"id": f"train-{n}", "summaries": make_paper(n)["summaries"]} for n in range(40, 60)],
        "train.jsonl",
    )
    eval_file = papers_file([make_paper(n) for n in range(24)], "evaluation.jsonl")
    command = reproduce_recipe.Command(str(train.parent), str(tmp_path / "out"), seeds=2)
    lines = [line.split("|") for line in reproduce_recipe.recipe_lines("b", command)[4:-1]]
    rows = {cells[1].strip(): [cell.strip() for cell in cells[2:-1]] for cells in lines}

    papers = read_evaluation_papers(str(eval_file))
    names = {
        "reference": str(tiny_bert),
        "seed 0": str(tmp_path / "out/b-0/model"),
        "seed 1": str(tmp_path / "out/b-1/model"),
    }
    found = {
        row: evaluate(
            load_model(name, Wanted(), Settings(pooling="mean", metric="cosine"))[0], papers, 0
        )
        for row, name in names.items()
    }
    for row, evaluation in found.items():
        assert rows[row] == [
            f"{evaluation.report['tasks'][task][main_score(task)]:.3f}" for task in TASKS
        ]
    for column, task in enumerate(TASKS):
        values = {row: evaluation.per_paper[task] for row, evaluation in found.items()}
        assert (
            rows["seed 1 - reference"][column].split()[0]
            == f"{np.nanmean(values['seed 1'] - values['reference']):+.3f}"
        )
    means = [np.nanmean(found[f"seed {seed}"].per_paper["query"]) for seed in (0, 1)]
    assert (
        rows["mean and standard deviation over seeds"][2]
        == f"{np.mean(means):.3f} ± {np.std(means, ddof=1):.3f}"
    )

    def fail(*_: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(reproduce_recipe, "train", fail)
    assert (
        reproduce_recipe.recipe_lines("b", command)[4:-1][0].split("|")[2].strip()
        == rows["reference"][0]
    )
    monkeypatch.setitem(reproduce_recipe.RECIPES["b"], "max_steps", 3)
    with pytest.raises(UserError, match="other settings"):
        reproduce_recipe.recipe_lines("b", command)

"""The tools of docs/experiments.md: the split of the development papers, and the recipes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, SHARED, make_paper, run_script

from semantic_benchmark import evaluate, read_evaluation_papers
from semcse.encoder import Usage
from semcse.errors import UserError
from semcse.model_folder import load_encoder
from semcse.near_duplicates import SeenPapers
from semcse.papers import read_papers
from semcse.tables import TASKS, main_score
from tools import reproduce_recipe


def test_the_parts_of_the_split_share_no_paper() -> None:
    ids = json.loads((ROOT / "tools" / "development_ids.json").read_text(encoding="utf-8"))
    sizes = {part: len(found) for part, found in ids.items()}
    assert sizes == {"evaluation": 1_100, "validation": 500, "more_validation": 800}
    assert len(set().union(*ids.values())) == 2_400


@pytest.mark.skipif(not SHARED.is_dir(), reason="the development papers are missing")
def test_no_evaluation_paper_is_in_the_training_file(tmp_path: Path) -> None:
    words = ("--data", SHARED, "--output-dir", tmp_path)
    done = run_script(ROOT / "tools/development_split.py", *words)
    sizes = "evaluation 1100, validation 500, more_validation 1300, train 2895"
    assert done.stdout.strip() == sizes, done.stderr
    evaluation = read_evaluation_papers(str(tmp_path / "evaluation.jsonl"))
    seen = SeenPapers(evaluation)
    for name in ("train", "more_validation"):
        assert not any(map(seen.reason, read_papers(tmp_path / f"{name}.jsonl")))
    assert sum(bool(paper.query) for paper in evaluation) == 200
    assert sum(bool(paper.field) for paper in evaluation) == 900


def test_the_recipes_change_the_settings_of_the_quickstart() -> None:
    command = reproduce_recipe.Command("papers", "runs/recipe")
    a, b = (reproduce_recipe.recipe_settings(name, command, 2) for name in ("a", "b"))
    assert (a.pooling, a.metric, b.pooling, b.metric) == ("cls", "euclidean", "mean", "cosine")
    assert (a.loss, b.loss, a.batch_size, b.batch_size) == ("infonce", "infonce", 32, 32)
    assert (a.output_dir, a.seed, a.train_file) == ("runs/recipe/a-2", 2, "papers/train.jsonl")


def test_the_table_holds_the_paired_differences_of_every_seed(
    tiny_bert: Path,
    papers_file: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe: dict[str, Any] = {"encoder": str(tiny_bert), "pooling": "mean", "metric": "cosine"}
    recipe |= {"max_steps": 2, "validate_every": 1}
    monkeypatch.setitem(reproduce_recipe.RECIPES, "a", recipe)
    rows = [{"id": f"train-{n}", "summaries": make_paper(n)["summaries"]} for n in range(40, 60)]
    folder = papers_file(rows, "train.jsonl").parent
    eval_file = papers_file([make_paper(n) for n in range(24)], "evaluation.jsonl")
    command = reproduce_recipe.Command(str(folder), str(tmp_path / "out"), seeds=2)

    def table() -> dict[str, list[str]]:
        lines = [line.split("|") for line in reproduce_recipe.recipe_lines("a", command)[4:-1]]
        return {cells[1].strip(): [cell.strip() for cell in cells[2:-1]] for cells in lines}

    shown, papers = table(), read_evaluation_papers(str(eval_file))
    names = {"reference": tiny_bert}
    names |= {f"seed {seed}": tmp_path / f"out/a-{seed}/model" for seed in (0, 1)}
    usage = Usage("mean", "cosine", 512)
    found = {
        head: evaluate(load_encoder(str(name), usage), papers, 0) for head, name in names.items()
    }
    for head, one in found.items():
        tasks = one.report["tasks"]
        assert shown[head] == [f"{tasks[task][main_score(task)]:.3f}" for task in TASKS]
    for task, cell in zip(TASKS, shown["seed 1 - reference"], strict=True):
        differences = found["seed 1"].per_paper[task] - found["reference"].per_paper[task]
        assert cell.split()[0] == f"{np.nanmean(differences):+.3f}"
    means = [np.nanmean(found[f"seed {seed}"].per_paper["query"]) for seed in (0, 1)]
    cell = shown["mean and standard deviation over seeds"][2]
    assert cell == f"{np.mean(means):.3f} ± {np.std(means, ddof=1):.3f}"

    # A second call loads the trained models, and refuses those of other settings.
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*/model/*")}
    assert table() == shown
    assert before == {path: path.stat().st_mtime_ns for path in before}
    monkeypatch.setitem(recipe, "max_steps", 3)
    with pytest.raises(UserError, match="other settings"):
        table()

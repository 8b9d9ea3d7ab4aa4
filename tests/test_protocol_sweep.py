"""The protocol sweep: pool sizes and k that would bring a model to its published scores."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, make_paper, run_script

from semantic_benchmark import evaluate, read_evaluation_papers
from semcse.errors import UserError
from semcse.model_folder import BUNDLED
from semcse.models import load_model
from tools.protocol_sweep import implied_pool, published_scores

PUBLISHED = {  # of the bundled encoder, in the authors' table
    "title_abstract": 3.09,
    "abstract_segments": 8.19,
    "query": 1.11,
    "clustering": 0.73,
}


def test_the_implied_pool_is_the_size_at_which_random_pools_have_the_published_mean_rank() -> None:
    """In a pool of 41 of 401 candidates, each other candidate is present with probability 40/400,
    so that a mean rank of 21 becomes 3.
    """
    assert implied_pool(21.0, 401, 3.0) == pytest.approx(41)
    assert implied_pool(21.0, 401, 21.0) == pytest.approx(401)
    assert implied_pool(1.0, 401, 3.0) is None
    draw = np.random.default_rng(0)
    better = draw.integers(0, 41, size=20_000)  # candidates closer than the positive
    within_pool = 1 + draw.hypergeometric(better, 400 - better, 40)
    assert implied_pool(1 + better.mean(), 401, within_pool.mean()) == pytest.approx(41, rel=0.02)


def test_the_command_compares_a_model_with_its_published_scores(
    papers_file: Callable[..., Path], tmp_path: Path
) -> None:
    eval_file = papers_file([make_paper(n) for n in range(24)])
    output = tmp_path / "sweep.json"
    words = ("--model", BUNDLED, "--eval-file", eval_file, "--output", output, "--device", "cpu")
    done = run_script(ROOT / "tools/protocol_sweep.py", *words)
    assert done.returncode == 0, done.stderr
    found = json.loads(output.read_text(encoding="utf-8"))
    assert json.loads(done.stdout) == found
    fit = found[BUNDLED]
    assert fit.pop("published") == PUBLISHED
    assert set(fit) == {"abstract", "title + abstract"}
    papers = read_evaluation_papers(str(eval_file))
    tasks = evaluate(load_model(BUNDLED, device="cpu"), papers, 0).report["tasks"]
    for task in ("title_abstract", "abstract_segments", "query"):
        scores = tasks[task]
        pool = implied_pool(scores["mean_rank"], scores["pool"], PUBLISHED[task])
        assert fit["abstract"]["implied_pool"][task] == pytest.approx(pool)
    assert set(fit["title + abstract"]["implied_pool"]) == {"query"}
    assert fit["abstract"]["purity"]["10"] == pytest.approx(tasks["clustering"]["purity"])
    assert fit["title + abstract"]["purity"] != fit["abstract"]["purity"]
    for one in fit.values():
        gaps = {k: abs(purity - 0.73) for k, purity in one["purity"].items()}
        assert gaps[str(one["nearest_k"])] == min(gaps.values())


def test_a_model_without_published_scores_is_refused() -> None:
    assert published_scores(BUNDLED) == PUBLISHED
    with pytest.raises(UserError, match="SemCSE_cosine is not in the authors' table; name one of"):
        published_scores("SemCSE_cosine")
    done = run_script(ROOT / "tools/protocol_sweep.py")
    line = "error: no model is named; give --model NAME\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", line)

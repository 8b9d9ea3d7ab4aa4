"""docs/other_harnesses.md: every block is run here, against mteb itself where it is installed and against a stand-in of SciRepEval's interface."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, WORDS, make_paper, run_script, sentence
from sklearn.metrics.pairwise import euclidean_distances
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

import semantic_benchmark
from encoder import BUNDLED, Encoder, Usage, load_encoder
from files import UserError, parse_command_line
from load_data import Paper
from semantic_benchmark import Command, evaluate
from settings import Metric, Pooling

sys.path.insert(0, str(ROOT / "docs"))
scirepeval_average: Any = importlib.import_module("scirepeval_average")

PAGE = (ROOT / "docs" / "other_harnesses.md").read_text(encoding="utf-8")
FOLDER = "runs/quickstart-euclidean/model"  # what the page calls a trained model


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


def run_here(*words: str | Path) -> None:
    semantic_benchmark.run(parse_command_line(Command, [str(word) for word in words], Command()))


def some_papers(count: int) -> list[Paper]:
    rows = [make_paper(n) for n in range(count)]
    return [Paper(row["id"], row["title"], row["abstract"], query=row["query"], field=row["field"]) for row in rows]


# -- mteb ----------------------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_mteb_scores_a_trained_folder_by_its_own_distance(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], metric: Metric
) -> None:
    """The page's call on a tiny task: titles against abstracts. Its mean reciprocal rank is ours, and not that of the other distance."""
    mteb = pytest.importorskip("mteb", reason="mteb is not installed (docs/other_harnesses.md)")
    from datasets import Dataset
    from mteb.abstasks import AbsTaskRetrieval

    papers = some_papers(60)
    encoder = load_encoder(str(tiny_bert), Usage("mean", metric, 48), "cpu")
    stretch_lengths(encoder)
    encoder.save(tmp_path / FOLDER, base="tiny")

    class Titles(AbsTaskRetrieval):  # type: ignore[misc, unused-ignore]
        metadata = mteb.TaskMetadata(
            name="Titles", description="titles", type="Retrieval", category="t2t", eval_splits=["test"], eval_langs=["eng-Latn"], main_score="mrr_at_1000",
            dataset={"path": "none", "revision": "1"},
        )  # fmt: skip

        def load_data(self, **_: Any) -> None:
            ids = [paper.id for paper in papers]
            corpus = Dataset.from_dict({"id": ids, "title": [""] * len(papers), "text": [paper.abstract for paper in papers]})
            queries = Dataset.from_dict({"id": [f"q-{one}" for one in ids], "text": [paper.title for paper in papers]})
            data = {"corpus": corpus, "queries": queries, "relevant_docs": {f"q-{one}": {one: 1} for one in ids}, "top_ranked": None}
            self.dataset, self.data_loaded = {"default": {"test": data}}, True

    monkeypatch.setattr(mteb, "get_tasks", lambda tasks: [Titles()])
    monkeypatch.setenv("MTEB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (block,) = (block for block in blocks("python") if "import mteb" in block)
    assert len([line for line in block.splitlines() if line]) <= 5
    exec(block, {})
    found = float(re.findall(r"Titles ([0-9.]+)", capsys.readouterr().out)[0])

    def own(metric: Metric) -> float:
        encoder.usage = Usage("mean", metric, 48)
        return float(evaluate(encoder, papers, 0).report["tasks"]["title_abstract"]["mrr"])

    other: Metric = "cosine" if metric == "euclidean" else "euclidean"
    assert found == pytest.approx(own(metric), abs=1e-3)  # float32 may swap two near neighbours
    assert abs(found - own(other)) > 5e-3


def stretch_lengths(encoder: Encoder) -> None:
    """Widen one dimension of the last layer, so that vectors differ in length and the two distances in their order."""
    model: Any = encoder.model
    with torch.no_grad():
        model.encoder.layer[-1].output.LayerNorm.weight[:3] *= 5
        model.encoder.layer[-1].output.LayerNorm.bias += torch.linspace(-1, 1, 32)

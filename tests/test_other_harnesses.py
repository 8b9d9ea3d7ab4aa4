"""The commands and Python blocks of docs/other_harnesses.md are run here, with mteb itself if it is
installed, and with a stand-in that has SciRepEval's interface.
"""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, make_paper, run_script, sentence

from semantic_benchmark import evaluate
from semcse.encoder import Encoder, Usage
from semcse.errors import UserError
from semcse.model_folder import load_encoder, save_model
from semcse.papers import Paper
from semcse.types import Metric, Pooling
from tools.scirepeval_export import export_model

PAGE = (ROOT / "docs" / "other_harnesses.md").read_text(encoding="utf-8")
FOLDER = "runs/quickstart-euclidean/model"  # what the page calls a trained model
# in test_scirepeval_average.py
RUN_ELSEWHERE = "python tools/scirepeval_average.py scirepeval_results.json --s2and 93.0"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


def commands() -> list[list[str]]:
    return [line.split() for block in blocks("bash") for line in block.splitlines()]


def stretch_lengths(encoder: Encoder) -> None:
    """Widen one dimension of the last layer, so that vectors differ in length and the two distances
    in their order.
    """
    model: Any = encoder.model
    with torch.no_grad():
        model.encoder.layer[-1].output.LayerNorm.weight[:3] *= 5
        model.encoder.layer[-1].output.LayerNorm.bias += torch.linspace(-1, 1, 32)


def retrieval_task(mteb: Any, papers: list[Paper]) -> Any:
    """A small MTEB task: titles against abstracts."""
    from datasets import Dataset

    metadata = mteb.TaskMetadata(
        name="Titles",
        description="titles",
        type="Retrieval",
        category="t2t",
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        main_score="mrr_at_1000",
        dataset={"path": "none", "revision": "1"},
    )

    def load_data(task: Any, **_: Any) -> None:
        ids, abstracts = [paper.id for paper in papers], [paper.abstract for paper in papers]
        questions = {"id": [f"q-{one}" for one in ids], "text": [paper.title for paper in papers]}
        data = {
            "corpus": Dataset.from_dict({"id": ids, "title": [""] * len(ids), "text": abstracts}),
            "queries": Dataset.from_dict(questions),
            "relevant_docs": {f"q-{one}": {one: 1} for one in ids},
            "top_ranked": None,
        }
        task.dataset, task.data_loaded = {"default": {"test": data}}, True

    members = {"metadata": metadata, "load_data": load_data}
    return type("Titles", (mteb.abstasks.AbsTaskRetrieval,), members)()


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_mteb_scores_a_trained_folder_by_its_own_distance(
    tiny_bert: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    metric: Metric,
) -> None:
    """The page's call gives the mean reciprocal rank of our benchmark with the same distance, and
    not with the other one.
    """
    mteb = pytest.importorskip("mteb", reason="mteb is not installed (docs/other_harnesses.md)")
    rows = [make_paper(n) for n in range(60)]
    papers = [Paper(row["id"], row["title"], row["abstract"]) for row in rows]
    encoder = load_encoder(str(tiny_bert), Usage("mean", metric, 48), "cpu")
    stretch_lengths(encoder)
    save_model(encoder, tmp_path / FOLDER, base="tiny")
    monkeypatch.setattr(mteb, "get_tasks", lambda tasks: [retrieval_task(mteb, papers)])
    monkeypatch.setenv("MTEB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (block,) = (block for block in blocks("python") if "import mteb" in block)
    exec(block, {})
    found = float(re.findall(r"Titles ([0-9.]+)", capsys.readouterr().out)[0])
    ours: dict[str, float] = {}
    for each in ("euclidean", "cosine"):
        encoder.usage = Usage("mean", each, 48)
        ours[each] = evaluate(encoder, papers, 0).report["tasks"]["title_abstract"]["mrr"]
    other = "cosine" if metric == "euclidean" else "euclidean"
    assert found == pytest.approx(ours[metric], abs=1e-3)  # float32 may swap two near neighbours
    assert abs(found - ours[other]) > 5e-3


# SciRepEval: what its code asks of a model and of a folder, in our words. Fields are joined by the
# separator token, batches come with ids, the rows of a result are used one by one, and the results
# go to a file.
STAND_IN = """
import argparse, json
import torch
from transformers import AutoModel, AutoTokenizer

class Loaded:
    task_id, reqd_token_idx = None, 0
    def __init__(self, name, pooling):
        self.encoder = AutoModel.from_pretrained(f"{name}/model").eval()
        self.tokenizer = AutoTokenizer.from_pretrained(f"{name}/tokenizer")
        self.pooling = pooling
    def __call__(self, texts, ids=None):
        batch = self.tokenizer(
            texts, padding=True, truncation=True, max_length=512, return_tensors="pt",
            return_token_type_ids=False,
        )
        with torch.no_grad():
            hidden = self.encoder(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None]
        return hidden[:, 0] if self.pooling == "cls" else (hidden * mask).sum(1) / mask.sum(1)

class SciRepEval:
    def __init__(self, tasks_config="scirepeval_tasks.jsonl"):
        self.tasks = [json.loads(line) for line in open(tasks_config)]
    def evaluate(self, model, output):
        results = {}
        for task in self.tasks:
            model.task_id = "[PRX]"
            texts = [
                f" {model.tokenizer.sep_token} ".join(filter(None, (p["title"], p["abstract"])))
                for p in task["papers"]
            ]
            batches = [texts[i:i + 8] for i in range(0, len(texts), 8)]
            rows = [row for batch in batches for row in model(batch, [("id", "q")] * len(batch))]
            vectors = torch.stack([row.detach().cpu() for row in rows])
            order = torch.cdist(vectors, vectors).argsort(dim=1).tolist()
            results[task["name"]] = {"texts": texts, "vectors": vectors.tolist(), "order": order}
            json.dump(results, open(output, "w"))

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for flag, default in (("-m", ""), ("--pooling-mode", "cls"), ("--output", "")):
        parser.add_argument(flag, default=default)
    options = parser.parse_args()
    SciRepEval().evaluate(Loaded(options.m, options.pooling_mode), options.output)
"""


@pytest.fixture
def scirepeval(tmp_path: Path) -> Path:
    """A folder `scirepeval` next to a folder `semcse`, as on the page."""
    folder = tmp_path / "scirepeval"
    folder.mkdir()
    (tmp_path / "semcse").mkdir()
    (folder / "scirepeval.py").write_text(STAND_IN, encoding="utf-8")
    papers = [{"title": "a river query", "abstract": ""}]
    for n in range(12):
        abstract = sentence(*range(n, 9 * n + 3))
        papers.append({"title": make_paper(n)["title"], "abstract": abstract})
    task = json.dumps({"name": "RELISH", "papers": papers})
    (folder / "scirepeval_tasks.jsonl").write_text(task + "\n", encoding="utf-8")
    return folder


def check(results: Path, encoder: Encoder) -> None:
    """SciRepEval orders the neighbours of every paper as the model's own distance does on the same
    texts; its vectors differ from the model's in their length at most.
    """
    found = json.loads(results.read_text(encoding="utf-8"))["RELISH"]
    ours, theirs = encoder.embed(found["texts"]).vectors, torch.tensor(found["vectors"])
    if encoder.usage.metric == "cosine":
        ours = ours / ours.norm(dim=1, keepdim=True)
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
    order = torch.cdist(ours.double(), ours.double()).argsort(dim=1)
    assert found["order"] == order.tolist()


def test_an_exported_euclidean_model_gives_the_same_vectors_in_scirepeval(
    tiny_deberta: Path, scirepeval: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page's commands, in the two folders. The tokenizer of the tiny DeBERTa is the hardest one
    to export.
    """
    encoder = load_encoder(str(tiny_deberta), Usage("cls", "euclidean", 512), "cpu")
    home = scirepeval.parent / "semcse"
    save_model(encoder, home / FOLDER, base="tiny")
    export, score, average = commands()
    assert " ".join(average) == RUN_ELSEWHERE
    done = run_script(ROOT / export[1], *export[2:], cwd=home)
    assert done.returncode == 0, done.stderr
    assert "--pooling-mode cls" in done.stderr
    names = sorted(path.name for path in (home / "runs/scirepeval").iterdir())
    assert names == ["model", "tokenizer"]
    monkeypatch.chdir(scirepeval)
    monkeypatch.setattr("sys.argv", score[1:])
    runpy.run_path(score[1], run_name="__main__")
    check(scirepeval / "scirepeval_results.json", encoder)


@pytest.mark.parametrize(("pooling", "metric"), [("mean", "cosine"), ("cls", "euclidean")])
def test_the_wrapper_of_the_page_gives_the_same_vectors_in_scirepeval(
    tiny_bert: Path,
    scirepeval: Path,
    monkeypatch: pytest.MonkeyPatch,
    pooling: Pooling,
    metric: Metric,
) -> None:
    encoder = load_encoder(str(tiny_bert), Usage(pooling, metric, 40), "cpu")
    stretch_lengths(encoder)
    save_model(encoder, scirepeval.parent / "semcse/runs/quickstart-cosine/model", base="tiny")
    (block,) = (block for block in blocks("python") if "class Model" in block)
    monkeypatch.chdir(scirepeval)
    monkeypatch.syspath_prepend(scirepeval)
    monkeypatch.delitem(sys.modules, "scirepeval", raising=False)
    exec(block, {})
    check(scirepeval / "scirepeval_results.json", encoder)
    lengths = encoder.embed([sentence(1, 2), sentence(*range(30))]).vectors.norm(dim=1)
    assert lengths.max() / lengths.min() > 1.001  # so that raw vectors would have another order


@pytest.mark.parametrize(
    ("usage", "complaint"),
    [
        (Usage("cls", "cosine", 512), "metric is 'cosine'"),
        (Usage("mean", "euclidean", 256), "max_length is 256"),
        (Usage("cls", "euclidean", 512, query_prompt="find: "), "query_prompt is 'find: '"),
        (Usage("mean", "euclidean", 512, normalize=True), "normalize is True"),
        (Usage("last", "euclidean", 512), "cannot be saved"),
    ],
)
def test_a_model_that_scirepeval_would_use_in_another_way_is_not_exported(
    tiny_deberta: Path, tmp_path: Path, usage: Usage, complaint: str
) -> None:
    encoder = load_encoder(str(tiny_deberta), usage, "cpu")
    with pytest.raises(UserError, match=complaint):
        export_model(encoder, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_not_overwritten(tmp_path: Path) -> None:
    words = ("--model", "nowhere", "--output", tmp_path)
    done = run_script(ROOT / "tools/scirepeval_export.py", *words)
    line = f"error: --output {tmp_path} exists; name a new folder\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", line)

"""Saved folders opened by other versions of transformers and sentence-transformers.

The Python that SEMCSE_OLD_PYTHON names must give our vectors. docs/other_harnesses.md says how to
make such an environment, and what was found with which versions. Without the variable the tests
are skipped.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import WORDS, sentence
from model_files import write_roberta

from semcse.encoder import Usage
from semcse.model_folder import load_encoder, save_model
from semcse.types import Metric, Pooling

OLD_PYTHON = os.environ.get("SEMCSE_OLD_PYTHON", "")
# What a reader of the folder types, in words that old and new versions know. It prints the
# versions, the vectors by both libraries, and the similarity of the first two texts.
READER = """
import json, sys
import torch, transformers, sentence_transformers, tokenizers
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoTokenizer
folder, pooling = sys.argv[1:]
texts = json.load(sys.stdin)
tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
batch = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
with torch.no_grad():
    hidden = model(**batch).last_hidden_state
mask = batch["attention_mask"][..., None]
plain = hidden[:, 0] if pooling == "cls" else (hidden * mask).sum(1) / mask.sum(1)
theirs = SentenceTransformer(folder, device="cpu")
vectors = theirs.encode(texts, show_progress_bar=False, convert_to_tensor=True)
similarity = None
if hasattr(theirs, "similarity"):
    similarity = theirs.similarity(vectors[:1], vectors[1:2]).item()
libraries = (transformers, tokenizers, sentence_transformers, torch)
versions = {library.__name__: library.__version__ for library in libraries}
found = {"plain": plain.tolist(), "sentence": vectors.tolist()}
print("RESULT" + json.dumps(found | {"versions": versions, "similarity": similarity}))
"""
TEXTS = [
    sentence(*range(12)),
    "Soil, RIVER.",
    f"\ufb01nd o\ufb00ice \u2464 {WORDS[3]}\u200b\uff54wo",
    sentence(*range(40)) * 40,
    "a",
]


@pytest.fixture(scope="session")
def tiny_roberta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny_roberta")
    write_roberta(folder)
    return folder


@pytest.mark.skipif(not OLD_PYTHON, reason="SEMCSE_OLD_PYTHON names no Python")
@pytest.mark.parametrize("architecture", ["tiny_bert", "tiny_deberta", "tiny_roberta"])
@pytest.mark.parametrize(("pooling", "metric"), [("cls", "euclidean"), ("mean", "cosine")])
def test_a_saved_folder_gives_the_same_vectors_elsewhere(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
    architecture: str,
    pooling: Pooling,
    metric: Metric,
) -> None:
    base = request.getfixturevalue(architecture)
    encoder = load_encoder(str(base), Usage(pooling, metric, 512), "cpu")
    save_model(encoder, tmp_path / "model", base=architecture)
    ours = encoder.embed(TEXTS)
    assert ours.cut > 0, "a text must be cut, so that the maximum length is compared too"
    distances = torch.cdist(ours.vectors, ours.vectors).fill_diagonal_(9)
    assert distances.min() > 1e-3, "the vectors must tell the texts apart"
    done = subprocess.run(
        [OLD_PYTHON, "-c", READER, str(tmp_path / "model"), pooling],
        input=json.dumps(TEXTS),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    theirs = json.loads(done.stdout.partition("RESULT")[2])
    worst = {
        library: (torch.tensor(theirs[library]) - ours.vectors).abs().max().item()
        for library in ("plain", "sentence")
    }
    record_property("found", {"versions": theirs["versions"], "worst": worst})
    print(architecture, pooling, theirs["versions"], worst)
    assert max(worst.values()) < 1e-5
    if theirs["similarity"] is not None:
        a, b = ours.vectors[:2]
        expected = -torch.dist(a, b)
        if metric == "cosine":
            expected = torch.cosine_similarity(a, b, dim=0)
        assert theirs["similarity"] == pytest.approx(expected.item(), abs=1e-4)

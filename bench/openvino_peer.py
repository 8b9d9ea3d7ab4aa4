"""Embed texts with the OpenVINO backend of sentence-transformers. encoding.py runs this script in
.venv-openvino. It prints the best of two times and writes the vectors.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import time
from pathlib import Path

import numpy as np
from sentence_transformers import SentenceTransformer

folder, scratch = sys.argv[1], Path(sys.argv[2])
texts = json.loads((scratch / "texts.json").read_text(encoding="utf-8"))
model = SentenceTransformer(folder, backend="openvino", device="cpu", model_kwargs={"export": True})
model.max_seq_length = 512
model.encode(texts[:64], show_progress_bar=False)
best = float("inf")
for _ in range(2):
    started = time.perf_counter()
    vectors = model.encode(texts, show_progress_bar=False)
    best = min(best, time.perf_counter() - started)
np.save(scratch / "vectors.npy", vectors)
sys.stdout.write("\n" + json.dumps([best, importlib.metadata.version("openvino")]) + "\n")

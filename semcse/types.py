"""The values that settings and flags accept."""

from typing import Literal

Metric = Literal["euclidean", "cosine"]
Pooling = Literal["cls", "mean"]
Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["auto", "float32", "bf16"]

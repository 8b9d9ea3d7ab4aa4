"""TODO: say what this file is for: semcse.bootstrap."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    pass
from semcse.tables import TASKS

log = logging.getLogger(__name__)

RESAMPLES = 1_000  # of the bootstrap
Values = np.ndarray[Any, np.dtype[np.float64]]


def bootstrap_interval(values: Values, seed: int) -> tuple[float, float]:
    """Percentile 95% interval of the mean of `values` (n,), resampling them RESAMPLES times."""
    draw = np.random.default_rng(seed)
    means = [values[draw.integers(0, len(values), len(values))].mean() for _ in range(RESAMPLES)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def paired_difference(one: Values, other: Values, seed: int) -> tuple[float, tuple[float, float]]:
    """Mean of `one` - `other` over the papers that both have a value for, and its percentile
    bootstrap 95% interval: the same papers are drawn for both.

    Raises:
        ValueError: no paper has both.
    """
    differences = (one - other)[~np.isnan(one - other)]
    if not len(differences):
        raise ValueError("no paper has both values")
    return float(differences.mean()), bootstrap_interval(differences, seed)


def paired_differences(
    per_paper: Mapping[str, Mapping[str, Values]], seed: int
) -> list[dict[str, Any]]:
    """For every two models and every task that both have: the mean of the first's values minus the
    second's, with its 95% interval.
    """
    rows = []
    for (one, first), (other, second) in itertools.combinations(per_paper.items(), 2):
        tasks = [task for task in TASKS if not np.isnan(first[task] - second[task]).all()]
        found = {task: paired_difference(first[task], second[task], seed) for task in tasks}
        rows.append(
            {
                "models": [one, other],
                "tasks": {
                    task: {"difference": mean, "ci95": list(interval)}
                    for task, (mean, interval) in found.items()
                },
            }
        )
    return rows

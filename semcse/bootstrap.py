"""Bootstrap confidence intervals of means over papers, and of paired differences of two models."""

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 1_000
Values = NDArray[np.float64]


def bootstrap_interval(values: Values, seed: int) -> tuple[float, float]:
    """Return the percentile 95% interval of the mean of `values` (n,), from RESAMPLES resamples."""
    draw = np.random.default_rng(seed)
    means = [values[draw.integers(0, len(values), len(values))].mean() for _ in range(RESAMPLES)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def paired_difference(one: Values, other: Values, seed: int) -> tuple[float, tuple[float, float]]:
    """Return the mean of `one` - `other` and its bootstrap 95% interval over the differences.

    Args:
        one: (papers,) values of the first model.
        other: (papers,) values of the second model. A paper with NaN in either one is left out, and
            at least one paper must have both values.
        seed: Seed of the bootstrap.
    """
    differences = (one - other)[~np.isnan(one - other)]
    return float(differences.mean()), bootstrap_interval(differences, seed)


def paired_differences(
    per_paper: Mapping[str, Mapping[str, Values]], seed: int
) -> list[dict[str, Any]]:
    """Return the paired differences of every two models on the tasks that both have values for.

    Args:
        per_paper: Model -> task -> (papers,) values.
        seed: Seed of the bootstrap.

    Returns:
        For each pair {"models": [first, second], "tasks": {task: {"difference", "ci95"}}}.
    """
    rows = []
    for (one, first), (other, second) in itertools.combinations(per_paper.items(), 2):
        tasks = {}
        for task in first:
            if not np.isnan(first[task] - second[task]).all():
                mean, interval = paired_difference(first[task], second[task], seed)
                tasks[task] = {"difference": mean, "ci95": list(interval)}
        rows.append({"models": [one, other], "tasks": tasks})
    return rows

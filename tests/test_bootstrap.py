"""Bootstrap intervals of means and of paired differences, against theory and plain arithmetic."""

from __future__ import annotations

import numpy as np
import pytest

from semcse.bootstrap import bootstrap_interval, paired_difference, paired_differences

NAN = float("nan")


@pytest.mark.parametrize("papers", [400, 1600])
def test_the_interval_has_the_width_that_theory_gives(papers: int) -> None:
    values = np.random.default_rng(3).exponential(5.0, papers)
    low, high = bootstrap_interval(values, 0)
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * values.std() / papers**0.5, rel=0.1)


def test_the_interval_holds_the_quantiles_of_a_thousand_resamples() -> None:
    values = np.random.default_rng(3).exponential(5.0, 30)
    picks = np.random.default_rng(7).integers(0, 30, (1000, 30))
    plain = np.quantile(values[picks].mean(axis=1), [0.025, 0.975])
    assert bootstrap_interval(values, 7) == pytest.approx(tuple(plain))
    assert bootstrap_interval(values, 8) != bootstrap_interval(values, 7)


def test_a_paired_difference_is_over_the_papers_that_both_models_have() -> None:
    one, other = np.array([1.0, 5.0, NAN, 3.0, 90.0]), np.array([2.0, 6.0, 7.0, 4.0, NAN])
    # The models are 1 apart on each paper, however far the papers are from each other.
    assert paired_difference(one, other, 0) == (-1.0, (-1.0, -1.0))


def test_the_interval_of_a_paired_difference_ignores_what_the_papers_share() -> None:
    draw = np.random.default_rng(5)
    noise, shared = draw.normal(0.3, 1.0, size=400), draw.normal(100, 50, size=400)
    mean, interval = paired_difference(shared + noise, shared, 1)
    error = noise.std() / 20  # standard error of the mean of 400 values
    assert mean == pytest.approx(noise.mean())
    expected = (mean - 1.96 * error, mean + 1.96 * error)
    assert interval == pytest.approx(expected, abs=0.25 * error)


def test_every_two_models_are_compared_on_the_tasks_that_both_have() -> None:
    nothing = np.array([NAN, NAN])
    per_paper = {
        "a": {"query": np.array([1.0, 2.0]), "clustering": np.array([0.5, 0.5])},
        "b": {"query": np.array([3.0, 4.0]), "clustering": nothing},
        "c": {"query": np.array([3.0, 3.0]), "clustering": np.array([0.25, 0.25])},
    }
    found = paired_differences(per_paper, 0)
    assert [row["models"] for row in found] == [["a", "b"], ["a", "c"], ["b", "c"]]
    assert found[0]["tasks"] == {"query": {"difference": -2.0, "ci95": [-2.0, -2.0]}}
    assert found[1]["tasks"]["clustering"] == {"difference": 0.25, "ci95": [0.25, 0.25]}
    assert found[2]["tasks"]["query"]["difference"] == 0.5

"""The measures of bench/gold.py on values whose answer is known."""

import numpy as np
import pytest
import sklearn.metrics

from bench import gold as bench
from data_tools import gold
from data_tools.gold import Snippet


def snippet(label: int, again: int | None = None) -> Snippet:
    return Snippet("p", "1", "p.py", 1, 2, "0", label, "Why.", False, again)


def test_agreement_counts_those_labelled_twice_only() -> None:
    found = bench.agreement([snippet(0, 0), snippet(4, 5), snippet(9, 7), snippet(8, 8), snippet(3)])
    assert found["snippets"] == 4 and found["spearman"] == pytest.approx(0.8)
    assert found["mean absolute difference"] == 0.75
    assert (found["equal"], found["within 1"], found["within 2"]) == (0.5, 0.75, 1.0)
    assert found["same side of the threshold"] == 0.75  # 4 and 5 are on both sides of 5


def test_the_shipped_labels_agree_with_themselves() -> None:
    found = bench.agreement(gold.load())
    assert found["snippets"] == 60 and found["spearman"] > 0.8 and found["mean absolute difference"] < 1


def test_the_package_alone_tells_all_nothing_or_is_not_asked() -> None:
    packages = np.array(["a"] * 4 + ["b"] * 4)
    assert bench.by_package_alone(np.array([1, 1, 1, 1, 0, 0, 0, 0]), packages) == 1.0
    # The others always say the opposite.
    assert bench.by_package_alone(np.array([1, 1, 0, 0, 1, 1, 0, 0]), packages) == 0.0


def test_pairs_within_packages_know_nothing_of_the_packages() -> None:
    packages = np.array(["a"] * 4 + ["b"] * 4)
    labels = np.array([1, 0, 0, 0, 1, 1, 1, 0])
    assert bench.within_packages(labels, np.array([1, 0, 0, 0, 9, 9, 9, 8.0]), packages) == 1.0
    assert bench.within_packages(labels, np.array([0, 0, 0, 0, 9, 9, 9, 9.0]), packages) == 0.5  # the package's score


def test_auc_is_what_scikit_learn_says() -> None:
    generator = np.random.default_rng(0)
    for decimals in (0, 1, 8):  # many ties, some, none
        labels = generator.integers(0, 2, 50)
        scores = (labels + generator.normal(size=50)).round(decimals)
        assert bench.auc(labels, scores) == pytest.approx(sklearn.metrics.roc_auc_score(labels, scores), abs=1e-12)


def test_intervals_over_whole_packages_are_wider() -> None:
    generator = np.random.default_rng(0)
    groups = np.repeat(np.arange(10), 20)
    labels = generator.integers(0, 2, 200) * (groups > 4)
    scores = labels + generator.normal(size=10)[groups] + generator.normal(size=200)
    rows = np.arange(200)
    low, high = bench.interval(labels, scores, rows, resamples=200)
    assert low < bench.auc(labels, scores) < high
    assert bench.interval(labels, scores, rows, resamples=200) == (low, high)
    wide = bench.interval(labels, scores, groups, resamples=200)
    assert wide[1] - wide[0] > high - low


def test_calibration_of_a_right_and_of_a_boastful_probability() -> None:
    generator = np.random.default_rng(0)
    true = generator.uniform(size=4000)
    labels = (generator.uniform(size=4000) < true).astype(int)
    right, boastful = (bench.calibration(labels, p) for p in (true, np.round(true)))
    assert right["calibration error"] < 0.03 < 0.2 < boastful["calibration error"]
    assert right["brier"] < boastful["brier"] < right["brier of a constant"] + 0.15

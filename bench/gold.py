"""What the gold set's labels are worth, and what is worth something by them.

    python bench/gold.py                                          # how the labels agree with themselves; what the
    package alone tells python bench/gold.py --annotations runs/gold/annotated-llm    # another annotator's scores of
    the same snippets python bench/gold.py --embeddings runs/gold/embedded          # classifiers on embeddings,
    cross-validated python bench/gold.py --embeddings runs/gold/embedded --forest runs/gold/forest        # a forest on
    the held-out packages

Positive is a label of at least 5. Cross-validation sees no held-out snippet and keeps packages whole; it is what
settings are chosen by. Held-out snippets are looked at with --forest only, and with --annotations, where nothing was
learned from labels.
"""

import argparse
import hashlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import rankdata, spearmanr
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_tools import classify, gold
from data_tools.dataset import Dataset
from data_tools.gold import Snippet

POSITIVE = 5
"""Label from which on a snippet is positive."""
_FOLDS = 10
Array = Any  # numpy.ndarray


def agreement(snippets: Sequence[Snippet]) -> dict[str, float]:
    """Of the snippets labelled twice, the first label against the second."""
    pairs = np.array([(s.label, s.again) for s in snippets if s.again is not None])
    apart = np.abs(pairs[:, 0] - pairs[:, 1])
    sides = (pairs >= POSITIVE).astype(int)
    return {
        "snippets": len(pairs),
        "spearman": float(spearmanr(*pairs.T).statistic),
        "mean absolute difference": float(apart.mean()),
        "equal": float((apart == 0).mean()),
        "within 1": float((apart <= 1).mean()),
        "within 2": float((apart <= 2).mean()),
        "same side of the threshold": float((sides[:, 0] == sides[:, 1]).mean()),
    }


def by_package_alone(labels: Array, packages: Array) -> float:
    """AUC of guessing each snippet's class by the share of positives among the others of its package."""
    guess = np.empty(len(labels))
    for i in range(len(labels)):
        others = labels[(packages == packages[i]) & (np.arange(len(labels)) != i)]
        guess[i] = others.mean() if len(others) else labels.mean()
    return auc(labels, guess)


def within_packages(labels: Array, scores: Array, packages: Array) -> float:
    """Share of the pairs of a positive and another snippet of the same package that are in the right order (a tie:
    half).
    """
    right = pairs = 0.0
    for package in np.unique(packages):
        positive, other = (scores[(packages == package) & (labels == side)] for side in (1, 0))
        apart = positive[:, None] - other[None, :]
        right += (apart > 0).sum() + 0.5 * (apart == 0).sum()
        pairs += apart.size
    return float(right / pairs) if pairs else float("nan")


def auc(labels: Array, scores: Array) -> float:
    """Area under the ROC curve, from ranks, without scikit-learn's checks of its input, which thousands of resamples
    wait for.
    """
    positive = int(labels.sum())
    ranks = rankdata(scores)[labels == 1].sum()
    return float((ranks - positive * (positive + 1) / 2) / (positive * (len(labels) - positive)))


def interval(labels: Array, scores: Array, groups: Array, seed: int = 0, resamples: int = 2000) -> tuple[float, float]:
    """95% percentile bootstrap of the AUC; whole groups are resampled."""
    rng = np.random.default_rng(seed)
    members = [np.flatnonzero(groups == group) for group in np.unique(groups)]
    drawn: list[float] = []
    while len(drawn) < resamples:
        rows = np.concatenate([members[i] for i in rng.integers(0, len(members), len(members))])
        if 0 < labels[rows].sum() < len(rows):
            drawn.append(auc(labels[rows], scores[rows]))
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(low), float(high)


def calibration(labels: Array, probabilities: Array, bins: int = 5) -> dict[str, float]:
    """Brier score, that of the share of positives as a constant, and the expected calibration error over bins of equal
    count.
    """
    order = np.array_split(np.argsort(probabilities, kind="stable"), bins)
    error = sum(len(part) * abs(probabilities[part].mean() - labels[part].mean()) for part in order) / len(labels)
    return {
        "brier": float(((probabilities - labels) ** 2).mean()),
        "brier of a constant": float(labels.mean() * (1 - labels.mean())),
        "calibration error": float(error),
    }


def crossed(
    fit: Callable[[Array, Array], Any], x: Array, y: Array, groups: Array, seeds: int = 3
) -> tuple[float, float]:
    """Mean AUC of out-of-fold predictions over splits by groups, and its standard deviation over seeds."""
    found = []
    for seed in range(seeds):
        predicted = np.empty(len(y))
        for train, test in StratifiedGroupKFold(_FOLDS, shuffle=True, random_state=seed).split(x, y, groups):
            predicted[test] = fit(x[train], y[train]).predict_proba(x[test])[:, 1]
        found.append(auc(y, predicted))
    return float(np.mean(found)), float(np.std(found))


CLASSIFIERS: dict[str, Callable[[Array, Array], Any]] = {
    "forest": lambda x, y: RandomForestClassifier(500, min_samples_leaf=2, class_weight="balanced", random_state=0).fit(
        x, y
    ),
    "forest, random labels": lambda x, y: CLASSIFIERS["forest"](x, np.random.default_rng(0).permutation(y)),
    "logistic regression": lambda x, y: LogisticRegression(C=10, class_weight="balanced", max_iter=1000).fit(x, y),
}


def _aligned(folder: Path, column: str) -> tuple[list[Snippet], list[Any]]:
    """The snippets that a dataset has a row of, and the column's values."""
    known = {hashlib.sha1(text.encode()).hexdigest(): snippet for snippet, text, _ in gold.texts(gold.load())}
    rows = [
        (known[row["hexsha"]], row[column])
        for row in Dataset(folder).read(["hexsha", column])
        if row["hexsha"] in known
    ]
    rows.sort(key=lambda row: row[0].sha256)
    return [snippet for snippet, _ in rows], [value for _, value in rows]


def _arrays(snippets: Sequence[Snippet]) -> tuple[Array, Array, Array]:
    """Classes, packages, and whether held out."""
    labels = np.array([s.label >= POSITIVE for s in snippets]).astype(int)
    return labels, np.array([s.package for s in snippets]), np.array([s.held_out for s in snippets])


def _annotator(folder: Path) -> None:
    snippets, scores_ = _aligned(folder, "score")
    scores = np.array(scores_)
    y, packages, held = _arrays(snippets)
    for name, rows in (("all", np.full(len(y), True)), ("held out", held)):
        rank = spearmanr([s.label for s, kept in zip(snippets, rows, strict=True) if kept], scores[rows]).statistic
        low, high = interval(y[rows], scores[rows], np.arange(rows.sum()))
        low_p, high_p = interval(y[rows], scores[rows], packages[rows])
        print(
            f"{folder.name}, {name} ({rows.sum()} snippets, {y[rows].sum()} positive): AUC "
            f"{auc(y[rows], scores[rows]):.3f} "
            f"({low:.3f}–{high:.3f}; resampling packages {low_p:.3f}–{high_p:.3f}), within packages "
            f"{within_packages(y[rows], scores[rows], packages[rows]):.3f}, Spearman with the labels {rank:.3f}"
        )
    scaled = LogisticRegression().fit(scores[~held, None], y[~held]).predict_proba(scores[held, None])[:, 1]
    print("  held out, score scaled to a probability by the others:", _show(calibration(y[held], scaled)))


def _embedded(folder: Path) -> None:
    snippets, vectors = _aligned(folder, "embedding")
    x = np.array(vectors, dtype=np.float32)
    y, packages, held = _arrays(snippets)
    for name, fit in CLASSIFIERS.items():
        mean, spread = crossed(fit, x[~held], y[~held], packages[~held])
        print(
            f"{folder.name}, {name}: AUC {mean:.3f} ± {spread:.3f} over 3 splits of {(~held).sum()} snippets by "
            f"packages"
        )


def _forest(folder: Path, embeddings: Path) -> None:
    snippets, vectors = _aligned(embeddings, "embedding")
    y, packages, held = _arrays(snippets)
    predicted = classify.load_forest(folder).predict_proba(np.array(vectors, dtype=np.float32))[:, 1]
    y, predicted, packages = y[held], predicted[held], packages[held]
    labels = [s.label for s in snippets if s.held_out]
    low, high = interval(y, predicted, np.arange(len(y)))
    low_p, high_p = interval(y, predicted, packages)
    print(
        f"{folder.name}, held out ({len(y)} snippets of {len(set(packages))} packages, {y.sum()} positive): AUC "
        f"{auc(y, predicted):.3f} "
        f"({low:.3f}–{high:.3f}; resampling packages {low_p:.3f}–{high_p:.3f}), within packages "
        f"{within_packages(y, predicted, packages):.3f}, "
        f"Spearman with the labels {spearmanr(labels, predicted).statistic:.3f}"
    )
    print("  its probability:", _show(calibration(y, predicted)))


def _show(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3g}" for name, value in values.items())


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--annotations", type=Path, nargs="*", default=[], help="datasets that annotate made of the gold set"
    )
    parser.add_argument(
        "--embeddings", type=Path, nargs="*", default=[], help="datasets that embed made of the gold set"
    )
    parser.add_argument("--forest", type=Path, help="folder of classify; measured on the first of --embeddings")
    options = parser.parse_args()
    snippets = gold.load()
    y, packages, held = _arrays(snippets)
    print(
        f"{len(snippets)} snippets of {len(set(packages))} packages, {y.sum()} of label {POSITIVE} or more; held out: "
        f"{held.sum()} of {len(set(packages[held]))} packages, {y[held].sum()} positive"
    )
    counts = np.bincount([s.label for s in snippets], minlength=11)
    print("labels:", ", ".join(f"{label}: {count}" for label, count in enumerate(counts)))
    print("labelled twice:", _show(agreement(snippets)))
    print(f"the package alone: AUC {by_package_alone(y, packages):.3f}")
    for folder in options.annotations:
        _annotator(folder)
    if options.forest:
        if not options.embeddings:
            parser.error("--forest: name the gold set's --embeddings too")
        _forest(options.forest, options.embeddings[0])
    else:
        for folder in options.embeddings:
            _embedded(folder)


if __name__ == "__main__":
    main()

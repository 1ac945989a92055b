"""Linear probes on text embeddings: which attributes of an image a prompt keeps of its caption.

A probe is a ridge classifier: least squares on one-hot classes with a penalty on the weights, and
the class of the largest output. One eigendecomposition serves all attributes and penalties; the
tests compare with scikit-learn's `RidgeClassifier`, which decomposes once for each of them.

Shapes: N captions, n of them train and m are held out, D values of a vector, C classes.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Codes = NDArray[np.int64]


class Outcome(NamedTuple):
    """Answers of the probes of one attribute, from all folds together.

    Args:
        rows: (q,) captions to which the attribute applies, each held out once.
        hit: (q,) bool, whether the probe names the class.
        majority: (q,) bool, whether the most frequent class of the training captions is the class.
        penalties: chosen in each fold.
    """

    rows: NDArray[np.int64]
    hit: NDArray[np.bool_]
    majority: NDArray[np.bool_]
    penalties: list[float]


class Ridge:
    """Least squares with an L2 penalty on standardized vectors, for any number of penalties."""

    def __init__(self, vectors: Floats) -> None:
        """Standardize and decompose.

        Args:
            vectors: (n, D) of the training captions.
        """
        self._mean, spread = vectors.mean(axis=0), vectors.std(axis=0)
        self._scale = np.where(spread > 0, spread, 1)
        centered = self._standardized(vectors)
        values, self._axes = np.linalg.eigh(centered.T @ centered)
        self._values = np.maximum(values, 0)  # rounding leaves some just below
        self._scores = centered @ self._axes  # (n, D)

    def classify(
        self, classes: Codes, penalties: Sequence[float], held_out: Floats
    ) -> tuple[Codes, float]:
        """Classes of held-out vectors, with the penalty that is best on the training captions.

        Args:
            classes: (n,) in [0, C) of the training captions.
            penalties: per training caption, as added to the mean square of a value. The one with
                the highest leave-one-out accuracy is taken, of equals the largest.
            held_out: (m, D).

        Returns:
            (m,) classes, and the penalty.
        """
        targets = np.eye(classes.max() + 1)[classes]  # (n, C)
        prior = targets.mean(axis=0)
        targets -= prior
        projected = self._scores.T @ targets  # (D, C)
        best = -1.0
        for penalty in sorted(penalties, reverse=True):
            shrunk = 1 / (self._values + penalty * len(classes))
            outputs = self._scores @ (shrunk[:, None] * projected)
            # Diagonal of the hat matrix, the intercept included: what each caption adds to its own
            # output. Without it, the residual grows by 1 / (1 - leverage).
            leverage = 1 / len(classes) + np.square(self._scores) @ shrunk
            left_out = targets - (targets - outputs) / np.maximum(1 - leverage, 1e-12)[:, None]
            accuracy = float(((left_out + prior).argmax(axis=1) == classes).mean())
            if accuracy > best:
                best, chosen, weights = accuracy, penalty, shrunk[:, None] * projected
        found = self._standardized(held_out) @ self._axes @ weights + prior
        return found.argmax(axis=1), chosen

    def _standardized(self, vectors: Floats) -> Floats:
        return (vectors - self._mean) / self._scale


def folds(keys: Sequence[str], count: int, seed: int) -> Codes:
    """Fold of every caption, (N,) in [0, count); captions of one image are in the same.

    Args:
        keys: of the images, one per caption.
        count: number of folds.
        seed: of the order in which images are dealt out.
    """
    images = list(dict.fromkeys(keys))
    order = np.random.default_rng(seed).permutation(len(images))
    fold = {images[image]: place % count for place, image in enumerate(order)}
    return np.array([fold[key] for key in keys])


def cross_validated(
    vectors: Floats,
    attributes: Mapping[str, Sequence[str | None]],
    fold: Codes,
    penalties: Sequence[float],
) -> dict[str, Outcome]:
    """Probes of all attributes on the vectors of one prompt, tested on captions held out in turn.

    Args:
        vectors: (N, D).
        attributes: name -> class of every caption; None where the attribute does not apply.
        fold: (N,) as from `folds`.
        penalties: to choose from.

    Raises:
        ValueError: an attribute applies to no caption of the other folds.
    """
    answers: dict[str, list[Outcome]] = {name: [] for name in attributes}
    columns = {name: np.array(values, dtype=object) for name, values in attributes.items()}
    for held_out in np.unique(fold):
        ridges: dict[bytes, Ridge] = {}  # attributes that apply to the same captions share one
        for name, values in columns.items():
            applies = np.array([value is not None for value in values])
            train = np.flatnonzero(applies & (fold != held_out))
            test = np.flatnonzero(applies & (fold == held_out))
            if not len(train):
                raise ValueError(f"attribute {name!r} applies to none of the training captions")
            shared = train.tobytes()
            if shared not in ridges:
                ridges[shared] = Ridge(vectors[train])
            names, classes, counts = np.unique(
                values[train].astype(str), return_inverse=True, return_counts=True
            )
            found, penalty = ridges[shared].classify(classes, penalties, vectors[test])
            wanted = values[test].astype(str)
            majority = wanted == names[counts.argmax()]
            answers[name].append(Outcome(test, wanted == names[found], majority, [penalty]))
    return {name: _joined(parts) for name, parts in answers.items()}


def _joined(parts: Sequence[Outcome]) -> Outcome:
    rows, hit, majority = (np.concatenate([part[i] for part in parts]) for i in range(3))
    order = rows.argsort()
    penalties = [penalty for part in parts for penalty in part.penalties]
    return Outcome(rows[order], hit[order], majority[order], penalties)

"""Probes of embeddings find what is in them, no more, and are those of scikit-learn."""

import numpy as np
import pytest
from sklearn.linear_model import Ridge as Reference
from sklearn.linear_model import RidgeClassifier
from sklearn.model_selection import LeaveOneOut, cross_val_predict
from sklearn.preprocessing import StandardScaler

from flame.evaluation.attributes import Ridge, cross_validated, folds

CLASSES = 4
PENALTIES = (1e-3, 1e-1, 10.0)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def planted(rng, count: int = 400, dim: int = 24, strength: float = 2.0):
    """Vectors with a direction for each class in noise, on axes of very different scales."""
    classes = rng.integers(CLASSES, size=count)
    directions = rng.normal(size=(CLASSES, dim))
    vectors = rng.normal(size=(count, dim)) + strength * directions[classes]
    return vectors * 10.0 ** rng.uniform(-2, 2, size=dim) + 5, classes


def test_a_planted_attribute_is_found_and_a_random_one_is_at_chance(rng):
    vectors, classes = planted(rng)
    attributes = {
        "planted": [f"class {c}" for c in classes],
        "random": [f"class {c}" for c in rng.integers(CLASSES, size=len(classes))],
    }
    fold = folds([str(i) for i in range(len(classes))], 4, seed=0)
    found = cross_validated(vectors, attributes, fold, PENALTIES)
    assert found["planted"].hit.mean() > 0.97
    standard_error = np.sqrt(0.25 * 0.75 / len(classes))
    assert abs(found["random"].hit.mean() - 0.25) < 3 * standard_error
    for outcome in found.values():
        assert outcome.rows.tolist() == list(range(len(classes)))
        assert len(outcome.penalties) == 4


@pytest.mark.parametrize("penalty", PENALTIES)
def test_answers_are_those_of_scikit_learn(rng, penalty):
    vectors, classes = planted(rng, strength=0.3)
    train, test = vectors[:300], vectors[300:]
    found, _ = Ridge(train).classify(classes[:300], [penalty], test)
    scaler = StandardScaler().fit(train)
    reference = RidgeClassifier(alpha=penalty * 300).fit(scaler.transform(train), classes[:300])
    assert found.tolist() == reference.predict(scaler.transform(test)).tolist()


def test_the_penalty_is_the_best_of_leaving_one_out(rng):
    vectors, classes = planted(rng, count=120, dim=60, strength=0.35)
    standardized = StandardScaler().fit_transform(vectors)
    targets = np.eye(CLASSES)[classes]
    accuracy = {}
    for penalty in PENALTIES:
        reference = Reference(alpha=penalty * len(classes))
        outputs = cross_val_predict(reference, standardized, targets, cv=LeaveOneOut())
        accuracy[penalty] = (outputs.argmax(axis=1) == classes).mean()
    assert len(set(accuracy.values())) == len(PENALTIES)
    _, chosen = Ridge(vectors).classify(classes, PENALTIES, vectors)
    assert chosen == max(accuracy, key=accuracy.get)


def test_captions_of_one_image_are_held_out_together_and_folds_are_of_one_size():
    keys = [f"image-{i // 2}" for i in range(80)]
    fold = folds(keys, 4, seed=0)
    assert fold[::2].tolist() == fold[1::2].tolist()
    assert np.bincount(fold).tolist() == [20] * 4
    assert folds(keys, 4, seed=0).tolist() == fold.tolist() != folds(keys, 4, seed=1).tolist()


def test_an_attribute_is_asked_only_where_it_applies(rng):
    vectors, classes = planted(rng, count=80)
    some = [f"class {c}" if row % 2 else None for row, c in enumerate(classes)]
    fold = folds([str(i) for i in range(80)], 4, seed=0)
    found = cross_validated(vectors, {"some": some}, fold, PENALTIES)["some"]
    assert found.rows.tolist() == list(range(1, 80, 2))
    alone = cross_validated(vectors[1::2], {"some": some[1::2]}, fold[1::2], PENALTIES)["some"]
    assert found.hit.tolist() == alone.hit.tolist()
    with pytest.raises(ValueError, match="attribute 'some' applies to none"):
        cross_validated(vectors, {"some": [None] * 80}, fold, PENALTIES)


def test_the_majority_is_that_of_the_training_captions():
    names = ["a"] * 6 + ["b"] * 2
    fold = np.array([0, 0, 0, 0, 0, 0, 1, 1])
    vectors = np.arange(8.0)[:, None]
    found = cross_validated(vectors, {"name": names}, fold, PENALTIES)["name"]
    assert not found.majority.any()  # each fold has only what the other one lacks
    assert not found.hit.any()

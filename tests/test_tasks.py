"""Tasks give the hand-made answers, and those of clip_benchmark to the last tie."""

import pytest
import torch
import torch.nn.functional as F
from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval

from flame import tasks
from flame.config import task_names
from flame.tasks import retrieval, zeroshot


def signs(generator, rows, dim=16):
    """Unit vectors with values of +-1/4: dot products are exact, and most of them tie."""
    return torch.randint(0, 2, (rows, dim), generator=generator) / 2 - 0.25


def test_every_task_is_found_by_its_name():
    assert task_names() == ["retrieval", "zeroshot"]
    assert tasks.module("retrieval") is retrieval
    with pytest.raises(ValueError, match=r"'retrievel' \(did you mean 'retrieval'\?\)"):
        tasks.module("retrievel")


def test_retrieval_on_paper():
    # Image b is nearest to text 0, which is a's; text 2 is b's, but nearest to c.
    images = torch.tensor([[1.0, 0.0, 0.0], [0.8, 0.6, 0.0], [0.0, 0.0, 1.0]])
    texts = torch.tensor([[0.9, 0.4, 0.0], [1.0, 0.0, 0.0], [0.0, 0.3, 0.9], [0.0, 0.1, 1.0]])
    answer = retrieval.evaluate(images, "abc", [None] * 3, texts, "aabc")
    hits = {name: metric.hit.tolist() for name, metric in answer.metrics.items()}
    assert hits["i2t_r@1"] == [True, False, True]
    assert hits["t2i_r@1"] == [False, True, False, True]
    assert all(all(hits[f"{way}_r@{k}"]) for way in ("i2t", "t2i") for k in (5, 10))
    assert list(answer.metrics["t2i_r@1"].keys) == list("aabc")


def test_retrieval_counts_what_does_not_join():
    eye = torch.eye(4)
    answer = retrieval.evaluate(eye[:3], "abc", [None] * 3, eye[[3, 1, 0]], "zba")
    assert (answer.images, answer.texts, answer.unjoined) == (2, 2, 2)
    assert answer.metrics["i2t_r@1"].hit.tolist() == [True, True]
    assert list(answer.metrics["i2t_r@1"].keys) == ["a", "b"]
    with pytest.raises(ValueError, match="no text belongs to an image"):
        retrieval.evaluate(eye, "abcd", [None] * 4, eye, "wxyz")


@pytest.mark.parametrize("make", [signs, lambda g, rows: torch.randn(rows, 16, generator=g)])
def test_retrieval_equals_clip_benchmark(make):
    generator = torch.Generator().manual_seed(0)
    images = F.normalize(make(generator, 300), dim=-1)
    owners = torch.randperm(300, generator=generator).repeat_interleave(
        torch.randint(1, 7, (300,), generator=generator)
    )
    texts = F.normalize(make(generator, len(owners)), dim=-1)
    keys = [f"k{i}" for i in range(300)]
    answer = retrieval.evaluate(images, keys, [None] * 300, texts, [keys[i] for i in owners])

    scores = texts @ images.T
    positive = torch.zeros_like(scores, dtype=torch.bool)
    positive[torch.arange(len(scores)), owners] = True
    for k in (1, 5, 10):
        for way, (x, y) in {"t2i": (scores, positive), "i2t": (scores.T, positive.T)}.items():
            theirs = zeroshot_retrieval.batchify(
                zeroshot_retrieval.recall_at_k, x, y, 64, "cpu", k=k
            )
            assert torch.equal(answer.metrics[f"{way}_r@{k}"].hit, theirs > 0), (way, k)


def test_chunks_change_no_tie():
    generator = torch.Generator().manual_seed(1)
    queries, gallery = signs(generator, 130), signs(generator, 700)
    ids = torch.randint(0, 50, (130,), generator=generator)
    gallery_ids = torch.randint(0, 50, (700,), generator=generator)
    whole = retrieval.hits_at(queries, ids, gallery, gallery_ids, (1, 5, 10))
    for chunk in (1, 7, 64, 129):
        cut = retrieval.hits_at(queries, ids, gallery, gallery_ids, (1, 5, 10), chunk=chunk)
        assert all(torch.equal(cut[k], whole[k]) for k in whole)


def test_zeroshot_on_paper():
    # Of cat's two templates the long one counts no more than the short: they meet on axis two.
    texts = torch.tensor([[10.0, 10.0], [-1.0, 1.0], [1.0, 0.0]])
    images = torch.tensor([[0.6, 0.8], [0.8, 0.6], [0.0, 1.0]])
    answer = zeroshot.evaluate(images, "xyz", ["cat", "dog", "dog"], texts, ["cat", "cat", "dog"])
    assert list(answer.metrics) == ["top1"]
    assert answer.metrics["top1"].hit.tolist() == [True, True, False]
    torch.testing.assert_close(
        zeroshot.class_vectors(texts, torch.tensor([0, 0, 1])),
        torch.tensor([[0.0, 1.0], [1.0, 0.0]]),
    )


def test_zeroshot_refuses_a_label_without_text():
    eye = torch.eye(2)
    for label, said in (("dogs", r"'dogs' \(did you mean 'dog'\?\)"), (None, "None")):
        with pytest.raises(ValueError, match=f"'y' has no class text: {said}"):
            zeroshot.evaluate(eye, "xy", ["cat", label], eye, ["cat", "dog"])


@pytest.mark.parametrize("num_classes", [3, 40, 500])
@pytest.mark.parametrize("templates", [1, 2, 3])
def test_zeroshot_equals_clip_benchmark(num_classes, templates, monkeypatch):
    # Its float() of an array with one value is refused by newer versions of numpy.
    monkeypatch.setattr(zeroshot_classification, "float", lambda a: a.item(), raising=False)
    generator = torch.Generator().manual_seed(num_classes)
    # Many classes share one vector, as classes of one name do in ImageNet.
    texts = signs(generator, num_classes, dim=4).repeat_interleave(templates, 0)
    images = signs(generator, 600, dim=4)
    target = torch.randint(0, num_classes, (600,), generator=generator)
    classes = [f"class {c}" for c in range(num_classes)]
    answer = zeroshot.evaluate(
        images,
        [str(i) for i in range(600)],
        [classes[c] for c in target],
        texts,
        [name for name in classes for _ in range(templates)],
    )

    class Model:
        def encode_text(self, rows):
            return texts[rows]

    def tokenize(prompts):
        return torch.tensor([classes.index(p.split("|")[0]) * templates for p in prompts]) + (
            torch.arange(templates)
        )

    prompts = [f"{{c}}|{n}" for n in range(templates)]
    classifier = zeroshot_classification.zero_shot_classifier(
        Model(), tokenize, classes, prompts, "cpu", amp=False
    )
    ranks = (1, 5) if num_classes >= 5 else (1,)
    logits = 100.0 * images @ classifier
    theirs = zeroshot_classification.accuracy(logits, target, topk=ranks)
    ours = [answer.metrics[f"top{k}"].hit.double().mean().item() for k in ranks]
    assert ours == pytest.approx(theirs, abs=1e-12)

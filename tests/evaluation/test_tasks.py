"""Tasks agree with cases made by hand, and with clip_benchmark down to ties."""

import pytest
import torch
import torch.nn.functional as F
from clip_benchmark.metrics import (
    image_caption_selection,
    linear_probe,
    zeroshot_classification,
    zeroshot_retrieval,
)

from flame.evaluation import tasks
from flame.evaluation.tasks import Asked, Images, Texts, compose, probe, retrieval, within, zeroshot
from flame.study.schema.benchmarks import FEWSHOT, task_names
from flame.study.settings import Question


def asked(images=None, texts=None, negatives=None, visual=None) -> Asked:
    """A question about a data set `d` with the given features, and no others."""
    kinds = {"true": texts, "false": negatives}
    question = Question(
        benchmark="b",
        task="t",
        dataset="d",
        captions="true",
        negatives=None if negatives is None else "false",
        train="d-train",
    )
    return Asked(
        question,
        images=lambda: Images(*images),
        visual=lambda dataset: Images(*visual[dataset]),
        texts=lambda kind: Texts(kinds[kind][0], kinds[kind][1].__getitem__),
    )


def signs(generator, rows, dim=16):
    """Unit vectors with values of +-1/4: dot products are exact, and most of them tie."""
    return torch.randint(0, 2, (rows, dim), generator=generator) / 2 - 0.25


def normal(generator, rows, dim=16):
    return F.normalize(torch.randn(rows, dim, generator=generator), dim=-1)


def test_every_task_is_found_by_its_name():
    *modules, last = task_names()
    assert {"compose", "probe", "retrieval", "within", "zeroshot"} <= set(modules)
    assert (modules, last) == (sorted(modules), FEWSHOT)
    assert tasks.module("retrieval") is retrieval
    with pytest.raises(ValueError, match=r"'retrievel' \(did you mean 'retrieval'\?\)"):
        tasks.module("retrievel")
    with pytest.raises(ValueError, match="unknown task 'fewshot'"):
        tasks.module(FEWSHOT)


def test_retrieval_on_paper():
    # Image b is nearest to text 0, which is a's; text 2 is b's, but nearest to c.
    images = torch.tensor([[1.0, 0.0, 0.0], [0.8, 0.6, 0.0], [0.0, 0.0, 1.0]])
    texts = torch.tensor([[0.9, 0.4, 0.0], [1.0, 0.0, 0.0], [0.0, 0.3, 0.9], [0.0, 0.1, 1.0]])
    answer = retrieval.evaluate(asked(("abc", [None] * 3, images), ("aabc", texts)))
    hits = {name: metric.hit.tolist() for name, metric in answer.metrics.items()}
    assert hits["i2t_r@1"] == [True, False, True]
    assert hits["t2i_r@1"] == [False, True, False, True]
    assert all(all(hits[f"{way}_r@{k}"]) for way in ("i2t", "t2i") for k in (5, 10))
    assert list(answer.metrics["t2i_r@1"].keys) == list("aabc")
    assert answer.metrics["i2t_r@1"].best == list("aac")
    assert answer.metrics["t2i_r@1"].best == list("bacc")
    assert answer.metrics["t2i_r@5"].best is None


def test_retrieval_counts_what_does_not_join():
    eye = torch.eye(4)
    images = "abc", [None] * 3, eye[:3]
    answer = retrieval.evaluate(asked(images, ("zba", eye[[3, 1, 0]])))
    assert (answer.images, answer.texts, answer.unjoined) == (2, 2, 2)
    i2t, t2i = answer.metrics["i2t_r@1"], answer.metrics["t2i_r@1"]
    assert i2t.hit.tolist() == [True, True]
    assert (i2t.keys, i2t.rows) == (["a", "b"], [0, 1])
    assert (t2i.keys, t2i.rows) == (["b", "a"], [1, 2])
    with pytest.raises(ValueError, match="no text belongs to an image"):
        retrieval.evaluate(asked(images, ("wxyz", eye)))


@pytest.mark.parametrize("make", [signs, normal])
def test_retrieval_equals_clip_benchmark(make):
    generator = torch.Generator().manual_seed(0)
    images = F.normalize(make(generator, 300), dim=-1)
    owners = torch.randperm(300, generator=generator).repeat_interleave(
        torch.randint(1, 7, (300,), generator=generator)
    )
    texts = F.normalize(make(generator, len(owners)), dim=-1)
    keys = [f"k{i}" for i in range(300)]
    answer = retrieval.evaluate(
        asked((keys, [None] * 300, images), ([keys[i] for i in owners], texts))
    )

    scores = texts @ images.T
    positive = torch.zeros_like(scores, dtype=torch.bool)
    positive[torch.arange(len(scores)), owners] = True
    for k in (1, 5, 10):
        for way, (x, y) in {"t2i": (scores, positive), "i2t": (scores.T, positive.T)}.items():
            theirs = zeroshot_retrieval.batchify(
                zeroshot_retrieval.recall_at_k, x, y, 64, "cpu", k=k
            )
            assert torch.equal(answer.metrics[f"{way}_r@{k}"].hit, theirs > 0), (way, k)
    for way in ("i2t", "t2i"):
        metric = answer.metrics[f"{way}_r@1"]
        hit = [key == best for key, best in zip(metric.keys, metric.best, strict=True)]
        assert hit == metric.hit.tolist()


def test_chunks_change_no_tie():
    generator = torch.Generator().manual_seed(1)
    queries, gallery = signs(generator, 130), signs(generator, 700)
    whole = retrieval.best_at(queries, gallery, (1, 5, 10))
    for chunk in (1, 7, 64, 129):
        cut = retrieval.best_at(queries, gallery, (1, 5, 10), chunk=chunk)
        assert all(torch.equal(cut[k], whole[k]) for k in whole)


def test_zeroshot_on_paper():
    # Of cat's two templates the long one counts no more than the short: they meet on axis two.
    texts = torch.tensor([[10.0, 10.0], [-1.0, 1.0], [1.0, 0.0]])
    images = torch.tensor([[0.6, 0.8], [0.8, 0.6], [0.0, 1.0]])
    answer = zeroshot.evaluate(
        asked(("xyz", ["cat", "dog", "dog"], images), (["cat", "cat", "dog"], texts))
    )
    assert list(answer.metrics) == ["top1"]
    assert answer.metrics["top1"].hit.tolist() == [True, True, False]
    torch.testing.assert_close(
        zeroshot.class_vectors([texts[:2], texts[2:]]),
        torch.tensor([[0.0, 1.0], [1.0, 0.0]]),
    )


def test_zeroshot_refuses_a_label_without_text():
    eye = torch.eye(2)
    for label, said in (("dogs", r"'dogs' \(did you mean 'dog'\?\)"), (None, "None")):
        with pytest.raises(ValueError, match=f"'y' has no class text: {said}"):
            zeroshot.evaluate(asked(("xy", ["cat", label], eye), (["cat", "dog"], eye)))


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
    keys, labels = [str(i) for i in range(600)], [classes[c] for c in target]
    names = [name for name in classes for _ in range(templates)]
    answer = zeroshot.evaluate(asked((keys, labels, images), (names, texts)))

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


def hits_of(answer) -> dict[str, list[bool]]:
    return {name: metric.hit.tolist() for name, metric in answer.metrics.items()}


def test_groups_on_paper():
    # Of group p all is right. In q both images find caption 0; each caption finds its image.
    images = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.8, 0.6]])
    texts = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    keys = ["p-0", "p-1", "q-0", "q-1"]
    answer = compose.evaluate(asked((keys, [None] * 4, images), (keys, texts)))
    assert hits_of(answer) == {
        "image_score": [True, True],
        "text_score": [True, False],
        "group_score": [True, False],
    }
    assert answer.metrics["group_score"].keys == ["p", "q"]
    assert (answer.images, answer.texts, answer.unjoined) == (4, 4, 0)


def test_false_captions_on_paper():
    # x prefers its false caption; y its true one, over two false; a tie counts as right.
    images = torch.eye(2)[[0, 1, 0]]
    true = torch.tensor([[0.6, 0.8], [0.0, 1.0], [1.0, 0.0]])
    false = torch.tensor([[1.0, 0.0], [0.8, 0.6], [1.0, 0.0], [0.8, 0.6]])
    answer = compose.evaluate(asked(("xyz", [None] * 3, images), ("xyz", true), ("yyzx", false)))
    assert hits_of(answer) == {"accuracy": [False, True, True]}
    assert (answer.images, answer.texts, answer.unjoined) == (3, 7, 0)
    # With two false captions, one of them nearer than the true one is enough.
    true[1] = torch.tensor([0.8, 0.6])
    false[0] = torch.tensor([0.6, 0.8])
    answer = compose.evaluate(asked(("xyz", [None] * 3, images), ("xyz", true), ("yyzx", false)))
    assert hits_of(answer) == {"accuracy": [False, False, True]}


def test_retrieval_within_groups_on_paper():
    # Of group p all is right. In q both images find caption 0; each caption finds its image. The
    # captions of p would be nearer to the images of q, but are not asked.
    images = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.8, 0.6]])
    texts = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.9, 0.1], [0.0, 0.9]])
    keys = ["p-0", "p-1", "q-0", "q-1"]
    order = [3, 1, 0, 2]
    answer = within.evaluate(
        asked((keys, [None] * 4, images), ([keys[i] for i in order], texts[order]))
    )
    assert hits_of(answer) == {
        "i2t_r@1": [True, True, True, False],
        "t2i_r@1": [True, True, True, True],
    }
    assert answer.metrics["i2t_r@1"].best == ["p-0", "p-1", "q-0", "q-0"]
    assert answer.metrics["t2i_r@1"].keys == keys
    assert (answer.images, answer.texts, answer.unjoined) == (4, 4, 0)


def test_retrieval_within_one_group_of_all_is_retrieval():
    generator = torch.Generator().manual_seed(0)
    images, texts = signs(generator, 300), signs(generator, 300)
    keys = [f"g-{i}" for i in range(300)]
    question = asked((keys, [None] * 300, images), (keys, texts))
    ours, theirs = hits_of(within.evaluate(question)), hits_of(retrieval.evaluate(question))
    assert ours == {metric: theirs[metric] for metric in ours}


def test_retrieval_within_groups_counts_what_does_not_join():
    eye = torch.eye(5)
    keys, captions = ["p-0", "p-1", "q-0", "q-1", "r-0"], ["p-0", "p-1", "q-0", "r-0"]
    answer = within.evaluate(asked((keys, [None] * 5, eye), (captions, eye[:4])))
    assert answer.metrics["i2t_r@1"].keys == ["p-0", "p-1"]
    assert (answer.images, answer.texts, answer.unjoined) == (2, 2, 5)
    with pytest.raises(ValueError, match=r"no group of 'd' has all its captions: .*'x'"):
        within.evaluate(asked((keys, [None] * 5, eye), (["x"], eye[:1])))


def test_compose_counts_what_does_not_join():
    eye = torch.eye(5)
    # y lacks a false caption, z a true one, the false caption of v its image.
    answer = compose.evaluate(
        asked(("yxz", [None] * 3, eye[:3]), ("xy", eye[[1, 0]]), ("xzv", eye[[0, 1, 2]]))
    )
    assert hits_of(answer) == {"accuracy": [True]}
    assert answer.metrics["accuracy"].rows == [1]
    assert (answer.images, answer.texts, answer.unjoined) == (1, 2, 5)
    # Of group q one image has no caption; r is one image, which could only be right.
    keys = ["p-0", "p-1", "q-0", "q-1", "r-0"]
    captions = ["p-0", "p-1", "q-0", "r-0"]
    answer = compose.evaluate(asked((keys, [None] * 5, eye), (captions, eye[:4])))
    assert answer.metrics["group_score"].keys == ["p"]
    assert (answer.images, answer.texts, answer.unjoined) == (2, 2, 5)


def test_compose_refuses_what_it_cannot_ask():
    eye = torch.eye(2)
    cases = [
        ((["p-0", "q"], ["p-0", "q"]), "image key 'q' names no group; keys must look like"),
        ((["p-0", "p-1"], ["p-0", "p-0"]), "image 'p-0' has 2 true captions, expected one"),
        ((["p-0", "p-1"], ["x", "y"]), "no image of 'd' has the captions it needs: .*'x', 'y'"),
    ]
    for (keys, captions), said in cases:
        with pytest.raises(ValueError, match=said):
            compose.evaluate(asked((keys, [None] * 2, eye), (captions, eye)))


class Lookup:
    """clip_benchmark's model, tokenizer and data at once: numbers of rows instead of pixels."""

    def __init__(self, images, texts):
        self.images, self.texts = images, texts

    def encode_image(self, pixels):
        return self.images[pixels.flatten()]

    def encode_text(self, tokens):
        return self.texts[tokens]

    def selection(self, image_rows, text_rows):
        """Its metrics, for instances of images (N, n) and texts (N, m)."""
        loader = [(image_rows[..., None, None, None], text_rows.tolist())]
        return image_caption_selection.evaluate(self, loader, torch.tensor, "cpu", amp=False)


@pytest.mark.parametrize("make", [signs, normal])
def test_groups_equal_clip_benchmark(make):
    generator = torch.Generator().manual_seed(0)
    images, texts = make(generator, 2000, 4), make(generator, 2000, 4)
    rows = torch.arange(2000).view(1000, 2)
    theirs = Lookup(images, texts).selection(rows, rows)
    # Our captions come in another order, and groups are told by the keys alone.
    keys = [f"g-{i // 2}-{i % 2}" for i in range(2000)]
    order = torch.randperm(2000, generator=generator)
    answer = compose.evaluate(
        asked((keys, [None] * 2000, images), ([keys[i] for i in order], texts[order]))
    )
    ours = {name: metric.hit.float().mean().item() for name, metric in answer.metrics.items()}
    assert list(ours.values()) == [theirs[n] for n in ("image_acc", "text_acc", "acc")]


@pytest.mark.parametrize("make", [signs, normal])
@pytest.mark.parametrize("wrong", [1, 3])
def test_false_captions_equal_clip_benchmark(make, wrong):
    generator = torch.Generator().manual_seed(wrong)
    images, texts = make(generator, 900, 4), make(generator, 900 * (1 + wrong), 4)
    rows = torch.arange(len(texts)).view(900, 1 + wrong)
    theirs = Lookup(images, texts).selection(torch.arange(900)[:, None], rows)
    keys = [f"{i}" for i in range(900)]
    false_keys = [key for key in keys for _ in range(wrong)]
    answer = compose.evaluate(
        asked(
            (keys, [None] * 900, images),
            (keys, texts[rows[:, 0]]),
            (false_keys, texts[rows[:, 1:].flatten()]),
        )
    )
    ours = answer.metrics["accuracy"].hit.float().mean().item()
    assert ours == theirs["text_acc"] == theirs["acc"]


def test_chance_of_groups_is_a_quarter_and_a_sixth():
    generator = torch.Generator().manual_seed(3)
    images, texts = normal(generator, 8000), normal(generator, 8000)
    keys = [f"{i // 2}-{i % 2}" for i in range(8000)]
    answer = compose.evaluate(asked((keys, [None] * 8000, images), (keys, texts)))
    # Four standard deviations of the mean of 4000 queries.
    for name, chance in (("image_score", 1 / 4), ("text_score", 1 / 4), ("group_score", 1 / 6)):
        bound = 4 * (chance * (1 - chance) / 4000) ** 0.5
        assert answer.metrics[name].hit.float().mean() == pytest.approx(chance, abs=bound)


def clusters(seed, rows, spread=0.3):
    """Features (rows, 32) about the directions of ten classes, and which class each has."""
    centers = normal(torch.Generator().manual_seed(0), 10, 32)
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(0, 10, (rows,), generator=generator)
    noise = spread * torch.randn(rows, 32, generator=generator)
    return F.normalize(centers[target] + noise, dim=-1), target


def their_probe(monkeypatch, loader, dim, classes, seed):
    """clip_benchmark's classifier, trained on the CPU."""
    for kind in (torch.Tensor, torch.nn.Module):
        monkeypatch.setattr(kind, "cuda", lambda self: self)
    return linear_probe.train(
        loader, dim, classes, weight_decay=0, lr=0.1, epochs=20, amp=False, device="cpu", seed=seed
    )


def test_probe_equals_clip_benchmark(monkeypatch):
    features, target = clusters(1, 1200)
    test_features, _ = clusters(2, 400)

    class Loader:
        """Batches in the order that the global generator draws right after the weights."""

        def __len__(self):
            return 3

        def __iter__(self):
            for rows in torch.randperm(1200).split(512):
                yield features[rows], target[rows]

    theirs = their_probe(monkeypatch, Loader(), 32, 10, probe.SEED)
    ours = probe.fit(features, target, 10)
    torch.testing.assert_close(ours(test_features), theirs(test_features), rtol=0, atol=1e-5)


def test_probe_is_as_accurate_as_clip_benchmark_in_any_order(monkeypatch):
    features, target = clusters(1, 1200)
    test_features, test_target = clusters(2, 2000)
    rows = linear_probe.FeatureDataset(features, target)
    loader = torch.utils.data.DataLoader(rows, batch_size=512, shuffle=True)
    theirs = their_probe(monkeypatch, loader, 32, 10, seed=5)
    hits = [
        (classifier(test_features).argmax(dim=1) == test_target).sum().item()
        for classifier in (theirs, probe.fit(features, target, 10))
    ]
    assert 1000 < hits[0] < 1990
    assert hits[1] == pytest.approx(hits[0], abs=10)


def test_probe_trains_on_one_set_and_tests_on_another():
    features, target = clusters(1, 600)
    test_features, test_target = clusters(2, 50, spread=0.05)
    # The names of the classes do not sort as their numbers do.
    names = [f"class {9 - c}" for c in target]
    test_names = [f"class {9 - c}" for c in test_target]
    keys = [str(i) for i in range(50)]
    state = torch.random.get_rng_state()
    given = {"d-train": (range(600), names, features), "d": (keys, test_names, test_features)}
    answer = probe.evaluate(asked(visual=given))
    assert answer.metrics["accuracy"].hit.all()
    assert answer.metrics["accuracy"].keys == keys
    assert (answer.images, answer.texts, answer.unjoined) == (50, 0, 0)
    assert torch.equal(torch.random.get_rng_state(), state)
    test_names[7] = "class 3" if test_names[7] != "class 3" else "class 4"
    answer = probe.evaluate(asked(visual=given))
    assert answer.metrics["accuracy"].hit.logical_not().nonzero().tolist() == [[7]]


def test_probe_repeats_and_draws_nothing_from_outside():
    features, target = clusters(1, 600)
    first = probe.fit(features, target, 10)
    torch.manual_seed(7)
    assert torch.equal(probe.fit(features, target, 10).weight, first.weight)


@pytest.mark.parametrize(
    ("train", "test", "said"),
    [
        (["cat", "dog"], ["cat", "dogs"], r"'y' is not trained: 'dogs' \(did you mean 'dog'\?\)"),
        (["cat", "dog"], ["cat", None], "'y' is not trained: None; known: cat, dog"),
        (["cat", None], ["cat", "cat"], "'b' is not trained: None; known: cat"),
    ],
)
def test_probe_refuses_a_label_that_is_not_trained(train, test, said):
    eye = torch.eye(2)
    with pytest.raises(ValueError, match=said):
        probe.evaluate(asked(visual={"d-train": ("ab", train, eye), "d": ("xy", test, eye)}))

"""Linear probe: a linear classifier trained on the backbone's features (Tables 5 and C7).

The protocol follows `clip_benchmark.metrics.linear_probe` as called by the official release:
features of unit norm, computed once without augmentation; all training images; no weight decay, and
no search for one. Computation is in float32, not float16.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from flame.evaluation.tasks import Answer, Asked, Hits, Images
from flame.runtime.device import device_of
from flame.runtime.errors import known

EPOCHS = 20
BATCH_SIZE = 512
LR = 0.1
SEED = 0


def evaluate(asked: Asked) -> Answer:
    """Accuracy of the classifier on the test images, as `accuracy`.

    Raises:
        ValueError: an image has no label, or a test image has one that is not trained.
    """
    assert asked.question.train is not None  # checked by the study's schema
    train, test = asked.visual(asked.question.train), asked.visual(asked.question.dataset)
    classes = {name: c for c, name in enumerate(sorted(filter(None, set(train.labels))))}
    classifier = fit(train.features, _targets(train, classes), len(classes))
    with torch.inference_mode():
        best = classifier(test.features.to(classifier.weight.device)).argmax(dim=1).cpu()
    hit = best == _targets(test, classes)
    return Answer({"accuracy": Hits(test.keys, hit)}, images=len(hit), texts=0, unjoined=0)


def fit(features: Tensor, targets: Tensor, num_classes: int) -> nn.Linear:
    """A linear classifier trained by AdamW, without weight decay, on a cosine schedule.

    It is trained on the GPU if there is one; everything random is drawn on the CPU.

    Args:
        features: (N, d), unit norm.
        targets: (N,) int in [0, num_classes).
        num_classes: number of classes.
    """
    steps, device = EPOCHS * math.ceil(len(features) / BATCH_SIZE), device_of()
    features, targets = features.to(device), targets.to(device)
    # Like clip_benchmark, draw the weights and then the order of the images from the global
    # generator; the fork restores its state.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        classifier = nn.Linear(features.shape[1], num_classes).to(device)
        optimizer = torch.optim.AdamW(classifier.parameters(), lr=LR, weight_decay=0)
        step = 0
        for _ in range(EPOCHS):
            for rows in torch.randperm(len(features)).to(device).split(BATCH_SIZE):
                optimizer.param_groups[0]["lr"] = LR * (1 + math.cos(math.pi * step / steps)) / 2
                optimizer.zero_grad()
                cross_entropy(classifier(features[rows]), targets[rows]).backward()
                optimizer.step()
                step += 1
    return classifier


def _targets(images: Images, classes: Mapping[str, int]) -> Tensor:
    for key, label in zip(images.keys, images.labels, strict=True):
        if label not in classes:
            raise ValueError(f"label of image {key!r} is not trained: {known(label, classes)}")
    return torch.tensor([classes[str(label)] for label in images.labels])

"""How much of a batch fits a GPU: the choice by numbers, the measurement on a CPU."""

import json

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from flame.data.images import ImageReader
from flame.embedding.store import Embeddings
from flame.towers.load import create
from flame.train import train
from flame.training import memory
from flame.training.memory import Need, choose, measure, settle
from flame.training.processes import Place
from flame.training.speed import Speed
from tests.training.test_processes import BATCH, CNN, DIM, clip, flame, given, inputs, long_clip  # noqa: F401

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
GB, MB = 1e9, 1e6
WAYS = ["never", "always"]
FACETS = [("raw", "scene"), ("long", "scene"), ("long", "object")]


def needing(*needs, free=85 * GB):
    """`need` of `choose`: fixed and image without checkpointing, then with it."""
    return lambda way: (free, Need(*needs[WAYS.index(way)]))


@pytest.mark.parametrize(
    ("images", "needs", "expected"),
    [
        # ViT-B/16 on a GPU of 80 GiB: 512 fit, 4,096 in five parts.
        (512, [(3 * GB, 67 * MB)], (512, "never")),
        (4096, [(12 * GB, 67 * MB)], (820, "never")),
        # ViT-L/14: 272 MB an image.
        (4096, [(15 * GB, 230 * MB)], (256, "never")),
        # So large a tower that less than 32 images would fit.
        (4096, [(15 * GB, 3 * GB), (15 * GB, 200 * MB)], (293, "always")),
        (16, [(15 * GB, 3 * GB)], (16, "never")),
    ],
)
def test_micro_batches_are_as_large_as_the_memory_allows(images, needs, expected):
    chosen = choose(Speed(), images, WAYS, needing(*needs))
    assert (chosen.micro_batch, chosen.grad_checkpointing) == expected


def test_a_number_stays_and_only_checkpointing_is_chosen():
    need = needing((15 * GB, 230 * MB), (15 * GB, 30 * MB))
    for number, way in ((64, "never"), (512, "always"), (4096, "always")):
        chosen = choose(Speed(micro_batch=number), 4096, WAYS, need)
        assert (chosen.micro_batch, chosen.grad_checkpointing) == (number, way)


def test_a_batch_of_which_no_image_fits_is_refused_with_the_numbers():
    need = needing((90 * GB, 230 * MB), (90 * GB, 30 * MB))
    message = (
        r"batch of 4096 images a process does not fit the GPU: 90\.0 GB and 0\.030 GB an image "
        r"\(grad_checkpointing always\) of 85\.0 GB free; not even a micro_batch of 1 fits"
    )
    with pytest.raises(ValueError, match=message):
        choose(Speed(), 4096, WAYS, need)
    with pytest.raises(ValueError, match="BatchNorm needs all at once"):
        choose(Speed(), 4096, ["never"], needing((3 * GB, 67 * MB)), whole_only=True)


def test_on_a_cpu_nothing_is_measured_and_the_batch_stays_whole(monkeypatch):
    monkeypatch.delattr(memory, "measure")
    place = Place(0, 2, CPU)
    assert settle(Speed(), tower_of(flame()), flame(), FACETS, place) == Speed(3, "never")
    asked = Speed(2, "always")
    assert settle(asked, tower_of(flame()), flame(), FACETS, place) == asked


@pytest.mark.parametrize(
    ("backbone", "limit", "expected"),
    [({}, 2.0, (2, "never")), (CNN, 9.0, (BATCH, "never")), ({}, 100.0, (BATCH, "never"))],
)
def test_what_is_measured_on_a_gpu_decides(monkeypatch, backbone, limit, expected):
    wanted = flame(backbone) if backbone else flame()
    monkeypatch.setattr(memory, "SMALLEST", 1)
    monkeypatch.setattr(memory, "_free", lambda device: limit / memory.USABLE)
    monkeypatch.setattr(memory, "measure", lambda *args, checkpointed: Need(0.0, 1.0))
    chosen = settle(Speed(), tower_of(wanted), wanted, FACETS, Place(0, 1, CUDA))
    assert (chosen.micro_batch, chosen.grad_checkpointing) == expected


def tower_of(wanted):
    torch.manual_seed(0)
    return create(wanted, DIM)


def saved(tower, images, facets):
    """Bytes that autograd keeps for the backward pass of a tower, weights excluded."""
    kept, weights = {}, {each.untyped_storage().data_ptr() for each in tower.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    pixels = torch.rand(images, 3, tower.image_size, tower.image_size)
    columns = torch.arange(facets)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = tower(pixels, tower.example_texts(images, facets), columns)
    assert outputs.images.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize(("wanted", "facets"), [(flame(), 3), (clip(), 1), (long_clip(), 2)])
def test_an_image_needs_what_autograd_keeps_of_it_and_less_with_checkpointing(
    monkeypatch, tmp_path, wanted, facets
):
    def peak(run, device):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
            run()
        watched.export_chrome_trace(str(tmp_path / "trace.json"))
        events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
        taken = [event["args"] for event in events if event["name"] == "[memory]"]
        before = taken[0]["Total Allocated"] - taken[0]["Bytes"]
        return max(each["Total Allocated"] for each in taken) - before

    monkeypatch.setattr(memory, "_peak", peak)
    monkeypatch.setattr(memory, "PROBES", (32, 96))  # the tower is tiny, the vocabulary is not
    tower = tower_of(wanted)
    named = [("raw", "scene"), ("long", "scene"), ("long", "object")][:facets]
    if wanted.method == "long-clip":
        named = [("long", "tokens"), ("short", "tokens")]
    before = {name: value.clone() for name, value in tower.state_dict().items()}
    plain, checkpointed = (
        measure(tower, wanted, named, CPU, 64, checkpointed=each) for each in (False, True)
    )
    few, many = (saved(prepared(tower, named), n, facets) for n in memory.PROBES)
    kept = (many - few) / 64
    assert kept < plain.image < 1.5 * kept
    assert checkpointed.image < 0.5 * plain.image
    state = 16 * sum(each.numel() for each in tower.parameters())
    assert state < plain.fixed < state + 64 * 3 * 16**2 + 4e6
    assert all(torch.equal(value, before[name]) for name, value in tower.state_dict().items())
    assert all(each.grad is None for each in tower.parameters())


def prepared(tower, facets):
    tower.match(facets)
    return tower.train()


def test_a_batch_that_does_not_fit_is_refused_before_the_data_is_read(
    inputs,  # noqa: F811
    tmp_path,
    monkeypatch,
):
    def refuse(*args):
        raise ValueError("does not fit")

    monkeypatch.setattr(memory, "settle", refuse)
    monkeypatch.delattr(ImageReader, "__init__")
    monkeypatch.delattr(Embeddings, "rows")
    with pytest.raises(ValueError, match="does not fit"):
        train(**given(inputs, flame()), out=tmp_path / "run", settings=flame(), cache_mb=1000)
    assert not list(tmp_path.iterdir())

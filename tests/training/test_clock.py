"""Rates of a training run count its steps only."""

import pytest
import torch

from flame.training import clock
from flame.training.clock import Clock


class Time:
    """A clock that moves when it is told to."""

    now = 100.0

    def monotonic(self):
        return self.now


@pytest.fixture
def time(monkeypatch):
    time = Time()
    monkeypatch.setattr(clock, "time", time)
    return time


def test_rates_are_those_of_the_steps_and_not_of_what_is_between_them(time):
    watch = Clock(before=50.0, batch_size=64, device=torch.device("cpu"))

    def loader():
        for _ in range(4):
            time.now += 1  # waiting for data
            yield ()

    rates = []
    for _ in watch.waiting(loader()):
        time.now += 3
        with watch.stopped():
            time.now += 1000
        rates.append(watch.rates())
    assert rates == [{"images_per_second": 16.0, "data_wait": 0.25}] * 4
    assert watch.seconds == 50 + 4 * 1004
    assert watch.summary() == "4 steps: 16.0 images/s, 25.0% waiting for data"


def test_a_run_without_steps_says_so(time):
    watch = Clock(before=0.0, batch_size=64, device=torch.device("cpu"))
    assert watch.summary() == "no step was left to train"

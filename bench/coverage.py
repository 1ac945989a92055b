"""How often 95 % intervals contain the truth, on simulated studies with known variances.

    python bench/coverage.py --draws 2000

Every draw is a study: queries that are hit or missed by the trainings of some runs. A training hits
a query if the sum of normal variables for the run, the training, the image, the image under this
run and chance is positive, so that the true rates are known.
"""

import argparse
from dataclasses import dataclass
from math import sqrt
from statistics import NormalDist

import numpy as np

from flame.evaluation.records import Queries
from flame.report.results import Estimate, Results
from flame.study.schema.tables import Measure
from flame.study.settings import Compared

MEASURE = Measure(benchmark="b", metric="m")
# Standard deviations of what decides a hit, in units of that of chance.
IMAGE, IMAGE_OF_RUN = 1.0, 0.5
BETTER, WORSE = 0.4, 0.25  # means of what decides a hit
QUERIES = 400


@dataclass(frozen=True)
class Scene:
    """A study with two runs."""

    trainings: int
    """Of each of the two."""
    noise: float = 0.12
    """Standard deviation between trainings, in units of that of chance."""
    captions: int = 1
    """Queries about each image: a cluster."""
    others: bool = True
    """Whether there are two more runs of their method, trained three times each."""
    covered: bool = True
    """Whether intervals cover the chance in trainings; otherwise that in queries only."""

    def truth(self, mean: float) -> float:
        """Rate of a run over all images and trainings, in percent."""
        spread = sqrt(IMAGE**2 + IMAGE_OF_RUN**2 + self.noise**2 + 1)
        return 100 * NormalDist().cdf(mean / spread)

    def study(self, rng: np.random.Generator) -> Results:
        """Results of the runs."""
        runs = {"better": (BETTER, self.trainings), "worse": (WORSE, self.trainings)}
        if self.others:
            runs |= {"other": (BETTER, 3), "another": (WORSE, 3)}
        images = QUERIES // self.captions
        image = rng.normal(0, IMAGE, images)
        keys = tuple(str(n) for n in range(images) for _ in range(self.captions))
        answers, compared = {}, {}
        for run, (mean, count) in runs.items():
            of_image = mean + image + rng.normal(0, IMAGE_OF_RUN, images)
            of_training = rng.normal(0, self.noise, (count, 1))
            chance = rng.normal(0, 1, (count, QUERIES))
            hits = np.repeat(of_image, self.captions) + of_training + chance > 0
            names = tuple(f"{run}.{n}" for n in range(count))
            method = "flame" if self.covered else None
            compared[run] = Compared(trainings=names, method=method, drawn=False)
            for name, hit in zip(names, hits, strict=True):
                answers[name, "b", "m"] = Queries(keys, hit.astype(float))
        return Results(answers, compared)

    def coverage(self, draws: int, seed: int = 0) -> tuple[float, float]:
        """Shares of the intervals of a rate and of a difference that contain the truth."""
        rng = np.random.default_rng(seed)
        better, worse = self.truth(BETTER), self.truth(WORSE)
        hits = np.zeros(2)
        for _ in range(draws):
            results = self.study(rng)
            rate = results.rate("better", [MEASURE])
            difference = results.difference("better", "worse", [MEASURE])
            hits += contains(rate, better), contains(difference, better - worse)
        return hits[0] / draws, hits[1] / draws


SCENES = (
    *(Scene(trainings=n) for n in (1, 2, 3, 5)),
    *(Scene(trainings=n, noise=0.36) for n in (1, 2, 3, 5)),
    *(Scene(trainings=n, noise=0.0) for n in (1, 2, 3, 5)),
    *(Scene(trainings=n, captions=5) for n in (1, 2, 3, 5)),
    *(Scene(trainings=n, others=False) for n in (2, 3, 5)),
    *(Scene(trainings=n, noise=0.36, others=False) for n in (2, 3, 5)),
    *(Scene(trainings=n, others=False, covered=False) for n in (1, 2, 3, 5)),
)


def contains(estimate: Estimate, value: float) -> bool:
    """Whether an interval contains a value."""
    return estimate.low <= value <= estimate.high


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0, help="number of scenes to skip")
    args = parser.parse_args()
    print("| trainings | training noise | queries per image | other runs | rate | difference |")
    print("| ---: | ---: | ---: | --- | ---: | ---: |")
    for scene in SCENES[args.first :]:
        rate, difference = scene.coverage(args.draws)
        others = "2, trained 3 times" if scene.others else "none"
        others = others if scene.covered else "interval over queries only"
        told = f"{scene.trainings} | {scene.noise:.2f} | {scene.captions} | {others}"
        print(f"| {told} | {rate:.1%} | {difference:.1%} |", flush=True)


if __name__ == "__main__":
    main()

"""What is in a picture: a point in the space of facets."""

from dataclasses import asdict, dataclass

from flame.data.datasets.scenes.words import MOOD


@dataclass(frozen=True, slots=True)
class Scene:
    """The facets of one picture, as plain names of `words.yaml`; only people have an action."""

    noun: str
    tint: str
    minor: str
    minor_tint: str
    place: str
    light: str
    weather: str
    relation: str
    action: str | None

    @property
    def mood(self) -> str:
        """The mood that light and weather make."""
        return MOOD[self.light, self.weather]

    @property
    def attributes(self) -> dict[str, str | None]:
        """All facets and the mood, by name."""
        return {**asdict(self), "mood": self.mood}

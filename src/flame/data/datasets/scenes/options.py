"""Options of a set of scenes."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from flame.data.datasets.scenes import languages
from flame.data.datasets.scenes.words import MEMBERS, VALUES, WORDS
from flame.runtime.errors import known


class Options(BaseModel):
    """Contents of one set of scenes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    split: str = Field(pattern="^[a-z0-9-]+$")
    """Name of the random stream; sets of different splits are drawn independently."""
    images: int = Field(gt=0)
    """Number of images."""
    raw: int = Field(default=0, ge=0, le=len(WORDS["raw"]))
    """Raw captions per image."""
    short: int = Field(default=0, ge=0, le=len(WORDS["short"]))
    """Short captions per image."""
    extra_short: float = Field(default=0.0, ge=0, le=1)
    """Share of the images that have one more short caption."""
    long: int = Field(default=0, ge=0)
    """Long captions per image."""
    grammars: Literal["train", "held-out"] = "train"
    """Grammars of the long captions."""
    people: float = Field(default=0.15, ge=0, le=1)
    """Share of the images whose main object is a person in action."""
    members: str | None = None
    """Category that all main objects come from; None for any."""
    group: int = Field(default=4, ge=2)
    """Images of a group, for sets with `differ`; their keys end in -0, -1, ..."""
    differ: tuple[Literal["minor", "minor_tint", "relation", "tint", "light", "weather"], ...] = ()
    """Facets in which the images of a group differ, surely in the first one; they share all others.
    Empty for images that have nothing to do with each other."""
    drawings: int = Field(default=1, ge=1)
    """Pictures of each scene, with other sizes, places and backgrounds; a training set may have
    several."""
    classify: (
        Literal["noun", "tint", "place", "relation", "mood", "light", "weather", "action"] | None
    ) = None
    """Facet that is the label of the images, in equal numbers; None for no labels."""
    language: Literal[
        "en", "es", "ja", "ko", "pt", "it", "fr", "de", "fa", "id", "zh", "ru", "tr", "ar"
    ] = "en"
    """Language of the short captions and of the class texts; labels stay English."""
    compose: (
        Literal[
            "winoground",
            "add_att",
            "add_obj",
            "replace_att",
            "replace_obj",
            "replace_rel",
            "swap_att",
            "swap_obj",
        ]
        | None
    ) = None
    """Minimal edit by which two captions (kinds `positive`, `negative`) or two images differ."""

    @field_validator("members")
    @classmethod
    def _known_category(cls, members: str | None) -> str | None:
        if members is not None and members not in MEMBERS:
            raise ValueError(f"unknown category {known(members, MEMBERS)}")
        return members

    @model_validator(mode="after")
    def _possible(self) -> "Options":
        if self.classify and self.differ:
            raise ValueError(f"differ {self.differ} excludes classify {self.classify!r}")
        if self.differ and self.group > (most := _fewest_values(self.differ[0])):
            raise ValueError(
                f"group {self.group}: images can differ in {self.differ[0]!r} in {most} ways only"
            )
        if self.differ and self.images % self.group:
            raise ValueError(f"images {self.images} are not whole groups of {self.group}")
        if self.classify == "action" and self.members not in (None, "person"):
            raise ValueError(
                f"members {self.members!r} have no actions to classify; only 'person' has"
            )
        if self.short == len(WORDS["short"]) and self.extra_short:
            raise ValueError(
                f"extra_short needs short below {self.short}: there are no other forms"
            )
        return self

    @model_validator(mode="after")
    def _possible_in_its_language(self) -> "Options":
        if self.language == "en":
            return self
        english = [name for name in ("raw", "long", "compose") if getattr(self, name)]
        if english:
            raise ValueError(f"{english[0]} is English only, not {self.language!r}")
        if self.classify not in (None, "noun"):
            raise ValueError(f"classify {self.classify!r} is English only; in others only 'noun'")
        forms = languages.num_forms(self.language)
        if self.short + (self.extra_short > 0) > forms:
            raise ValueError(
                f"short {self.short} with extra_short {self.extra_short} needs more than the "
                f"{forms} short forms of language {self.language!r}"
            )
        return self

    @model_validator(mode="after")
    def _possible_to_compose(self) -> "Options":
        if not self.compose:
            return self
        excluded = ["raw", "short", "extra_short", "long", "classify", "differ"]
        asked = [name for name in excluded if getattr(self, name)]
        # Composed scenes show two objects, so the default share of people is ignored.
        if self.people and "people" in self.model_fields_set:
            asked.append("people")
        if asked:
            value = getattr(self, asked[0])
            raise ValueError(f"compose {self.compose!r} excludes {asked[0]} {value!r}")
        if self.members == "person":
            raise ValueError(f"compose {self.compose!r} shows objects, not members 'person'")
        if self.compose == "winoground" and self.images % 2:
            raise ValueError(f"images {self.images} is odd; compose 'winoground' draws pairs")
        return self


def _fewest_values(facet: str) -> int:
    """Values of a facet that any scene can have: objects differ, and rooms have no weather."""
    if facet == "weather":
        return 1
    return len(VALUES[facet]) - (facet == "minor")

"""What each prompt knows: linear probes on stored embeddings (ours, not the paper's)."""

from pydantic import Field, PositiveFloat

from flame.study.schema.section import Section


class Knowledge(Section):
    """Attributes of a data set's images that are read from the embeddings of their captions."""

    dataset: str = Field(description="one whose attributes are known, such as scenes")
    captions: str = Field(default="long", description="kind of captions; all its facets are probed")
    llms: dict[str, str] = Field(min_length=1, description="label -> LLM, one block each")
    attributes: dict[str, str] = Field(
        min_length=1, description="attribute -> label, one column each"
    )
    asks_for: dict[str, str] = Field(
        default={}, description="facet -> attribute that its prompt asks for, for claims"
    )
    folds: int = Field(
        default=4, ge=2, description="parts of the captions, each held out once (cross-validation)"
    )
    penalties: tuple[PositiveFloat, ...] = Field(
        default=(1e-4, 1e-3, 1e-2, 1e-1, 1.0),
        min_length=1,
        description="of the ridge, per training caption; leave-one-out on them chooses",
    )


class Knows(Section):
    """What a claim on the probes compares, paired by caption."""

    llm: str = Field(description="a label of `llms` of the block `knowledge`")
    beyond: str | None = Field(
        default=None,
        description="another label: means over all prompts and attributes are compared; null: each "
        "prompt on what it asks for, with the mean of the other prompts",
    )

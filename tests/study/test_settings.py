"""Snakemake compares settings as JSON text, so the order of their fields must not change."""

from flame.study.schema.llms import LLMOptions
from flame.study.settings import EmbedSettings, ExportSettings

OPTIONS = ["layer", "final_norm", "positions", "max_caption_tokens", "cleanup"]


def test_how_an_llm_reads_is_one_block_at_its_place_in_the_json():
    before, after = ["kind", "datasets", "part", "parts", "llm"], ["storage", "prefix", "facets"]
    assert [*EmbedSettings.model_fields] == [*before, *OPTIONS, *after, "version"]
    expected = ["run", "checkpoint", "reset", *OPTIONS, "kinds", "version"]
    assert [*ExportSettings.model_fields] == expected
    assert [*LLMOptions.model_fields] == OPTIONS

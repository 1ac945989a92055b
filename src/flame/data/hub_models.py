"""Models on the hub in the layout of transformers: which of their files are fetched."""

from pathlib import Path

from flame.data import hub
from flame.runtime.checksums import read_json

INDEX = "model.safetensors.index.json"  # of weights in several files
TOKENIZER = ("tokenizer*", "*.jinja", "*.model", "*.txt")


def cached(repo: str, revision: str | None, *, with_code: bool = False) -> Path:
    """Folder of a model below `HF_HOME`; verified files, fetched if they are not there.

    Args:
        repo: `owner/name`.
        revision: commit hash, branch or tag; None: the main branch.
        with_code: fetch the Python files beside the model, too.

    Raises:
        ValueError: as in `hub.download`.
    """
    code = ("*.py",) if with_code else ()
    folder = hub.cached(repo, revision, ["*.json"], optional=[*TOKENIZER, *code])
    return hub.cached(repo, folder.name, weights(folder))


def weights(folder: Path) -> list[str]:
    """Names of the files with the weights that transformers loads, by the index in a folder.

    A repository may hold them once more in another layout, such as Mistral's
    `consolidated.safetensors`, of 24.5 GB.
    """
    if not (folder / INDEX).exists():
        return ["model.safetensors"]
    return sorted({*read_json(folder / INDEX)["weight_map"].values()})

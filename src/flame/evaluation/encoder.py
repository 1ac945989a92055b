"""A trained FLAME without the workflow: images and texts -> vectors in one space.

    import flame

    model = flame.load("results/export/flame-7")
    images, texts = model.encode_image([image]), model.encode_text(["a photo of a dog."])
    print(images @ texts.T)

Shapes: B images, T texts, D width of the LLM's hidden states.
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from flame.data import hub, hub_models
from flame.data.pixels import square, to_rgb
from flame.embedding.llm import FrozenLLM
from flame.evaluation.features import directions
from flame.runtime.device import device_of
from flame.runtime.errors import known
from flame.study.schema.llms import HubCheckpoint
from flame.study.settings import ExportSettings
from flame.towers.base import Tower
from flame.towers.load import load as load_tower

RECORD = "export.json"


class Flame:
    """Image tower, and the frozen LLM with the prompts of its training captions.

    Attributes:
        tower: image tower in evaluation mode.
        settings: LLM, and the prompt of each kind of text.
        device: of the tower and the LLM.
    """

    def __init__(self, folder: Path, device: str = "auto", llm: Path | None = None) -> None:
        """Open an export.

        Args:
            folder: as written by `flame.export`.
            device: a torch device; `auto` is the GPU if there is one.
            llm: folder of the LLM, if it is already downloaded.

        Raises:
            ValueError: the folder is not an export.
        """
        if not (folder / RECORD).is_file():
            raise ValueError(f"{folder} is not an export of FLAME: it has no {RECORD}")
        self.settings = ExportSettings.model_validate_json((folder / RECORD).read_text())
        self.device = device_of(device)
        tower, _ = load_tower(folder)
        self.tower: Tower = tower.to(self.device)
        self._folder, self._llm_folder = folder, llm

    @cached_property
    def llm(self) -> FrozenLLM:
        """The frozen LLM, downloaded and loaded on first use."""
        settings, folder = self.settings, self._llm_folder or self._folder / "llm"
        if not folder.is_dir():
            assert isinstance(settings.checkpoint, HubCheckpoint)
            llm = settings.checkpoint
            folder = hub_models.cached(llm.id, llm.revision)
        return FrozenLLM(folder, settings, device=str(self.device))

    def preprocess(self, image: Image.Image) -> Tensor:
        """Pixels (3, H, W) in [0, 1] of an image of any mode and size."""
        pixels = square(to_rgb(image), self.tower.image_size, self.tower.resize)
        return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255

    @torch.inference_mode()
    def encode_image(self, images: Sequence[Image.Image] | Tensor) -> Tensor:
        """Image features (B, D) float32, unit norm.

        Args:
            images: B images, or pixels (B, 3, H, W) in [0, 1] from `preprocess`.
        """
        if not isinstance(images, Tensor):
            images = torch.stack([self.preprocess(image) for image in images])
        return normalize(self.tower.encode_image(images.to(self.device)).float(), dim=-1)

    @torch.inference_mode()
    def encode_text(self, texts: Sequence[str], kind: str = "short") -> Tensor:
        """Text features (T, D) float32, unit norm, on the device of the tower.

        Args:
            texts: T texts in any language that the LLM supports.
            kind: kind of the texts, which selects the prompt.

        Raises:
            ValueError: unknown kind.
        """
        if kind not in self.settings.kinds:
            raise ValueError(f"kind {known(kind, self.settings.kinds)}")
        reading = self.settings.kinds[kind]
        texts, _ = self.llm.prepare(texts)
        vectors = self.llm.embed(texts, reading.prefix, [*reading.facets.values()])
        centers = self.tower.centers.get(reading.center, {}) if reading.center else {}
        # Rounded as in a store, so that benchmarks give the same numbers.
        return directions(vectors.half(), [*reading.facets], centers).to(self.device)


def load(
    path: str | Path, *, revision: str | None = None, device: str = "auto", llm: Path | None = None
) -> Flame:
    """A trained FLAME.

    Args:
        path: folder of an export, or `owner/name` of a model on the hub.
        revision: of the model on the hub.
        device: a torch device; `auto` is the GPU if there is one.
        llm: folder of the LLM, if it is already downloaded.

    Raises:
        ValueError: `path` is neither an existing folder nor the name of a model.
    """
    folder = Path(path)
    if not folder.is_dir():
        if str(path).count("/") != 1 or folder.is_absolute():
            raise ValueError(f"{path} is neither a folder nor owner/name of a model on the hub")
        folder = hub.cached(str(path), revision, ["*"])
    return Flame(folder, device, llm)

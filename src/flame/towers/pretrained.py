"""Pretrained baselines: CLIP models of open_clip and of transformers.

Each keeps its own preprocessing and tokenizer. A download is a folder that the library itself can
load, so evaluation needs no network.

Shapes: B images, T texts, D width of the shared embedding space.
"""

import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from flame.data import hub
from flame.runtime.checksums import seal, verify
from flame.runtime.errors import known
from flame.runtime.resumable import write_atomic
from flame.study.schema.runs import OpenClipTower, TransformersTower
from flame.study.settings import PretrainedTower

log = logging.getLogger(__name__)

TEXT = "text"  # folder with the config of a transformers text tower in an open_clip model
# Resize modes of open_clip -> names in `flame.data.images`.
RESIZES = {"shortest": "crop", "squash": "squash"}
# Language codes of the benchmarks -> source languages of the NLLB tokenizer (as clip_benchmark).
NLLB = {
    "ar": "arb_Arab", "bn": "ben_Beng", "cs": "ces_Latn", "da": "dan_Latn", "de": "deu_Latn",
    "el": "ell_Grek", "en": "eng_Latn", "es": "spa_Latn", "fa": "pes_Arab", "fi": "fin_Latn",
    "fil": "tgl_Latn", "fr": "fra_Latn", "he": "heb_Hebr", "hi": "hin_Deva", "hr": "hrv_Latn",
    "hu": "hun_Latn", "id": "ind_Latn", "it": "ita_Latn", "ja": "jpn_Jpan", "ko": "kor_Hang",
    "mi": "mri_Latn", "nl": "nld_Latn", "no": "nno_Latn", "pl": "pol_Latn", "pt": "por_Latn",
    "quz": "quy_Latn", "ro": "ron_Latn", "ru": "rus_Cyrl", "sv": "swe_Latn", "sw": "swh_Latn",
    "te": "tel_Telu", "th": "tha_Thai", "tr": "tur_Latn", "uk": "ukr_Cyrl", "vi": "vie_Latn",
    "zh": "zho_Hant",
}  # fmt: skip


class _Library(Protocol):
    """A model of a library with its preprocessing and tokenizer."""

    model: Any
    image_size: int
    resize: str
    mean: Any
    std: Any

    def images(self, pixels: Tensor) -> Tensor:
        """Features (B, D) of normalized pixels (B, 3, H, W)."""
        ...

    def texts(self, texts: Sequence[str], language: str | None) -> Tensor:
        """Features (T, D)."""
        ...


class PretrainedClip(nn.Module):
    """A pretrained image tower and its text tower.

    Attributes:
        dim: D.
        image_size: height and width of the input, in pixels.
        resize: how images are made square; a key of `flame.data.pixels.RESIZES`.
        centers: empty.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, library: _Library) -> None:
        super().__init__()
        self.model = library.model
        self.image_size, self.resize = library.image_size, library.resize
        self.centers: dict[str, Mapping[str, Tensor]] = {}
        self._library = library
        for name in ("mean", "std"):
            values = torch.tensor(list(getattr(library, name)))
            self.register_buffer(name, values.view(3, 1, 1), persistent=False)
        with torch.inference_mode():
            self.dim = self.encode_text(["a"]).shape[1]

    def encode_image(self, images: Tensor) -> Tensor:
        """Image features (B, D), not normalized, of pixels (B, 3, H, W) in [0, 1]."""
        return self._library.images((images - self.mean) / self.std)

    def encode_text(self, texts: Sequence[str], language: str | None = None) -> Tensor:
        """Text features (T, D), not normalized.

        Args:
            texts: T texts.
            language: two-letter code, for tokenizers that need it; English by default.
        """
        return self._library.texts(list(texts), language)


class _OpenClip:
    """A model of open_clip, in a folder written by `download`."""

    def __init__(self, folder: Path) -> None:
        import open_clip

        name = f"local-dir:{folder}"
        config = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
        if (folder / TEXT).is_dir():
            # open_clip would fetch the config of a transformers text tower from the hub.
            config["text_cfg"]["hf_model_name"] = str(folder / TEXT)
        self.model = open_clip.create_model(
            name, pretrained_text=False, text_cfg=config["text_cfg"]
        ).eval()
        self._tokenizer = open_clip.get_tokenizer(name)
        pixels = self.model.visual.preprocess_cfg
        size = pixels["size"]
        self.image_size = size if isinstance(size, int) else size[0]
        self.resize = RESIZES[pixels["resize_mode"]]
        self.mean, self.std = pixels["mean"], pixels["std"]

    def images(self, pixels: Tensor) -> Tensor:
        return self.model.encode_image(pixels)

    def texts(self, texts: Sequence[str], language: str | None) -> Tensor:
        if hasattr(self._tokenizer, "set_lang_fn"):
            code = language or "en"
            if code not in NLLB:
                raise ValueError(f"NLLB has no source language for {known(code, NLLB)}")
            self._tokenizer.set_language(NLLB[code])
        device = next(self.model.parameters()).device
        return self.model.encode_text(self._tokenizer(texts).to(device))


class _Transformers:
    """A CLIP-like model of transformers, e.g. Chinese-CLIP, in a folder written by `download`."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

        self.model = AutoModel.from_pretrained(folder).eval()
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        pixels = AutoImageProcessor.from_pretrained(folder)
        self.mean, self.std = pixels.image_mean, pixels.image_std
        size = dict(pixels.size)
        whole = "shortest_edge" not in size or size["shortest_edge"] is None
        self.resize = "squash" if whole else "crop"
        self.image_size = size["height"] if whole else dict(pixels.crop_size)["height"]

    def images(self, pixels: Tensor) -> Tensor:
        return _pooled(self.model.get_image_features(pixel_values=pixels))

    def texts(self, texts: Sequence[str], language: str | None) -> Tensor:
        longest = self.model.config.text_config.max_position_embeddings
        limit = min(self._tokenizer.model_max_length, longest)
        tokens = self._tokenizer(
            texts, padding=True, truncation=True, max_length=limit, return_tensors="pt"
        )
        return _pooled(self.model.get_text_features(**tokens.to(self.model.device)))


def _pooled(output: Any) -> Tensor:
    """Features in the shared space; transformers 5 returns them inside an output object."""
    return output if isinstance(output, Tensor) else output.pooler_output


LIBRARIES: dict[str, Callable[[Path], _Library]] = {
    "open_clip": _OpenClip,
    "transformers": _Transformers,
}


def download(settings: PretrainedTower, folder: Path) -> None:
    """Fetch a tower and write it in the format of its library, with a `run.json`.

    Args:
        settings: the tower.
        folder: an existing folder.

    Raises:
        ValueError: open_clip does not know the name or tag, or the checkpoint does not exist.
    """
    match settings.tower:
        case OpenClipTower():
            package = _from_open_clip(settings.tower, folder)
        case TransformersTower():
            package = _from_transformers(settings.tower, folder)
    tower = PretrainedClip(LIBRARIES[settings.tower.source](folder))
    record = {
        "settings": settings.model_dump(mode="json"),
        "dim": tower.dim,
        "image_size": tower.image_size,
        "resize": tower.resize,
        "versions": {name: version(name) for name in (package, "torch")},
    }
    write_atomic(folder / "run.json", (json.dumps(record, indent=2) + "\n").encode())
    seal(folder)


def load(folder: Path, settings: PretrainedTower) -> PretrainedClip:
    """A tower written by `download`, in evaluation mode.

    Raises:
        ValueError: a file is corrupt.
    """
    verify(folder)
    return PretrainedClip(LIBRARIES[settings.tower.source](folder)).eval()


def _from_open_clip(tower: OpenClipTower, folder: Path) -> str:
    import open_clip
    from open_clip.push_to_hf_hub import save_for_hf

    if tower.name not in open_clip.list_models():
        raise ValueError(f"open_clip has no model {known(tower.name, open_clip.list_models())}")
    tags = open_clip.list_pretrained_tags_by_model(tower.name)
    if tower.tag not in tags and not Path(tower.tag).is_file():
        raise ValueError(f"open_clip has no weights of {tower.name!r} {known(tower.tag, tags)}")
    of_tag = open_clip.get_pretrained_cfg(tower.name, tower.tag) or {}
    config = open_clip.get_model_config(tower.name)
    if of_tag.get("quick_gelu", False) and not config.get("quick_gelu", False):
        # open_clip only warns, but the features would be wrong.
        raise ValueError(
            f"the weights {tower.tag!r} were trained with QuickGELU: use the model "
            f"{tower.name + '-quickgelu'!r}, not {tower.name!r}"
        )
    with _verified_weights(of_tag, folder / "hub"):
        model = open_clip.create_model(tower.name, pretrained=tower.tag, require_pretrained=True)
    tokenizer = open_clip.get_tokenizer(tower.name)
    for name in ("hf_model_name", "hf_tokenizer_name"):  # small files that open_clip itself fetches
        if config["text_cfg"].get(name):
            hub.verify_cache(config["text_cfg"][name])
    if not hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained = lambda folder: None  # open_clip's own one comes with it
    save_for_hf(model, tokenizer, config, str(folder), safe_serialization=True)
    if "hf_model_name" in config.get("text_cfg", {}):
        model.text.config.save_pretrained(folder / TEXT)
    return "open_clip_torch"


@contextmanager
def _verified_weights(of_tag: dict[str, Any], folder: Path) -> Iterator[None]:
    """Let open_clip load the weights of a tag from a verified download instead of its own.

    Args:
        of_tag: open_clip's entry for the tag; empty for a file of weights.
        folder: for the download; deleted at the end.
    """
    from open_clip.constants import HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME

    if not of_tag.get("hf_hub"):
        yield
        return
    repo, _, file = of_tag["hf_hub"].rpartition("/")
    file = file or HF_WEIGHTS_NAME
    # The names that open_clip prefers, in its order.
    safe = HF_SAFE_WEIGHTS_NAME if file == HF_WEIGHTS_NAME else f"{Path(file).stem}.safetensors"
    there = hub.list_files(repo, "main", folder, kind="model")
    file = safe if safe in there else file
    of_tag["file"] = str(hub.download(repo, "main", [file], folder, kind="model") / file)
    try:
        yield
    finally:
        del of_tag["file"]
    shutil.rmtree(folder)


def _from_transformers(tower: TransformersTower, folder: Path) -> str:
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    if tower.revision is None and not Path(tower.id).is_dir():
        raise ValueError(f"tower {tower.id!r} is not a folder, and a hub id needs a revision")
    source = Path(tower.id)
    if not source.is_dir():
        source = _transformers_files(tower, folder / "hub")
    for auto in (AutoModel, AutoTokenizer, AutoImageProcessor):
        try:
            part = auto.from_pretrained(source)
        except OSError as error:
            raise ValueError(f"tower {tower.id!r}: {str(error).splitlines()[0]}") from error
        part.save_pretrained(folder)
    shutil.rmtree(folder / "hub", ignore_errors=True)
    return "transformers"


def _transformers_files(tower: TransformersTower, folder: Path) -> Path:
    """Verified download of what transformers reads of a repository."""
    assert tower.revision is not None
    place = (tower.id, tower.revision)
    there = hub.list_files(*place, folder, kind="model")
    top = [name for name in there if "/" not in name]
    has_safetensors = any(name.endswith(".safetensors") for name in top)
    weights = ".safetensors" if has_safetensors else ".bin"
    names = [name for name in top if name.endswith((weights, ".json", ".txt", ".model"))]
    return hub.download(*place, names, folder, kind="model")

"""Convert a data set of this project to the layout that clip_benchmark reads."""

import json
import tarfile
from io import BytesIO
from pathlib import Path

import polars as pl
from PIL import Image

from flame.data.images import ImageReader


def write(dataset: Path, out: Path, *, captions: str | None = None) -> Path:
    """Convert a data set.

    Args:
        dataset: folder of ours.
        out: folder to write; `templates.json` in it goes to `--custom_template_file`.
        captions: kind, for retrieval; a classification without.
    """
    reader = ImageReader(dataset)
    (out / "test").mkdir(parents=True)
    (out / "test" / "nshards.txt").write_text("1")
    if captions:
        table = pl.read_parquet(dataset / "captions.parquet").filter(kind=captions)
        texts = dict(table.group_by("key", maintain_order=True).agg("text").rows())
        (out / "dataset_type.txt").write_text("retrieval")
    else:
        classes = pl.read_parquet(dataset / "captions.parquet").filter(kind="class")
        words = dict(classes.group_by("key", maintain_order=True).agg("text").rows())
        names = sorted(words)
        (out / "classnames.txt").write_text("\n".join(names))
        (out / "templates.json").write_text(json.dumps({"wds/scenes": words}))
    with tarfile.open(out / "test" / "0.tar", "w") as tar:
        for i, key in enumerate(reader.keys):
            image = BytesIO()
            Image.fromarray(reader.read(i)).save(image, "PNG")
            if captions:
                answer = {"txt": "\n".join(texts[key])}
            else:
                answer = {"cls": str(names.index(reader.labels[i]))}
            members = {"png": image.getvalue()} | {k: v.encode() for k, v in answer.items()}
            for kind, data in members.items():
                info = tarfile.TarInfo(f"{key}.{kind}")
                info.size = len(data)
                tar.addfile(info, BytesIO(data))
    return out

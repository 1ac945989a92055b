"""docs/datasets.md: `python -m flame.data.datasets > docs/datasets.md`."""

import sys
from types import ModuleType

from flame.data.datasets import module, names

HEAD = """# Data sets

What `python -m flame.data.datasets` prints: the cards of the modules in `src/flame/data/datasets`.
A study names a module as `source` and its options under `options`; what it fetches stays in
`resources/raw/<module>`. After a download the number of images is compared with the one here.
`main` as a revision means that no commit was verified for this file: the manifest beside the images
tells which one it was.
"""


def document() -> str:
    """All cards as one Markdown file."""
    modules = {name: module(name) for name in names()}
    rows = [
        f"| [`{name}`](#{name}) | {m.CARD.title} | {_images(m)} | {_bytes(m)} | {_short(m)} "
        f"| {m.CARD.used_in} |"
        for name, m in modules.items()
    ]
    head = ["| module | data set | images | download | needs | used in |", "|" + " --- |" * 6]
    parts = [_section(name, m) for name, m in modules.items()]
    return "\n".join([HEAD, *head, *rows, "", "\n".join(parts)])


def _section(name: str, found: ModuleType) -> str:
    card = found.CARD
    told = {
        "what it is": card.title,
        "source": card.source,
        "licence": card.licence,
        "images": _images(found),
        "texts": card.texts,
        "download": _bytes(found),
        "needs": card.needs,
        "used in": card.used_in,
        "options": ", ".join(_options(found)),
        "notes": card.notes,
    }
    lines = [f"- **{what}**: {words}" for what, words in told.items() if words]
    return "\n".join([f"## {name}", "", *lines, ""])


def _images(found: ModuleType) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in found.CARD.splits.items()) or "any"


def _bytes(found: ModuleType) -> str:
    size = found.CARD.bytes
    if size is None:
        return ""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def _short(found: ModuleType) -> str:
    """What is needed, up to the first comma or bracket."""
    return found.CARD.needs.split(",")[0].split(":")[0].split(" (")[0]


def _options(found: ModuleType) -> list[str]:
    fields = found.Options.model_fields.items()
    return [f"`{n}`" if f.is_required() else f"`{n}: {_value(f.default)}`" for n, f in fields]


def _value(default: object) -> str:
    match default:
        case None:
            return "null"
        case bool():
            return str(default).lower()
    return str(default)


if __name__ == "__main__":
    sys.stdout.write(document())

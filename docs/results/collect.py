"""Copy the results of a full run to docs/results, and its Table 6 and figures into the README.

Usage: python docs/results/collect.py FOLDER, where `make all` wrote them.
"""

import datetime
import os
import platform
import re
import shutil
import sys
from pathlib import Path

from PIL import Image

HERE = Path(__file__).parent
README = HERE.parents[1] / "README.md"
PIXELS, COLOURS = (1400, 2800), 128  # of a copied figure: below 300 kB
KNOWLEDGE = """
<img src="docs/results/knowledge.png" width="100%" alt="Accuracy of linear probes, by prompt and attribute">

*What each prompt knows (ours, not the paper's): how often a linear probe names an attribute of a scene from
the stored embedding of its long caption, for SmolLM2-135M, Gemma-3-270M, and SmolLM2 with random weights. Read
along a column: the prompts of a trained LLM differ. They tend to know best what they ask for (dots), and the
single prompt `scene` has lost much of the minor object. With random weights, all prompts are alike.
[Every number with its interval](docs/results/knowledge.md).*
"""  # noqa: E501
SHOWN = {
    "figure4": "Retrieval in 14 languages: CLIP and FLAME, trained on English captions",
    "figure6": "FLAME trained with one to nine prompts, with 95 % intervals",
}


def collect(results: Path) -> None:
    """Copy all tables, figures and claims, and name the machine and the date."""
    pages = [path for path in sorted(results.glob("*.md")) if path.name != "README.md"]
    figures = sorted(results.glob("*.png"))
    for path in pages:
        shutil.copy(path, HERE)
    for path in figures:
        image = Image.open(path).convert("RGB")
        image.thumbnail(PIXELS)
        image.quantize(COLOURS).save(HERE / path.name, optimize=True)
    date = datetime.date.fromtimestamp((results / "claims.md").stat().st_mtime)
    page = HERE / "README.md"
    replace(page, "run", f"Computed on {date} on {os.cpu_count()} cores of {processor()}.")
    replace(page, "tables", "\n".join(f"- [{title(path)}]({path.name})" for path in pages))
    shown = (f"![{path.stem}]({path.name})" for path in figures)
    replace(page, "figures", "\n" + "\n\n".join(shown))
    if (results / "knowledge.png").exists():
        replace(README, "knowledge", KNOWLEDGE)
    pictures = (
        f'<img src="docs/results/{name}.png" width="49%" alt="{text}">'
        for name, text in SHOWN.items()
    )
    replace(README, "figures", "\n" + "\n".join(pictures))
    replace(README, "table6", without_small_print((results / "table6.md").read_text("utf-8")))


def title(page: Path) -> str:
    """First line of a page without its markup."""
    return page.read_text("utf-8").split("\n", 1)[0].strip("*# ")


def without_small_print(table: str) -> str:
    """The measured rows of a table, without intervals and without the paper's numbers."""
    block = table[table.index("| prompts") :].split("\n\n")[0]
    rows = [row for row in block.splitlines() if not row.startswith("| <sub>paper")]
    return re.sub(r"<br><sub>[^|]*</sub>", "", "\n".join(rows))


def processor() -> str:
    """Model of the processor."""
    path = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.+)$", path.read_text(), re.M) if path.exists() else []
    return names[0] if names else platform.machine()


def replace(page: Path, name: str, text: str) -> None:
    """Put a text between the marks of a name in a page."""
    marks = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
    found = re.sub(marks, lambda m: f"{m[1]}{text}\n{m[2]}", page.read_text("utf-8"), flags=re.S)
    page.write_text(found, "utf-8")


if __name__ == "__main__":
    collect(Path(sys.argv[1]))

"""Results -> one figure of the paper, as PNG and as PDF."""

import io
import logging
from pathlib import Path

from matplotlib.figure import Figure

from flame.report import figures
from flame.runtime import command
from flame.runtime.resumable import write_atomic
from flame.study.schema.figures import module
from flame.study.settings import FigureSettings

DPI = 200


def figure(inputs: list[Path], png: Path, pdf: Path, settings: FigureSettings) -> None:
    """Draw one figure; the same inputs give the same bytes.

    Args:
        inputs: files that this kind of figure is drawn from (`flame.report.figures`).
        png: PNG to write, 200 dots per inch.
        pdf: PDF to write.
        settings: the figure.
    """
    # Subsetting a font for a PDF logs a line per glyph.
    logging.getLogger("fontTools").setLevel(logging.WARNING)
    with figures.style():
        drawn = module(settings.figure.kind).draw(inputs, settings)
        write_atomic(png, _content(drawn, "png", {"Software": None}))
        # Without a date: the same inputs give the same bytes.
        write_atomic(pdf, _content(drawn, "pdf", {"CreationDate": None}))


def _content(drawn: Figure, form: str, metadata: dict[str, None]) -> bytes:
    content = io.BytesIO()
    drawn.savefig(content, format=form, metadata=metadata, dpi=DPI)
    return content.getvalue()


if __name__ == "__main__":
    command.main(figure)

"""Output that is written aside, resumed after an interruption, and renamed once complete."""

import json
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flame.runtime.disk import room
from flame.runtime.lease import lease

log = logging.getLogger(__name__)

LEASE = "lease.lock"


@contextmanager
def resumable(
    output: Path, fingerprint: Mapping[str, Any], *, file: str | None = None
) -> Iterator[Path]:
    """Folder to write in, which becomes `output` on a clean exit and is kept on any other.

    All work happens in `<output>.partial`, which Snakemake does not know and so never deletes. What
    an interrupted job left there is kept if its fingerprint is the same.

    Args:
        output: folder or file to make; an older one is replaced at the end.
        fingerprint: everything that determines the content, as JSON.
        file: name of a file in the folder, which alone becomes `output`.

    Yields:
        The folder to write in, empty or as an interrupted job left it.

    Raises:
        BusyError: a live job, on this or another host, writes the same output.
        NoRoomError: the disk is full.
    """
    aside = output.with_name(output.name + ".partial")
    with room(aside), lease(aside / LEASE, str(aside)) as check:
        content = _content(aside, fingerprint)
        yield content
        check()
        if output.exists():
            output.rename(aside / f"replaced-{uuid.uuid4().hex}")
        (content / file if file else content).rename(output)
        shutil.rmtree(aside)


def write_atomic(path: Path, content: bytes | Callable[[Path], Any]) -> None:
    """Write a file that is either complete or absent, whatever interrupts.

    Args:
        path: file to write or replace.
        content: its bytes, or a function that writes them to the path it is given.

    Raises:
        NoRoomError: the disk is full.
    """
    temporary = path.with_name(f".tmp-{path.name}")  # keeps the suffix, which some writers go by
    try:
        with room(path):
            if callable(content):
                content(temporary)
            else:
                temporary.write_bytes(content)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _content(aside: Path, fingerprint: Mapping[str, Any]) -> Path:
    """The folder to write in, emptied if its fingerprint is another."""
    content, record = aside / "content", aside / "fingerprint.json"
    wanted = json.dumps(fingerprint, indent=1, sort_keys=True).encode()
    if content.exists() and not (record.exists() and record.read_bytes() == wanted):
        log.info("%s was made from other inputs: starting over", aside)
        shutil.rmtree(content)
    write_atomic(record, wanted)
    content.mkdir(exist_ok=True)
    for torn in content.rglob(".tmp*"):  # of a killed `write_atomic` or safetensors
        torn.unlink()
    return content

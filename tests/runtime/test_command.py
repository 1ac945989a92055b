"""The command line of a stage, where it is told to end."""

import os
import subprocess
import sys
from pathlib import Path

STAGE = """
import sys
from flame.runtime import command

def stage() -> None:
    try:
        print("begun", flush=True)
        sys.stdin.readline()
    finally:
        print("leaving", flush=True)
        sys.stdin.readline()
        print("left", flush=True)

command.main(stage)
"""
SRC = Path(__file__).parents[2] / "src"


def test_a_second_sigterm_does_not_cut_short_what_the_first_one_began():
    """Under a scheduler, both it and Snakemake send one."""
    process = subprocess.Popen(
        [sys.executable, "-c", STAGE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(SRC)},
    )
    for line in ("begun\n", "leaving\n"):
        assert process.stdout.readline() == line
        process.terminate()
    said, errors = process.communicate("\n")
    assert (said, errors, process.returncode) == ("left\n", "", 143)


MISTAKEN = """
import signal
from flame.runtime import command

def stage() -> None:
    try:
        signal.raise_signal(signal.SIGTERM)
    except SystemExit as end:
        raise ValueError("shape of object") from end

command.main(stage)
"""


def test_an_end_that_a_library_takes_for_an_error_is_an_end():
    """As torch does with what is raised while it asks an object for its shape."""
    environment = os.environ | {"PYTHONPATH": str(SRC)}
    done = subprocess.run(
        [sys.executable, "-c", MISTAKEN], capture_output=True, text=True, env=environment
    )
    assert (done.stderr, done.returncode) == ("", 143)

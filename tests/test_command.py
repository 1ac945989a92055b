"""The command line of a stage, where it is told to end."""

import os
import subprocess
import sys
from pathlib import Path

STAGE = """
import sys
from flame import command

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
SRC = Path(__file__).parents[1] / "src"


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

"""Command line of every stage: settings as JSON, one-line errors, clean termination."""

import logging
import os
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, get_args

import tyro
from pydantic import BaseModel, TypeAdapter
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo


def main(stage: Callable[..., None] | Mapping[str, Callable[..., None]]) -> None:
    """Run a stage from the command line: its signature is the CLI, its docstring the help.

    Functions by name become subcommands. A parameter that is a pydantic model, or a union of
    them, is given as one JSON argument. SIGTERM (a scheduler's time limit) becomes SystemExit, so
    that `finally` blocks run and partial results are kept. User errors (ValueError, OSError) end
    in one line, unless FLAME_TRACEBACK is set; all others keep their traceback.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    signal.signal(signal.SIGTERM, _terminate)
    registry = ConstructorRegistry()
    registry.primitive_rule(_json_argument)
    with registry:
        try:
            if callable(stage):
                tyro.cli(stage, config=(tyro.conf.OmitArgPrefixes,))
            else:
                tyro.extras.subcommand_cli_from_dict(
                    dict(stage), config=(tyro.conf.OmitArgPrefixes,)
                )
        except (ValueError, OSError) as error:
            if os.environ.get("FLAME_TRACEBACK"):
                raise
            if (
                signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
            ):  # a library reported our termination as an error
                sys.exit(128 + signal.SIGTERM)
            sys.exit(f"{Path(sys.argv[0]).stem}: error: {error}")
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # nothing is left but to exit


def _json_argument(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    models = get_args(info.type) or (info.type,)
    if not all(isinstance(model, type) and issubclass(model, BaseModel) for model in models):
        return None
    adapter: TypeAdapter[Any] = TypeAdapter(info.type)
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="JSON",
        instance_from_str=lambda args: adapter.validate_json(args[0]),
        is_instance=lambda value: isinstance(value, models),
        str_from_instance=lambda value: [value.model_dump_json()],
    )


def _terminate(signum: int, frame: FrameType | None) -> None:
    signal.signal(signum, signal.SIG_IGN)  # both a scheduler and Snakemake may send one
    sys.exit(128 + signum)

"""Requests to the hub: its endpoint, retries while it is busy, and errors in one line."""

import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_token

from flame.runtime.disk import NoRoomError
from flame.runtime.errors import root_cause
from flame.runtime.lease import BusyError

log = logging.getLogger(__name__)
logging.getLogger("httpx2").setLevel(logging.WARNING)  # otherwise one line per request

T = TypeVar("T")

RETRIES = 6  # of one request that the hub cannot answer now
BACKOFF = 1.0  # seconds before the first retry, doubled before each later one
LONGEST_WAIT = 600  # seconds, whatever the hub's Retry-After says
BUSY = (429, 500, 502, 503, 504)


def endpoint() -> str | None:
    """Address of the hub; None: the public one."""
    return os.environ.get("HF_ENDPOINT") or None


def with_retries(call: Callable[[], T]) -> T:
    """Result of a request, retried while the hub is busy."""
    for attempt in range(RETRIES):
        try:
            return call()
        except (HfHubHTTPError, LocalEntryNotFoundError) as error:
            # The second one wraps the first where the headers of a file could not be read.
            response = getattr(error, "response", None) or getattr(
                error.__cause__, "response", None
            )
            if response is None or response.status_code not in BUSY:
                raise
            asked = response.headers.get("Retry-After", "")
            wait = float(asked) if asked.isdigit() else BACKOFF * 2**attempt
            log.warning("the hub answers %s: retrying", response.status_code)
            time.sleep(min(wait, LONGEST_WAIT))
    return call()


class UnreachableError(ValueError):
    """The hub cannot be reached, or cannot answer now."""


@contextmanager
def explained(
    repo: str, revision: str, kind: str, folder: Path, verb: str = "fetch"
) -> Iterator[None]:
    """Errors of huggingface_hub as one line that says what to do and holds no token."""
    token = "HF_TOKEN is set, but may not see it" if get_token() else "HF_TOKEN is not set"
    where = endpoint() or "the Hugging Face hub"
    hint = f"; finished files are kept in {folder}, run again" if verb == "fetch" else ""
    try:
        yield
    except GatedRepoError as error:
        raise ValueError(
            f"{repo!r} is gated: request access on its hub page,"
            " then set HF_TOKEN to a token of that account"
        ) from error
    except RepositoryNotFoundError as error:
        raise ValueError(f"{where} has no {kind} {repo!r}, or it is private ({token})") from error
    except RevisionNotFoundError as error:
        raise ValueError(f"{repo!r} has no revision {revision!r}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} does not answer like a hub: check HF_ENDPOINT") from error
    except (OfflineModeIsEnabled, LocalEntryNotFoundError, HfHubHTTPError) as error:
        raise UnreachableError(
            f"cannot {verb} {repo!r} from {where}: {root_cause(error)}{hint}"
        ) from error
    except (NoRoomError, BusyError):
        raise
    except OSError as error:
        raise UnreachableError(
            f"cannot {verb} {repo!r} from {where}: {root_cause(error)}{hint}"
        ) from error
    except ValueError:
        raise
    except Exception as error:
        # The client raises errors of several families when the network is down.
        if type(error).__module__.split(".")[0] not in ("httpx2", "httpcore2", "huggingface_hub"):
            raise
        raise UnreachableError(
            f"cannot reach {where} for {repo!r}: {root_cause(error)}{hint}"
        ) from error

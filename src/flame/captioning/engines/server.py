"""A server with OpenAI's chat completions API, such as `vllm serve` or llama.cpp."""

import asyncio
import base64
import io
import json
import os
import re
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from email.utils import parsedate_to_datetime
from typing import Any

from flame.captioning.engines.base import Reply, Request, chat
from flame.study.schema.data import ServerCaptioner

PAUSE = 1.0  # seconds before the first retry; doubled for each further one
LONGEST_PAUSE = 300.0  # seconds, even if a server asks for more
OF_ONE_REQUEST = (400, 413, 422)  # HTTP statuses that reject a single request, not the client
FOR_NOW = (408, 425, 429)  # temporary HTTP statuses, besides all from 500 on


class ServerEngine:
    """Any server with OpenAI's chat completions API.

    The server applies the chat template, and adds no special tokens to it (vLLM's adds them only
    where `add_special_tokens` is sent, which it is not): a BOS is read once.
    """

    batch = 1

    def __init__(self, captioner: ServerCaptioner) -> None:
        import requests
        from requests.adapters import HTTPAdapter

        self._captioner = captioner
        self._url = captioner.url.rstrip("/") + "/chat/completions"
        self._token = self._read_token(captioner)
        self._session = requests.Session()
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, HTTPAdapter(pool_maxsize=captioner.concurrency))
        self._ended = threading.Event()
        # An image is several requests, so some always wait for a thread.
        self.calls = captioner.concurrency
        self._pool = ThreadPoolExecutor(captioner.concurrency, "server")

    async def describe(self, requests: Sequence[Request]) -> list[Reply]:
        """As in `Engine`."""
        loop = asyncio.get_running_loop()
        asked = [loop.run_in_executor(self._pool, self._ask, request) for request in requests]
        return await asyncio.gather(*asked)

    def close(self) -> None:
        """As in `Engine`."""
        self._ended.set()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _ask(self, request: Request) -> Reply:
        """The server's reply, with as many attempts as the study allows."""
        import requests

        body, problem = self._body(request), "not sent"
        for attempt in range(self._captioner.attempts):
            pause = PAUSE * 2**attempt
            try:
                response = self._session.post(
                    self._url, json=body, timeout=self._captioner.timeout, auth=self._authorize
                )
                status, words = response.status_code, self._words(response.text)
                if status == requests.codes.ok:
                    return _read_reply(response.json())
            except (requests.RequestException, _NoReplyError) as error:
                problem = f"{type(error).__name__}: {self._words(str(error))}"
            else:
                problem = f"HTTP {status}: {words}"
                if status in OF_ONE_REQUEST:
                    break
                if status < 500 and status not in FOR_NOW:
                    raise ValueError(f"{self._url} refuses requests: {problem}")
                pause = _retry_after(response.headers, pause)
            last = attempt + 1 == self._captioner.attempts
            if last or self._ended.wait(min(pause, LONGEST_PAUSE)):
                break
        return Reply(problem, "error")

    def _body(self, request: Request) -> dict[str, Any]:
        png = io.BytesIO()
        # Lossless, so that every engine sees the same pixels; the level is for speed.
        request.image.save(png, "PNG", compress_level=1)
        url = "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
        sampling = request.sampling
        body = {
            "model": self._captioner.model,
            "messages": chat(request, {"type": "image_url", "image_url": {"url": url}}),
            "max_tokens": request.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
        }
        if request.seed is not None:
            body["seed"] = request.seed
        # These two are extensions of OpenAI's API; a server without them rejects unknown keys.
        if sampling.top_k is not None:
            body["top_k"] = sampling.top_k
        if sampling.repetition_penalty != 1:
            body["repetition_penalty"] = sampling.repetition_penalty
        return body

    def _authorize(self, prepared: Any) -> Any:
        """Set the header last, because requests would replace it by a login from ~/.netrc."""
        if self._token:
            prepared.headers["Authorization"] = f"Bearer {self._token}"
        return prepared

    def _words(self, text: str) -> str:
        """Words of the server, shortened, and without the token in case they quote it."""
        # Shortened last: replacing would miss a token that was cut.
        return (text.replace(self._token, "***") if self._token else text).strip()[:500]

    @staticmethod
    def _read_token(captioner: ServerCaptioner) -> str | None:
        if captioner.token is None:
            return None
        token = os.environ.get(captioner.token, "").strip()
        if not token:
            raise ValueError(
                f"environment variable {captioner.token!r} is not set; the study expects the token "
                f"of {captioner.url} in it"
            )
        if not re.fullmatch("[!-~]+", token):  # an error of http.client would quote it
            raise ValueError(
                f"environment variable {captioner.token!r} does not hold a token: it contains a "
                "space, a line feed or a non-ASCII character"
            )
        return token


class _NoReplyError(ValueError):
    """A response of status 200 without a caption."""


def _read_reply(answer: Any) -> Reply:
    """Caption in the JSON of a chat completion."""
    try:
        choice = answer["choices"][0]
        text, finish = choice["message"]["content"], choice.get("finish_reason")
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise _NoReplyError(f"not a chat completion: {json.dumps(answer)}") from error
    if finish == "content_filter":
        return Reply("blocked by the server's content filter", "error")
    if text is None:  # a refusal, or only reasoning: asking again would give the same
        return Reply(f"the server wrote no text and finished with {finish!r}", "error")
    if not isinstance(text, str):
        raise _NoReplyError(f"the caption is not text: {json.dumps(text)}")
    return Reply(text, "length" if finish == "length" else "stop")


def _retry_after(headers: Mapping[str, str], otherwise: float) -> float:
    """Seconds to wait by the Retry-After header, which is a number or a date."""
    value = headers.get("Retry-After", "").strip()
    try:
        if value.isdigit():
            return float(value)
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return otherwise

"""Images and prompts -> captions by a multimodal LLM, in one of three engines.

The study names the engine. All of them answer the same `Request`s, in order, with one `Reply` each.
The package of an engine is imported when the engine is created, so none needs those of the others.
"""

import base64
import io
import json
import logging
import os
import re
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from importlib.metadata import version
from typing import Any, Literal, Protocol

import torch
from PIL import Image

from flame.runtime.device import device_of
from flame.runtime.errors import known
from flame.study.schema.data import Sampling, ServerCaptioner, TransformersCaptioner, VllmCaptioner

log = logging.getLogger(__name__)

# Packages whose versions affect the captions of an engine.
PACKAGES = {
    "vllm": ("vllm", "transformers", "torch"),
    "server": ("requests",),
    "transformers": ("transformers", "torch"),
}
# Arguments of vllm.LLM that determine which weights and code are run.
IDENTITY = ("model", "revision", "tokenizer_revision", "code_revision", "trust_remote_code")
PAUSE = 1.0  # seconds before the first retry; doubled for each further one
LONGEST_PAUSE = 300.0  # seconds, even if a server asks for more
OF_ONE_REQUEST = (400, 413, 422)  # HTTP statuses that reject a single request, not the client
FOR_NOW = (408, 425, 429)  # temporary HTTP statuses, besides all from 500 on


@dataclass(frozen=True, eq=False)
class Request:
    """One caption to write.

    Args:
        image: upright RGB.
        prompt: question to the model.
        sampling: sampling parameters.
        max_tokens: tokens after which the caption is cut.
        seed: of the sampling.
    """

    image: Image.Image
    prompt: str
    sampling: Sampling
    max_tokens: int
    seed: int


@dataclass(frozen=True)
class Reply:
    """A caption as generated.

    Args:
        text: the caption; for an error, the error message.
        finish: `stop` if the model ended it, `length` if it was cut at `max_tokens`.
    """

    text: str
    finish: Literal["stop", "length", "error"]


class Engine(Protocol):
    """A multimodal LLM, loaded and ready."""

    def describe(self, requests: Sequence[Request]) -> list[Reply]:
        """One reply per request, in order; requests about one image should be adjacent.

        Raises:
            ValueError: the engine cannot answer any request.
        """
        ...


def create(
    captioner: VllmCaptioner | ServerCaptioner | TransformersCaptioner,
) -> Engine:
    """Engine of a captioner, with its model loaded.

    Raises:
        ValueError: a missing token, an unpinned revision of remote code, or a bad option.
    """
    match captioner:
        case VllmCaptioner():
            return _Vllm(captioner)
        case ServerCaptioner():
            return _Server(captioner)
        case TransformersCaptioner():
            return _Transformers(captioner)


def versions(engine: str) -> dict[str, str]:
    """Versions of the packages that affect the captions of an engine."""
    return {name: version(name) for name in PACKAGES[engine]}


def _one_by_one(
    answer: Callable[[Sequence[Request]], list[Reply]], requests: Sequence[Request]
) -> list[Reply]:
    """Replies to a batch of requests, sent one by one if the batch as a whole is refused.

    An image that the preprocessing of a model rejects then costs no other image its caption.
    """
    try:
        return answer(requests)
    except ValueError as error:
        if len(requests) == 1:
            return [Reply(str(error), "error")]
        return [reply for request in requests for reply in _one_by_one(answer, [request])]


class _Vllm:
    """vLLM's offline engine."""

    def __init__(self, captioner: VllmCaptioner) -> None:
        pinned = re.fullmatch("[0-9a-f]{40}", captioner.revision)
        if captioner.trust_remote_code and not pinned:
            raise ValueError(
                f"trust_remote_code runs code of {captioner.id!r}: its revision must be a commit "
                f"(40 hexadecimal digits), not {captioner.revision!r}, which can change"
            )
        for name in captioner.options:
            if name in IDENTITY:
                raise ValueError(f"options: {name!r} is set by the captioner's own keys")
        from vllm import LLM

        revisions = ("revision", "tokenizer_revision", "code_revision")
        self._llm = LLM(
            **{
                "model": captioner.id,
                **dict.fromkeys(revisions, captioner.revision),
                "trust_remote_code": captioner.trust_remote_code,
                "limit_mm_per_prompt": {"image": 1},
                # The image comes before the question, so both prompts share its tokens.
                "enable_prefix_caching": True,
                **captioner.options,
            }
        )
        self._template = captioner.template
        self._stop = self._token_ids(captioner.stop)

    def describe(self, requests: Sequence[Request]) -> list[Reply]:
        return _one_by_one(self._generate, requests)

    def _generate(self, requests: Sequence[Request]) -> list[Reply]:
        params = [self._params(request) for request in requests]
        if self._template is None:
            chats = [_chat(r, {"type": "image_pil", "image_pil": r.image}) for r in requests]
            outputs = self._llm.chat(chats, params, use_tqdm=False)
        else:
            prompts = [
                {
                    "prompt": self._template.replace("{question}", request.prompt),
                    "multi_modal_data": {"image": request.image},
                }
                for request in requests
            ]
            outputs = self._llm.generate(prompts, params, use_tqdm=False)
        answers = [output.outputs[0] for output in outputs]
        return [
            Reply(a.text, a.finish_reason)
            if a.finish_reason in ("stop", "length")
            else Reply(f"vLLM finished with {a.finish_reason!r}", "error")
            for a in answers
        ]

    def _params(self, request: Request) -> Any:
        from vllm import SamplingParams

        sampling = request.sampling
        return SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=-1 if sampling.top_k is None else sampling.top_k,
            repetition_penalty=sampling.repetition_penalty,
            max_tokens=request.max_tokens,
            stop_token_ids=self._stop,
            seed=request.seed,
        )

    def _token_ids(self, tokens: Sequence[str]) -> list[int]:
        vocabulary = self._llm.get_tokenizer().get_vocab()
        for token in tokens:
            if token not in vocabulary:
                special = [name for name in vocabulary if name.startswith("<|")]
                raise ValueError(f"stop: the model has no token {known(token, special)}")
        return [vocabulary[token] for token in tokens]


class _Transformers:
    """A model in transformers, in left-padded batches."""

    def __init__(self, captioner: TransformersCaptioner) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        source, revision = captioner.id, captioner.revision
        self._processor = AutoProcessor.from_pretrained(source, revision=revision)
        self._tokenizer = self._processor.tokenizer
        self._tokenizer.padding_side = "left"
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        self._model = AutoModelForImageTextToText.from_pretrained(
            source, revision=revision, dtype="auto"
        ).eval()
        self._model.to(device_of())
        own = self._model.generation_config
        # Sampling is set by the study, not by the checkpoint.
        own.temperature = own.top_p = own.top_k = own.min_p = own.max_length = None
        ends = own.eos_token_id if own.eos_token_id is not None else self._tokenizer.eos_token_id
        if ends is None:
            raise ValueError(f"{source!r} has no end-of-text token (eos_token_id)")
        self._ends = frozenset(ends if isinstance(ends, list) else [ends])
        self._batch_size = captioner.batch_size

    def describe(self, requests: Sequence[Request]) -> list[Reply]:
        # `generate` takes one set of sampling parameters and one length per batch.
        groups = defaultdict(list)
        for place, request in enumerate(requests):
            groups[request.sampling, request.max_tokens].append(place)
        replies: dict[int, Reply] = {}
        for places in groups.values():
            for start in range(0, len(places), self._batch_size):
                batch = places[start : start + self._batch_size]
                answers = _one_by_one(self._generate, [requests[place] for place in batch])
                replies |= zip(batch, answers, strict=True)
        return [replies[place] for place in range(len(requests))]

    @torch.inference_mode()
    def _generate(self, requests: Sequence[Request]) -> list[Reply]:
        chats = [_chat(r, {"type": "image", "image": r.image}) for r in requests]
        inputs = self._processor.apply_chat_template(
            chats,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        ).to(self._model.device, dtype=self._model.dtype)
        tokens = self._model.generate(
            **inputs,
            do_sample=False,  # the last logits processor samples
            num_beams=1,
            max_new_tokens=requests[0].max_tokens,
            repetition_penalty=requests[0].sampling.repetition_penalty,
            logits_processor=_processors(requests),
            pad_token_id=self._tokenizer.pad_token_id,
            eos_token_id=sorted(self._ends),
        )
        written = tokens[:, inputs["input_ids"].shape[1] :].tolist()
        return [self._reply(row) for row in written]

    def _reply(self, tokens: list[int]) -> Reply:
        end = next((i for i, token in enumerate(tokens) if token in self._ends), None)
        # Special tokens are kept so that they are detected: a good caption has none.
        text = self._tokenizer.decode(tokens[:end], skip_special_tokens=False)
        return Reply(text, "length" if end is None else "stop")


class _Draws:
    """Gumbel noise on the logits of every row, so that the argmax is a sample of their softmax.

    Every row has its own generator: unlike with sampling by `generate`, the caption of an image
    does not depend on the other images of its batch.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Logits (B, V) plus noise."""
        size = scores.shape[-1]
        uniform = torch.stack([torch.rand(size, generator=g) for g in self._generators])
        exponential = -uniform.clamp_min(torch.finfo(uniform.dtype).tiny).log()
        return scores - exponential.clamp_min(torch.finfo(uniform.dtype).tiny).log().to(scores)


def _processors(requests: Sequence[Request]) -> Any:
    """Processors between logits and argmax, for requests with the same sampling parameters."""
    from transformers.generation import (
        LogitsProcessorList,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    sampling, processors = requests[0].sampling, LogitsProcessorList()
    if sampling.temperature == 0:
        return processors
    processors.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k is not None:
        processors.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        processors.append(TopPLogitsWarper(sampling.top_p))
    processors.append(_Draws([request.seed for request in requests]))
    return processors


def _chat(request: Request, image: dict[str, Any]) -> list[dict[str, Any]]:
    """A conversation of one turn: the image, then the question."""
    return [{"role": "user", "content": [image, {"type": "text", "text": request.prompt}]}]


class _Server:
    """Any server with OpenAI's chat completions API."""

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

    def describe(self, requests: Sequence[Request]) -> list[Reply]:
        pool = ThreadPoolExecutor(self._captioner.concurrency)
        try:
            return [*pool.map(self._ask, requests)]
        except BaseException:
            self._ended.set()
            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

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
            "messages": _chat(request, {"type": "image_url", "image_url": {"url": url}}),
            "max_tokens": request.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": request.seed,
        }
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

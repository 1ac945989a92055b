"""vLLM's asynchronous engine, in this process; the model runs in a process of its own.

Interfaces were read in vLLM 0.18.1, which workflow/envs/vllm.yml pins.

Flow: requests are answered one by one as they end (continuous batching), and new ones are added
meanwhile. An image is prepared (resized, cut into slices) in one thread: neither the tokenizer nor
the cache of prepared images, which the model's process mirrors entry by entry, may be used by two
at once. Two resizes and three slices of 683 x 512 pixels, imitated with Pillow and PyTorch, take
19 ms of a server's core: about 50 images/s. Where that is the limit, `vllm serve` prepares in as
many processes as `--api-server-count` says; use the engine `server` then. A job is one engine:
several GPUs caption several parts.

BOS: vLLM tokenizes with the special tokens of the tokenizer, on top of those in a template: a
template that begins with BOS is read with two. Prompts are given as token ids instead, and chats
are tokenized without special tokens.

Seeds: a seed per request is a generator per request. vLLM then fills the noise of each row by a
kernel of its own, and cannot use FlashInfer's sampler. It does not make captions reproducible
either: logits depend on the requests that happen to share a batch, in their last bits, unless
VLLM_BATCH_INVARIANT=1 is set, which is slower again. So by default (`seed_requests: false`) all
draw from the generator of the engine, which is seeded per part. Greedy decoding needs no seed.
"""

import asyncio
import logging
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import Any

from flame.captioning.engines.base import Reply, Request, chat, model_folder
from flame.captioning.engines.prompts import prompt_ids
from flame.runtime.errors import known
from flame.study.schema.data import VllmCaptioner

log = logging.getLogger(__name__)

# Arguments of vLLM that determine which weights and code are run, and the seed.
IDENTITY = ("model", "revision", "tokenizer_revision", "code_revision", "trust_remote_code", "seed")
SEQUENCES = 256  # that the model decodes at once (max_num_seqs); `options` may say otherwise


class VllmEngine:
    """A multimodal LLM run by vLLM."""

    batch = 1

    def __init__(self, captioner: VllmCaptioner, seed: int) -> None:
        pinned = re.fullmatch("[0-9a-f]{40}", captioner.revision)
        if captioner.trust_remote_code and not pinned:
            raise ValueError(
                f"trust_remote_code runs code of {captioner.id!r}: its revision must be a commit "
                f"(40 hexadecimal digits), not {captioner.revision!r}, which can change"
            )
        for name in captioner.options:
            if name in IDENTITY:
                raise ValueError(f"options: {name!r} is set by the captioner's own keys")
        from vllm import AsyncEngineArgs, AsyncLLMEngine
        from vllm.usage.usage_lib import UsageContext

        arguments = _arguments(captioner, seed)
        # An image is two requests, so as many wait as run: the model is never short of them.
        self.calls: int = arguments["max_num_seqs"]
        # By the context vLLM chooses how many tokens it prefills at once.
        self._llm = AsyncLLMEngine.from_engine_args(
            AsyncEngineArgs(**arguments), usage_context=UsageContext.LLM_CLASS
        )
        self._tokenizer = self._llm.renderer.get_tokenizer()
        self._template = captioner.template
        self._stop = self._token_ids(captioner.stop)
        self._ids: dict[str, list[int]] = {}  # question -> prompt
        self._names = count()
        self._preparing = ThreadPoolExecutor(1, "prepare")
        gpus = arguments.get("tensor_parallel_size", 1) * arguments.get("data_parallel_size", 1)
        log.info("vLLM: %d captions at once on %d GPU(s)", self.calls, gpus)

    async def describe(self, requests: Sequence[Request]) -> list[Reply]:
        """As in `Engine`."""
        loop = asyncio.get_running_loop()
        # In one job of the thread, so that no other image comes between the captions of this one.
        prompts = await loop.run_in_executor(self._preparing, self._prepare, requests)
        return await asyncio.gather(*map(self._answer, prompts, requests))

    def close(self) -> None:
        """As in `Engine`."""
        self._preparing.shutdown(wait=False, cancel_futures=True)
        self._llm.shutdown()

    def _prepare(self, requests: Sequence[Request]) -> list[Any]:
        """What the engine is given for each request, or the error of one that it refuses."""
        prompts: list[Any] = []
        for request in requests:
            try:
                prompts.append(
                    self._chat(request) if self._template is None else self._filled(request)
                )
            except ValueError as error:
                prompts.append(error)
        return prompts

    def _filled(self, request: Request) -> Any:
        """The template with the question."""
        assert self._template is not None
        if request.prompt not in self._ids:
            text = self._template.replace("{question}", request.prompt)
            self._ids[request.prompt] = prompt_ids(self._tokenizer, text)
        prompt = {
            "prompt_token_ids": [*self._ids[request.prompt]],
            "multi_modal_data": {"image": request.image},
        }
        [rendered] = self._llm.renderer.render_cmpl([prompt])
        return rendered

    def _chat(self, request: Request) -> Any:
        """The chat template of the model, which has all special tokens."""
        from vllm.renderers import ChatParams
        from vllm.utils.mistral import is_mistral_tokenizer

        renderer = self._llm.renderer
        tokenize = is_mistral_tokenizer(self._tokenizer)
        _, [rendered] = renderer.render_chat(
            [chat(request, {"type": "image_pil", "image_pil": request.image})],
            ChatParams(chat_template_kwargs={"add_generation_prompt": True, "tokenize": tokenize}),
            renderer.default_chat_tok_params.with_kwargs(add_special_tokens=False),
        )
        return rendered

    async def _answer(self, prompt: Any, request: Request) -> Reply:
        if isinstance(prompt, ValueError):
            return Reply(str(prompt), "error")
        answer = None
        try:
            name = str(next(self._names))
            async for output in self._llm.generate(prompt, self._params(request), name):
                answer = output.outputs[0]
        except ValueError as error:  # such as a prompt that is too long
            return Reply(str(error), "error")
        if answer is None or answer.finish_reason not in ("stop", "length"):
            reason = None if answer is None else answer.finish_reason
            return Reply(f"vLLM finished with {reason!r}", "error")
        return Reply(answer.text, answer.finish_reason)

    def _params(self, request: Request) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        sampling = request.sampling
        return SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=-1 if sampling.top_k is None else sampling.top_k,
            repetition_penalty=sampling.repetition_penalty,
            max_tokens=request.max_tokens,
            stop_token_ids=self._stop,
            seed=request.seed if sampling.temperature else None,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _token_ids(self, tokens: Sequence[str]) -> list[int]:
        vocabulary = self._tokenizer.get_vocab()
        for token in tokens:
            if token not in vocabulary:
                special = [name for name in vocabulary if name.startswith("<|")]
                raise ValueError(f"stop: the model has no token {known(token, special)}")
        return [vocabulary[token] for token in tokens]


def _arguments(captioner: VllmCaptioner, seed: int) -> dict[str, Any]:
    """Arguments of vLLM's engine."""
    with_code = captioner.trust_remote_code
    return {
        # A folder of verified files, with the code of the model at the same commit.
        "model": str(model_folder(captioner.id, captioner.revision, with_code=with_code)),
        "trust_remote_code": with_code,
        "seed": seed,
        "limit_mm_per_prompt": {"image": 1},
        # The image comes before the question, so the prompts of an image share its tokens.
        "enable_prefix_caching": True,
        "max_num_seqs": SEQUENCES,
        "disable_log_stats": True,
        **captioner.options,
    }

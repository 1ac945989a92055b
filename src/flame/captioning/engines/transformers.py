"""A model in transformers: images of a call in batches of one sampling and one length."""

import asyncio
import threading
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from flame.captioning.engines.base import Reply, Request, bisected, chat, model_folder
from flame.runtime.device import device_of
from flame.study.schema.data import TransformersCaptioner

BATCHES = 4  # of images in a call: the retries of so many images fill a batch better


class TransformersEngine:
    """A model in transformers, in left-padded batches.

    While the model generates for one call, the processor prepares the images of the next.
    """

    calls = 2

    def __init__(self, captioner: TransformersCaptioner) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        source = model_folder(captioner.id, captioner.revision)
        self._processor = AutoProcessor.from_pretrained(source)
        self._tokenizer = self._processor.tokenizer
        self._tokenizer.padding_side = "left"
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        self._model = AutoModelForImageTextToText.from_pretrained(source, dtype="auto").eval()
        self._model.to(device_of())
        own = self._model.generation_config
        # Sampling is set by the study, not by the checkpoint.
        own.temperature = own.top_p = own.top_k = own.min_p = own.max_length = None
        ends = own.eos_token_id if own.eos_token_id is not None else self._tokenizer.eos_token_id
        if ends is None:
            raise ValueError(f"{captioner.id!r} has no end-of-text token (eos_token_id)")
        self._ends = frozenset(ends if isinstance(ends, list) else [ends])
        self._batch_size = captioner.batch_size
        self.batch = BATCHES * captioner.batch_size
        self._pool = ThreadPoolExecutor(self.calls, "transformers")
        self._preparing, self._generating = threading.Lock(), threading.Lock()

    async def describe(self, requests: Sequence[Request]) -> list[Reply]:
        """As in `Engine`."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._pool, self._describe, requests)

    def close(self) -> None:
        """As in `Engine`."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _describe(self, requests: Sequence[Request]) -> list[Reply]:
        # `generate` takes one set of sampling parameters and one length per batch.
        groups = defaultdict(list)
        for place, request in enumerate(requests):
            groups[request.sampling, request.max_tokens].append(place)
        replies: dict[int, Reply] = {}
        for places in groups.values():
            for start in range(0, len(places), self._batch_size):
                batch = places[start : start + self._batch_size]
                answers = bisected(self._generate, [requests[place] for place in batch])
                replies |= zip(batch, answers, strict=True)
        return [replies[place] for place in range(len(requests))]

    @torch.inference_mode()
    def _generate(self, requests: Sequence[Request]) -> list[Reply]:
        inputs = self._prepare(requests)
        with self._generating:
            tokens = self._model.generate(
                **inputs.to(self._model.device, dtype=self._model.dtype),
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

    def _prepare(self, requests: Sequence[Request]) -> Any:
        """Pixels and tokens of some requests; the processor adds no BOS to a template with one."""
        chats = [chat(r, {"type": "image", "image": r.image}) for r in requests]
        with self._preparing:  # tokenizers cannot be used by two threads
            return self._processor.apply_chat_template(
                chats,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={"padding": True},
            )

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
    processors.append(_Draws([request.seed or 0 for request in requests]))
    return processors

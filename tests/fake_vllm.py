"""A fake of vLLM 0.18.1's documented interface, as far as the engine uses it.

vLLM needs a GPU. This shows what the engine passes to it; what it does with prompts (special
tokens, a refused image, the order of requests) was read in its source, in the files named below.
"""

import asyncio
from dataclasses import dataclass, field, replace
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar


@dataclass(frozen=True)
class TokenizeParams:
    """vllm/renderers/params.py; special tokens are added unless one says otherwise."""

    add_special_tokens: bool = True

    def with_kwargs(self, **changes: Any) -> "TokenizeParams":
        return replace(self, **changes)


@dataclass(frozen=True)
class ChatParams:
    """vllm/renderers/params.py."""

    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)


class Renderer:
    """vllm/renderers/base.py: prompts -> token ids with the prepared image.

    A multimodal model adds special tokens to chats too (`default_chat_tok_params` is the
    `default_tok_params` of its processor, vllm/multimodal/processing/context.py).
    """

    default_cmpl_tok_params = default_chat_tok_params = TokenizeParams()

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.refused: set[tuple[int, int]] = set()  # sizes

    def get_tokenizer(self) -> Any:
        return self.tokenizer

    def render_cmpl(
        self, prompts: list[Any], tok_params: TokenizeParams | None = None
    ) -> list[Any]:
        params = tok_params or self.default_cmpl_tok_params
        return [self._rendered(prompt, params) for prompt in prompts]

    def render_chat(
        self, chats: list[Any], chat_params: ChatParams, tok_params: TokenizeParams | None = None
    ) -> tuple[list[Any], list[Any]]:
        rendered = []
        for chat in chats:
            [message] = chat
            image, asked = message["content"]  # vllm/entrypoints/chat_utils.py
            assert image.keys() == {"type", "image_pil"}
            shown = [{"role": message["role"], "content": [{"type": "image"}, asked]}]
            text = self.tokenizer.apply_chat_template(shown, **chat_params.chat_template_kwargs)
            image = image["image_pil"]
            prompt = {"prompt": text, "multi_modal_data": {"image": image}}
            rendered.append(self._rendered(prompt, tok_params or self.default_chat_tok_params))
        return chats, rendered

    def _rendered(self, prompt: dict[str, Any], params: TokenizeParams) -> dict[str, Any]:
        image = prompt["multi_modal_data"]["image"]
        if image.size in self.refused:
            raise ValueError("Failed to apply MiniCPMVProcessor")
        ids = prompt.get("prompt_token_ids")
        if ids is None:
            ids = self.tokenizer.encode(
                prompt["prompt"], add_special_tokens=params.add_special_tokens
            )
        return {"type": "multimodal", "prompt_token_ids": ids, "image": image}


class AsyncLLMEngine:
    """vllm/v1/engine/async_llm.py.

    Attributes:
        made: all engines.
        finish: how the answers end, in turn.
        arguments: of the engine.
        asked: (rendered prompt, sampling parameters) of every request, in order.
    """

    made: ClassVar[list["AsyncLLMEngine"]] = []
    tokenizer: ClassVar[Any] = None

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.arguments = arguments
        self.asked: list[tuple[dict[str, Any], SimpleNamespace]] = []
        self.finish = ["stop"]
        self.is_shut = False
        self.renderer = Renderer(type(self).tokenizer)

    @classmethod
    def from_engine_args(cls, engine_args: Any, usage_context: Any) -> "AsyncLLMEngine":
        cls.made.append(cls(vars(engine_args)))
        return cls.made[-1]

    async def generate(self, prompt: dict[str, Any], sampling_params: Any, request_id: str) -> Any:
        number = len(self.asked)
        self.asked.append((prompt, sampling_params))
        await asyncio.sleep(0)
        finish = self.finish[number % len(self.finish)]
        answer = SimpleNamespace(text=f"reply {number}", finish_reason=finish)
        yield SimpleNamespace(outputs=[answer], finished=True)

    def shutdown(self) -> None:
        self.is_shut = True


def modules(tokenizer: Any) -> dict[str, ModuleType]:
    """Modules by name, for `sys.modules`."""
    AsyncLLMEngine.made, AsyncLLMEngine.tokenizer = [], tokenizer
    contents = {
        "vllm": {
            "AsyncEngineArgs": SimpleNamespace,
            "AsyncLLMEngine": AsyncLLMEngine,
            "SamplingParams": SimpleNamespace,
        },
        "vllm.renderers": {"ChatParams": ChatParams},
        "vllm.sampling_params": {"RequestOutputKind": SimpleNamespace(FINAL_ONLY="final")},
        "vllm.usage": {},
        "vllm.usage.usage_lib": {"UsageContext": SimpleNamespace(LLM_CLASS="LLM_CLASS")},
        "vllm.utils": {},
        "vllm.utils.mistral": {"is_mistral_tokenizer": lambda tokenizer: False},
    }
    found = {name: ModuleType(name) for name in contents}
    for name, module in found.items():
        vars(module).update(contents[name])
    return found

"""Prompts -> token ids, with the special tokens of the tokenizer once."""

from typing import Any


def prompt_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a prompt, which begin with BOS once if the model has one.

    Tokenizers such as Llama 3's add their BOS to any text, and templates often begin with it: the
    model would read two, which it never saw in training.

    Args:
        tokenizer: of transformers.
        text: prompt with its special tokens in text form, all or none.
    """
    bos = tokenizer.bos_token
    has_own = bos is not None and text.startswith(bos)
    return tokenizer.encode(text, add_special_tokens=not has_own)

"""A tiny LLaVA with random weights, whole on disk: a captioner of a real class for tests."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

SIZE, PATCH = 32, 16
CHAT = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}:{% endif %}"
)
BOS = "<|begin_of_text|>"


def llama3_tokenizer(words: list[str] | None = None) -> PreTrainedTokenizerFast:
    """As Llama 3's: adds a BOS to any text, and has a chat template that begins with it."""
    found = tokenizer(words, BOS)
    post = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, found.bos_token_id)]
    )
    found.backend_tokenizer.post_processor = post
    found.chat_template = "{{ bos_token }}" + CHAT
    return found


def tokenizer(words: list[str] | None = None, bos: str = "<s>") -> PreTrainedTokenizerFast:
    """Tokens of single bytes, and of some words."""
    special = [bos, "</s>", "<pad>", "<image>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    own = [f"Ġ{word}" for word in words or ()]
    vocabulary = {token: i for i, token in enumerate([*special, *alphabet, *own])}
    found = Tokenizer(models.BPE(vocabulary, merges=[]))
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=found,
        bos_token=bos,
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
    )


def save(
    folder: Path, words: list[str] | None = None, fast: PreTrainedTokenizerFast | None = None
) -> Path:
    """Write model and processor.

    Args:
        folder: to write.
        words: what its tokens are, in the place of single bytes, so that captions are readable.
        fast: its tokenizer; by default that of these words.
    """
    fast = fast or tokenizer(words)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=SIZE,
            patch_size=PATCH,
        ),
        text_config=LlamaConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            vocab_size=len(fast),
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
        ),
        image_token_index=fast.convert_tokens_to_ids("<image>"),
        image_seq_length=(SIZE // PATCH) ** 2,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    if words:  # no byte is ever likely, and a caption ends where its first word would stand again
        head, first = model.lm_head.weight.data, len(fast) - len(words)
        head[:first] = 0
        head[first:] *= 20
        head[1] = head[first]
    pixels = CLIPImageProcessorPil(
        size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}
    )
    processor = LlavaProcessor(
        image_processor=pixels,
        tokenizer=fast,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=fast.chat_template or CHAT,
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder

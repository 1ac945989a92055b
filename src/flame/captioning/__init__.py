"""Images -> captions by a multimodal LLM."""

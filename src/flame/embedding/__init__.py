"""Captions -> facet embeddings of a frozen LLM, on disk."""

"""Bytes from elsewhere -> our tar shards, index and captions."""

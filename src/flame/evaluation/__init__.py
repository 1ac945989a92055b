"""A tower -> the answer to every query of a benchmark."""

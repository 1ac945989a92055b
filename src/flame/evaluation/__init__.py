"""A tower -> hit or miss for every query of a benchmark."""

"""Networks: image (and text) -> features."""

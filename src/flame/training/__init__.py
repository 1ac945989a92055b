"""How a tower is trained on stored embeddings."""

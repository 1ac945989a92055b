"""How a tower is trained."""

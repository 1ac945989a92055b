"""The blocks of a study's YAML: what each key means, and which values it takes."""

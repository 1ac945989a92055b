"""The YAML of a study -> checked blocks -> jobs. Loads no torch."""

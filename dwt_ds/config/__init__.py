"""The settings of a run: the dataclass tree, recipes in YAML, overrides."""

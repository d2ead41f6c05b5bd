"""The DeepSpeed JSON: read, checked, and resolved with the recipe."""

"""The DeepSpeed JSON: read, checked, filled in."""

"""Everything that touches DeepSpeed; no other room imports it."""

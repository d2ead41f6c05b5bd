"""Everything that uses DeepSpeed; no other room imports it."""

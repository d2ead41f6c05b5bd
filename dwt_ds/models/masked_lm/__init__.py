"""A masked language model split into encoder and head, for every family."""

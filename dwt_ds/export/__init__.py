"""Hugging Face folders out of a run, with their cards; and whether files still are what was written."""

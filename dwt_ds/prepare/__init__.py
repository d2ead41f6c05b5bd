"""Text to a data folder: sentences, tokens, rows."""

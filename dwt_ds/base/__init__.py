"""What every room may use, and what knows nothing of them: files, nested settings, words, versions."""

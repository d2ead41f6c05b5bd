"""Used by all other packages and independent of them: files, nested settings, words, versions."""

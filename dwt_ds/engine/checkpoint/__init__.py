"""Checkpoints: saved, found, checked, loaded."""

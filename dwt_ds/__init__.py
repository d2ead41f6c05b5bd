"""Distillation from a Weak Teacher on DeepSpeed: pre-train a larger masked language model with a smaller one's help."""

__version__ = "0.1.0"

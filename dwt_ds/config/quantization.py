"""Settings of quantization-aware training: none, w8a8, w4a8, or a mapping."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt
from pydantic.dataclasses import dataclass

from dwt_ds.base.words import nearest
from dwt_ds.config.validate import STRICT, validated

_Bits = Annotated[int, Field(ge=2, le=8)]


@dataclass(frozen=True, config=STRICT)
class Quantization:
    """Weights and activations are rounded in the forward pass; gradients pass through the rounding."""

    weight_bits: _Bits = 8
    """Bits of a weight: symmetric, one scale a channel (a row of the weight), or a group of its inputs."""
    activation_bits: _Bits | None = 8
    """Bits of an activation: asymmetric, one scale a token, computed on the fly; null does not round activations."""
    modules: Annotated[tuple[Literal["encoder", "embeddings", "head"], ...], Field(min_length=1)] = ("encoder",)
    """Which layers: encoder, embeddings (the tables, and layers that share a weight, as a tied decoder does), head."""
    start_step: NonNegativeInt = 0
    """Optimizer step from which values are rounded; training is in full precision before it."""
    group_size: Annotated[int, Field(ge=2)] | None = None
    """Inputs that share a scale of the weight; null: the whole channel."""

    def to_dict(self) -> dict[str, Any]:
        """Plain dict, ready for JSON; `parse_quantization` reads it."""
        return {**asdict(self), "modules": list(self.modules)}

    def describe(self) -> str:
        """One line for people."""
        activations = f"{self.activation_bits}-bit activations" if self.activation_bits else "unrounded activations"
        shared = "a channel" if self.group_size is None else f"each {self.group_size} inputs"
        weights = f"{self.weight_bits}-bit weights (a scale for {shared})"
        return f"{weights}, {activations}, {', '.join(self.modules)}, from step {self.start_step}"


PRESETS = {"w8a8": Quantization(8, 8), "w4a8": Quantization(4, 8)}


def parse_quantization(value: str | Mapping[str, Any], name: str = "student.quantization") -> Quantization | None:
    """The settings that a recipe's `student.quantization` stands for; None for "none".

    Args:
        value: none, the name of a preset, or a mapping of the fields of `Quantization`.
        name: what errors call the value.

    Raises:
        ValueError: one line with the field, its value and the fix.
    """
    if not isinstance(value, str):
        return validated(Quantization, value, name)
    if value != "none" and value not in PRESETS:
        fix = nearest(value, ["none", *PRESETS]) or "; use none, w8a8, w4a8 or a mapping with weight_bits"
        raise ValueError(f"{name}={value!r}: unknown{fix}")
    return PRESETS.get(value)


def check_start_step(quantization: Quantization, total_steps: int) -> None:
    """Refuse a run that ends before its first quantized step.

    Raises:
        ValueError: `start_step` is not below `total_steps`.
    """
    if quantization.start_step >= total_steps:
        raise ValueError(
            f"student.quantization.start_step={quantization.start_step}: the run has {total_steps} steps, so nothing "
            "would be trained quantized; set it below that"
        )

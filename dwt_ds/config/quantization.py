"""What `student.quantization` may say: none, w8a8, w4a8, or a mapping with its own numbers."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

BITS = range(2, 9)
PARTS = ("encoder", "embeddings", "head")


@dataclass(frozen=True)
class Quantization:
    """Quantization-aware training: weights and activations are rounded in the forward pass, gradients pass through.

    weight_bits: 2 to 8, symmetric, one scale a channel (a row of the weight), or a group of `group_size` inputs of it.
    activation_bits: 2 to 8, asymmetric, one scale a token, computed on the fly; None leaves activations alone.
    modules: which linear layers: encoder, embeddings (the tables, and a decoder tied to them), head.
    start_step: optimizer step from which values are rounded; before it training is as usual.
    group_size: inputs that share a scale; None: a whole channel.
    """

    weight_bits: int = 8
    activation_bits: int | None = 8
    modules: tuple[str, ...] = ("encoder",)
    start_step: int = 0
    group_size: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain dict, ready for JSON; `parse_quantization` reads it back."""
        return {**asdict(self), "modules": list(self.modules)}

    def describe(self) -> str:
        """What it does, in a few words."""
        activations = f"{self.activation_bits}-bit activations" if self.activation_bits else "activations as they are"
        shared = "a channel" if self.group_size is None else f"each {self.group_size} inputs"
        weights = f"{self.weight_bits}-bit weights (a scale for {shared})"
        return f"{weights}, {activations}, {', '.join(self.modules)}, from step {self.start_step}"


PRESETS = {"w8a8": Quantization(8, 8), "w4a8": Quantization(4, 8)}


def parse_quantization(value: str | Mapping[str, Any] | None) -> Quantization | None:
    """The settings that a recipe's `student.quantization` stands for; None where it is none.

    Raises:
        ValueError: one line naming the key, its value and what is allowed.
    """
    if value is None or value == "none":
        return None
    if isinstance(value, str):
        if value in PRESETS:
            return PRESETS[value]
        near = difflib.get_close_matches(value.lower(), ["none", *PRESETS], n=1)
        fix = f"did you mean {near[0]!r}?" if near else "use none, w8a8, w4a8 or a mapping with weight_bits"
        raise ValueError(f"student.quantization={value!r} is unknown; {fix}")
    if not isinstance(value, Mapping):
        raise ValueError(f"student.quantization={value!r} is of no known kind; use none, w8a8, w4a8 or a mapping")
    known = [field.name for field in fields(Quantization)]
    for key in value:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            fix = f"did you mean {near[0]!r}?" if near else f"use {', '.join(known)}"
            raise ValueError(f"student.quantization.{key} is unknown; {fix}")
    settings = dict(value)
    _check_integer(settings, "weight_bits", BITS, may_be_null=False)
    _check_integer(settings, "activation_bits", BITS, may_be_null=True)
    _check_integer(settings, "start_step", range(0, 2**63), may_be_null=False)
    _check_integer(settings, "group_size", range(2, 2**31), may_be_null=True)
    if "modules" in settings:
        settings["modules"] = _checked_parts(settings["modules"])
    return Quantization(**settings)


def check_start_step(quantization: Quantization, total_steps: int) -> None:
    """Whether any step of the run is going to be quantized.

    Raises:
        ValueError: none is.
    """
    if quantization.start_step >= total_steps:
        raise ValueError(
            f"student.quantization.start_step={quantization.start_step}: the run has {total_steps} steps, so nothing "
            "would be trained quantized; set it below that"
        )


def _check_integer(settings: dict[str, Any], key: str, allowed: range, *, may_be_null: bool) -> None:
    value = settings.get(key, allowed[0])
    if value is None and may_be_null:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value not in allowed:
        bounds = f"from {allowed[0]} to {allowed[-1]}" if allowed.stop < 2**31 else f"of {allowed[0]} or more"
        null = ", or null" if may_be_null else ""
        raise ValueError(f"student.quantization.{key}={value!r} must be a whole number {bounds}{null}")


def _checked_parts(parts: Any) -> tuple[str, ...]:
    if not isinstance(parts, (list, tuple)) or not parts:
        raise ValueError(f"student.quantization.modules={parts!r} must be a list of {', '.join(PARTS)}")
    for part in parts:
        if part not in PARTS:
            near = difflib.get_close_matches(str(part), PARTS, n=1)
            fix = f"did you mean {near[0]!r}?" if near else f"use {', '.join(PARTS)}"
            raise ValueError(f"student.quantization.modules has {part!r}; {fix}")
    return tuple(dict.fromkeys(parts))

"""README.md of an export: what was trained, on what, by which objective, and how the run went."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dwt_ds.base.files import read_json_lines
from dwt_ds.base.yaml_and_json import yaml_text
from dwt_ds.distill.metrics_keys import eval_losses
from dwt_ds.engine.checkpoint.manifest import RunFacts, RunState

_QUANTIZED = """

It was trained quantized from step {start:,} on: values were rounded in the forward pass, gradients passed through. The
weights in this folder are the unrounded ones. `quantized/` holds the rounded model as integers with their scales;
`dwt_ds.models.quantized_export.load_quantized` reads it. From that step on, a held-out loss is the rounded model's."""


def model_card(facts: RunFacts, state: RunState, held_out: Mapping[str, float]) -> str:
    """The text of the card of a run that stands at `state`; `held_out` is from `held_out_losses_at`."""
    settings = facts.settings
    path, init, weight = settings["teacher"]["path"], settings["student"]["init"], settings["distill"]["soft_weight"]
    distilled, released = path is not None and bool(weight["start"] or weight["end"]), state.teacher_released
    how = (
        f"pre-trained with the help of the model `{path}` (distillation from a weak teacher, Lee et al., Findings of "
        "ACL 2023)"
        if distilled
        else "pre-trained on masked tokens alone"
    )
    quantized = "" if facts.quantization is None else _QUANTIZED.format(start=facts.quantization["start_step"])
    rows = {
        "initial weights": None if init == "random" else f"grown from those of `{path}` (`student.init={init}`)",
        "objective": _objective(settings) if distilled else "masked-token cross-entropy",
        "teacher's weights": facts.teacher,
        "teacher": None if released is None or not distilled else f"released at step {released:,}",
        "data (fingerprint of its rows)": facts.data,
        "tokenizer (sha256)": facts.tokenizer,
        "teacher's tokenizer (sha256)": facts.teacher_tokenizer,
        "settings (sha256)": facts.settings_sha256,
        **{", ".join(filter(None, ("held-out MLM loss", name))): round(loss, 4) for name, loss in held_out.items()},
        "versions": ", ".join(f"{name} {version}" for name, version in facts.versions.items()),
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items() if value is not None)
    history = "\n".join(f"* step {s['step']}: {s['ranks']} ranks, {s['at']}" for s in state.starts)
    return f"""---
tags: [masked-lm, dwt_ds]
---
# A masked language model {"distilled from a weak teacher" if distilled else "without a teacher"}

This model was {how} for {state.step:,} steps and {state.tokens:,} tokens with dwt_ds.{quantized}

| | |
|---|---|
{table}

Starts of the run (the first, and one for each resume):

{history}

Settings, as resolved:

```yaml
{yaml_text(settings)}```
"""


def held_out_losses_at(step: int, metrics: Path) -> dict[str, float]:
    """The student's held-out cross-entropies after `step`, out of a run's metrics.jsonl; empty if it was not evaluated.

    By the names of `train.eval_sets`; "" is the data folder's own.
    """
    rows = [row for row in read_json_lines(metrics) if row["step"] == step]
    return {name: loss for row in rows for name, loss in eval_losses(row).items() if loss is not None}


def _objective(settings: Mapping[str, Any]) -> str:
    distill = settings["distill"]
    # Earlier versions had no such setting.
    shared = settings["teacher"].get("vocabulary") == "shared"
    entries = " and the entries that both vocabularies have" if shared else ""
    positions = distill["soft_positions"]
    if isinstance(positions, float):
        positions = f"labelled positions and {positions:.3g} of the other"
    squared = " x temperature^2" if distill["temperature_squared"] else ""
    hidden = ""
    if distill.get("hidden_weight"):
        hidden = f" + {distill['hidden_weight']:g} w x hidden loss"
    return (
        f"{distill['hard_weight']:g} x cross-entropy + w x KL(teacher, student){squared}, the latter on "
        f"{positions} positions{entries}{hidden}; w: {_schedule(distill['soft_weight'])}; "
        f"temperature: {_schedule(distill['temperature'])}"
    )


def _schedule(schedule: Mapping[str, Any]) -> str:
    if schedule["schedule"] == "constant":
        return f"{schedule['start']:g}"
    end = "" if schedule["end"] is None else f" to {schedule['end']:g}"
    return f"{schedule['schedule']}, {schedule['start']:g}{end}"

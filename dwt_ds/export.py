"""The trained student as a Hugging Face folder that plain `transformers` loads."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from transformers import AutoModelForMaskedLM, PreTrainedModel, PreTrainedTokenizerBase


@torch.no_grad()
def write_export(
    model: PreTrainedModel,
    weights: Mapping[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    card: str,
    folder: Path,
) -> None:
    """Write model, tokenizer and card to `folder`, after reading them back and comparing.

    Args:
        model: any copy of the student; only its configuration and tying are used.
        weights: fp32 state dict, tied weights once.
        card: text of README.md.
        folder: replaced if it exists; a half-written one never stands under this name.

    Raises:
        RuntimeError: the folder, read back, gives other logits than the weights it was made from.
    """
    plain = type(model)(model.config).float()
    missing, unexpected = plain.load_state_dict(dict(weights), strict=False)
    tensors = plain.state_dict()
    loaded = {tensors[name].data_ptr() for name in weights if name in tensors}
    lost = [name for name in missing if tensors[name].data_ptr() not in loaded] + list(unexpected)
    if lost:
        raise RuntimeError(f"export: {lost[0]} has no counterpart in {type(plain).__name__}")
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    plain.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    (temporary / "README.md").write_text(card, encoding="utf-8")

    reloaded = AutoModelForMaskedLM.from_pretrained(temporary).eval()
    length = min(16, tokenizer.model_max_length)
    tokens = torch.randint(0, len(tokenizer), (2, length), generator=torch.Generator().manual_seed(0))
    ours, theirs = plain.eval()(input_ids=tokens).logits, reloaded(input_ids=tokens).logits
    changed = [name for name, tensor in reloaded.state_dict().items() if not torch.equal(tensor, tensors[name])]
    if changed or not torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4):
        off = (ours - theirs).abs().max().item()
        raise RuntimeError(f"export: read back, {len(changed)} tensors differ and the logits by {off:.3g}")
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def model_card(config: Mapping[str, Any], facts: Mapping[str, Any], steps: int, tokens: int) -> str:
    """README.md of an export: what was trained, on what, by which objective."""
    distilled = config["teacher"]["path"] is not None
    how = (
        f"pre-trained with the help of the smaller model `{config['teacher']['path']}` (distillation from a weak "
        "teacher, Lee et al., Findings of ACL 2023)"
        if distilled
        else "pre-trained on masked tokens alone"
    )
    rows = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    return f"""---
tags: [masked-lm, dwt_ds]
---
# A masked language model {"distilled from a weak teacher" if distilled else "without a teacher"}

This model was {how} for {steps:,} steps and {tokens:,} tokens with dwt_ds.

| | |
|---|---|
{rows}

Settings, as resolved:

```yaml
{yaml.safe_dump(dict(config), sort_keys=False)}```
"""

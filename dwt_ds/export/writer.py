"""The trained student as a Hugging Face folder that plain `transformers` loads."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForMaskedLM, PreTrainedModel, PreTrainedTokenizerBase

from dwt_ds.base.files import file_facts, replace_folder, through_links, unfinished_folder, write_manifest
from dwt_ds.config.quantization import Quantization
from dwt_ds.data.tokenizer import save_tokenizer
from dwt_ds.models.build import attention_implementation, longest_row
from dwt_ds.models.quantized_export import write_quantized
from dwt_ds.models.tokenizers import fit_to_model

_LOWER_RATE = "export an earlier checkpoint, or train again with a lower train.learning_rate"


class NotFiniteError(ValueError):
    """Weights or logits with NaN or infinities."""


@torch.no_grad()
def write_export(
    model: PreTrainedModel,
    weights: Mapping[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    card: str,
    folder: Path,
    *,
    seq_len: int,
    quantization: Quantization | None = None,
) -> None:
    """Write model, tokenizer and card to `folder`, after reading them back and comparing.

    Args:
        model: any copy of the student; only its configuration and tying are used.
        weights: fp32 state dict, tied weights once.
        card: the text of README.md.
        folder: replaced if it exists, except for the exports of earlier steps in it (`step_*`); a half-written or
            half-deleted folder never has this name. A symbolic link stays, and what it points to is replaced.
        seq_len: tokens of the rows it was trained on; the tokenizer's `model_max_length` where the model has no limit.
        quantization: what the student was trained with; the rounded model goes to `folder`/quantized.

    Raises:
        NotFiniteError: weights that are not finite, or so large that the logits are not.
        OSError: it cannot be written.
        RuntimeError: read back, the folder gives other logits than the weights it was made from.
    """
    wrong = [name for name, tensor in weights.items() if not tensor.isfinite().all()]
    if wrong:
        raise NotFiniteError(
            f"export: {len(wrong)} of {len(weights)} weights have values that are not finite (NaN or infinity), "
            f"such as {wrong[0]}; {_LOWER_RATE}"
        )
    config = copy.deepcopy(model.config)
    if config._attn_implementation == "flash_attention_2":
        # It computes in 16 bits on a GPU only.
        config._attn_implementation = attention_implementation("auto", type(model))
    plain = type(model)(config).float()
    missing, unexpected = plain.load_state_dict(dict(weights), strict=False)
    tensors = plain.state_dict()
    loaded = {tensors[name].data_ptr() for name in weights if name in tensors}
    lost = [name for name in missing if tensors[name].data_ptr() not in loaded] + list(unexpected)
    if lost:
        raise RuntimeError(f"export: {lost[0]} has no counterpart in {type(plain).__name__}")
    folder, temporary = through_links(folder), unfinished_folder(folder)
    _move_steps(temporary, folder)  # left there if the last attempt was stopped at its end
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        _write(plain, tokenizer, card, temporary, seq_len, quantization)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)  # it may be what fills the disk
        raise OSError(f"{folder}: {error}") from error
    except NotFiniteError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _move_steps(folder, temporary)
    replace_folder(temporary, folder)


def _write(
    plain: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    card: str,
    folder: Path,
    seq_len: int,
    quantization: Quantization | None,
) -> None:
    """The files of an export in a new folder, read back and compared."""
    plain.save_pretrained(folder)
    tokenizer = fit_to_model(tokenizer, plain.config, seq_len)
    save_tokenizer(tokenizer, folder)
    (folder / "README.md").write_text(card, encoding="utf-8")

    # With another attention, the logits of large weights would differ by more than rounding.
    attention = plain.config._attn_implementation
    reloaded = AutoModelForMaskedLM.from_pretrained(folder, attn_implementation=attention).eval()
    length = min(16, longest_row(plain.config) or 16)
    tokens = torch.randint(0, len(tokenizer), (2, length), generator=torch.Generator().manual_seed(0))
    ours, theirs = plain.eval()(input_ids=tokens).logits, reloaded(input_ids=tokens).logits
    written = plain.state_dict()
    changed = [name for name, tensor in reloaded.state_dict().items() if not torch.equal(tensor, written[name])]
    if not ours.isfinite().all():
        raise NotFiniteError(f"export: the weights are so large that logits are not finite; {_LOWER_RATE}")
    if changed or not torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4):
        off = (ours - theirs).abs().max().item()
        raise RuntimeError(f"export: read back, {len(changed)} tensors differ and the logits by {off:.3g}")
    if quantization is not None:
        write_quantized(plain, quantization, folder / "quantized", tokenizer)
    names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    write_manifest(folder, {"files": file_facts(folder, names)})


def _move_steps(source: Path, target: Path) -> None:
    """Move the exports of earlier steps, except those that `target` has already."""
    for step in source.glob("step_*"):
        if not (target / step.name).exists():
            target.mkdir(parents=True, exist_ok=True)
            step.rename(target / step.name)

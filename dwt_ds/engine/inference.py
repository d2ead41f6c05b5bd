"""DeepSpeed's inference engine around a model, with its injected kernels where they are tried and found good."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel

from dwt_ds.base.words import one_line
from dwt_ds.models.masked_lm.families import known_layers
from dwt_ds.models.masked_lm.wrapper import GatheredMaskedLM

# Injected kernels round differently. A larger difference than this share of the largest logit is an error of theirs.
_TOLERANCE = 0.05
# Where DeepSpeed's layers with kernels come from.
_INJECTED_MODULES = "deepspeed.model_implementations.transformers"


@dataclass(frozen=True)
class InferenceSettings:
    """How an engine is made."""

    dtype: torch.dtype
    device: torch.device
    seq_len: int
    """Longest row; the injected kernels size their workspace by it."""


@dataclass(frozen=True)
class KernelTrial:
    """What a trial of injected kernels found."""

    problem: str = ""
    """Why they are not to be used; empty if they are."""
    engine: nn.Module | None = None
    model: PreTrainedModel | None = None
    """The model inside the engine."""
    layers: int = 0
    """How many layers DeepSpeed replaced."""
    moved: float = 0.0
    """Largest change of a logit, as a share of the largest logit."""


def inference_engine(gathered: GatheredMaskedLM, settings: InferenceSettings, *, inject: bool = False) -> nn.Module:
    """The frozen model in an engine, in evaluation mode."""
    config = {"dtype": settings.dtype, "replace_with_kernel_inject": inject, "max_out_tokens": settings.seq_len}
    with buffers_unrounded(gathered, settings.device):
        engine = deepspeed.init_inference(gathered, config=config)
    # init_inference does none of these.
    engine.module.eval()
    engine.module.requires_grad_(False)
    return engine


@torch.no_grad()
def try_kernels(
    gathered: GatheredMaskedLM, load: Callable[[], GatheredMaskedLM], settings: InferenceSettings
) -> KernelTrial:
    """Try DeepSpeed's kernels on a second model, which `load` loads, since injection replaces layers in place."""
    if get_accelerator().device_name() != "cuda":
        name = get_accelerator().device_name()
        return KernelTrial(problem=f"DeepSpeed injects kernels on CUDA devices only, this is {name}")
    size = 2, settings.seq_len
    tokens = torch.randint(0, gathered.decoder_weight.shape[0], size, device=settings.device)
    positions = torch.arange(0, tokens.numel(), 3, device=settings.device)
    half_padded = torch.ones_like(tokens)
    half_padded[1, (settings.seq_len + 1) // 2 :] = 0

    def logits(engine: nn.Module, gathered: GatheredMaskedLM) -> Tensor:
        return torch.cat([_logits(engine(tokens, mask, positions), gathered) for mask in (None, half_padded)])

    plain = logits(gathered, gathered)
    try:
        candidate = load()
        engine: Any = _injected_engine(candidate, settings)
        layers = _adapt_injected_layers(candidate)
        if not layers:
            return KernelTrial(problem=f"DeepSpeed has no kernels for {type(candidate.model).__name__}")
        injected = logits(engine, candidate)
        moved = ((injected - plain).abs().max() / plain.abs().max()).item()
    except Exception as error:  # whatever a kernel library raises, the plain engine is still there
        return KernelTrial(problem=one_line(error, with_type=True))
    if not moved <= _TOLERANCE:
        engine.destroy()  # frees the workspace, and lets the layers of another model begin at number 0
        return KernelTrial(problem=f"injected kernels moved the logits by {moved:.3f} of the largest")
    return KernelTrial(engine=engine, model=candidate.model, layers=layers, moved=moved)


def _injected_engine(gathered: GatheredMaskedLM, settings: InferenceSettings) -> nn.Module:
    """The last layer of a known family stays as it is: it runs at the wanted positions only, which saves more."""
    layers = known_layers(gathered.model)
    if layers is None:
        return inference_engine(gathered, settings, inject=True)
    last = layers[-1]
    del layers[-1]
    engine = inference_engine(gathered, settings, inject=True)
    layers.append(last.eval().requires_grad_(False))
    return engine


def _adapt_injected_layers(gathered: GatheredMaskedLM) -> int:
    """Make the layers that DeepSpeed replaced take our batches and return their hidden states; how many there are.

    DeepSpeed 0.19.8 returns a tuple, and the encoders of transformers 5 expect the tensor alone.
    """
    replaced = [each for each in gathered.modules() if type(each).__module__.startswith(_INJECTED_MODULES)]
    for layer in replaced:
        layer.register_forward_pre_hook(_fit_to_batch)
        layer.register_forward_hook(lambda _, inputs, output: output[0] if isinstance(output, tuple) else output)
    return len(replaced)


def _fit_to_batch(layer: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Room for all rows of the hidden states (B, S, H), and a mask that the kernels can read.

    DeepSpeed 0.19.8 sizes the kernels' workspace by the rows of the first call, and a larger batch would be written
    beyond it. Of a mask the kernels take the address alone, and add what is there, as numbers of the hidden states'
    dtype. So a boolean one (B, 1, S, S) becomes (B, 1, 1, S); all tokens of a row have the same.
    """
    hidden, mask, *others = inputs
    if hidden.shape[0] > getattr(layer, "_dwt_ds_rows", 0):
        layer._dwt_ds_rows, layer._should_allocate_workspace = hidden.shape[0], True
    if mask is not None and mask.dtype == torch.bool:
        blocked = ~mask[:, :, :1]
        added = hidden.new_zeros(blocked.shape)
        mask = added.masked_fill_(blocked, torch.finfo(hidden.dtype).min)
    return hidden, mask, *others


def _logits(hidden: Tensor, gathered: GatheredMaskedLM) -> Tensor:
    """fp32 logits (N, V) of hidden states (N, H)."""
    bias = gathered.decoder_bias
    return hidden.float() @ gathered.decoder_weight.float().T + (0.0 if bias is None else bias.float())


@contextmanager
def buffers_unrounded(gathered: GatheredMaskedLM, device: torch.device) -> Iterator[None]:
    """Keep the model's buffers in their own dtypes, such as fp32 rotary frequencies; DeepSpeed's engines round all."""
    buffers = {
        (module, name): buffer
        for module in gathered.modules()
        for name, buffer in module.named_buffers(recurse=False)
        if buffer.is_floating_point()
    }
    yield
    for (module, name), buffer in buffers.items():
        module._buffers[name] = buffer.to(device)

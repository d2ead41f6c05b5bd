"""The frozen teacher in DeepSpeed's inference-only engine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel

from dwt_ds.base.words import one_line
from dwt_ds.data.batches import Batch
from dwt_ds.distill.objective import TeacherView
from dwt_ds.models.build import parameter_count
from dwt_ds.models.load import load_masked_lm
from dwt_ds.models.masked_lm.wrapper import GatheredMaskedLM, check_against_own_logits

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Injected kernels round differently. A larger difference than this share of the largest logit is an error of theirs.
_INJECTION_TOLERANCE = 0.05
# Each weight is used once in a forward pass, so none is kept for a second use.
_ZERO_3 = {"stage": 3, "stage3_max_reuse_distance": 0}


class TeacherEngine:
    """Hidden states and head of a frozen model, without gradients and in evaluation mode.

    Args:
        path: Hugging Face folder or name.
        dtype: "fp32", "bf16" or "fp16".
        kernel_inject: True, False, or "auto": use DeepSpeed's injected kernels where a trial run succeeds and the
            logits stay close.
        device: where it computes.
        seq_len: longest row; the injected kernels size their workspace by it.
        sharded: shard the weights over the ranks, which then have to call it equally often; without injected kernels.
            `start` does it and not the constructor, since loading may fail on one rank alone.

    Raises:
        FileNotFoundError: nothing at the path.
        ValueError: not a masked LM with a head that can be split off, or `kernel_inject=True` where injection fails.
    """

    head: tuple[Tensor, Tensor | None]
    """Weight (V, H) and bias (V,), whole on every rank."""

    def __init__(
        self,
        path: str,
        *,
        dtype: str,
        kernel_inject: bool | str,
        device: torch.device,
        seq_len: int,
        sharded: bool = False,
        trust_remote_code: bool = False,
    ) -> None:
        self._path, self._dtype, self._device, self._seq_len = path, _DTYPES[dtype], device, seq_len
        self._trust_remote_code = trust_remote_code
        self._engine: nn.Module | None = None
        self.injected = False
        self.injection = "kernels not injected"
        """For the log: whether kernels are injected, and why not or how far they moved the logits."""
        gathered = self._load(torch.device("cpu") if sharded else device)
        self.parameters = parameter_count(gathered)
        if kernel_inject and not sharded:
            problem = self._inject(gathered)
            if problem and kernel_inject is True:
                raise ValueError(f"teacher.kernel_inject=true: {problem}; set it to auto or false")
            if problem:
                self.injection += f" ({problem})"
        if self._engine is None and not sharded:
            self._engine = self._infer(gathered, inject=False)
        weight, bias = gathered.decoder_weight, gathered.decoder_bias
        if sharded:
            # The loss reads the head outside of the forward pass, where ZeRO does not gather it.
            weight = weight.detach().clone().to(device)
            bias = None if bias is None else bias.detach().clone().to(device)
        self.head = weight, bias
        self._gathered = gathered

    @property
    def model(self) -> PreTrainedModel:
        """The Hugging Face model, frozen."""
        return self._gathered.model

    @property
    def vocabulary_rows(self) -> int:
        """Rows of the decoder: the vocabulary, and padding if there is any."""
        return int(self.head[0].shape[0])

    def start(self) -> nn.Module:
        """The engine; the first call of a sharded teacher shards its weights, by all ranks together."""
        if self._engine is None:
            self._engine = self._shard(self._gathered)
        return self._engine

    @torch.no_grad()
    def __call__(self, batch: Batch) -> TeacherView:
        """Hidden states at the rows' positions, and the head that turns them into logits."""
        hidden = self.start()(batch.input_ids, batch.attention_mask, batch.positions)
        return TeacherView(hidden, *self.head)

    def _load(self, device: torch.device) -> GatheredMaskedLM:
        model = load_masked_lm(self._path, dtype=self._dtype, trust_remote_code=self._trust_remote_code)
        gathered = GatheredMaskedLM(model).to(device)
        check_against_own_logits(gathered)
        return gathered

    def _infer(self, gathered: GatheredMaskedLM, *, inject: bool) -> nn.Module:
        config = {"dtype": self._dtype, "replace_with_kernel_inject": inject, "max_out_tokens": self._seq_len}
        with _buffers_unrounded(gathered, self._device):
            engine = deepspeed.init_inference(gathered, config=config)
        # init_inference does none of these.
        engine.module.eval()
        engine.module.requires_grad_(False)
        return engine

    def _shard(self, gathered: GatheredMaskedLM) -> nn.Module:
        gathered.eval().requires_grad_(False)
        with _buffers_unrounded(gathered, self._device):
            engine = shard_over_ranks(gathered, self._dtype)
        engine.eval()
        return engine

    @torch.no_grad()
    def _inject(self, gathered: GatheredMaskedLM) -> str:
        """Use the injected engine if it works; else return what is wrong, with `gathered` as it was."""
        if get_accelerator().device_name() != "cuda":
            return f"DeepSpeed injects kernels on CUDA devices only, this is {get_accelerator().device_name()}"
        tokens = torch.randint(0, gathered.decoder_weight.shape[0], (2, self._seq_len), device=self._device)
        positions = torch.arange(0, tokens.numel(), 3, device=self._device)
        plain = _logits(gathered(tokens, None, positions), gathered)
        try:
            # Injection replaces layers in place, so it gets a model of its own.
            candidate = self._load(self._device)
            engine = self._infer(candidate, inject=True)
            injected = _logits(engine(tokens, None, positions), candidate)
            moved = ((injected - plain).abs().max() / plain.abs().max()).item()
        except Exception as error:  # whatever a kernel library raises, the plain engine is still there
            return one_line(error, with_type=True)
        if not moved <= _INJECTION_TOLERANCE:
            return f"injected kernels moved the logits by {moved:.3f} of the largest"
        self.injection = f"kernels injected, which moved the logits by {moved:.4f} of the largest"
        gathered.model = candidate.model
        self._engine, self.injected = engine, True
        return ""


def shard_over_ranks(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """ZeRO-3's forward pass without an optimizer: each module's weights are gathered before it runs and then released
    (Rajbhandari et al. 2020, section 5.3; DeepSpeed calls it ZeRO-Inference).

    Every rank has to call the result equally often.

    Args:
        model: whole, on the CPU, frozen; its parameters are sharded in place.
        dtype: of its weights.
    """
    config = {
        "train_micro_batch_size_per_gpu": 1,  # DeepSpeed requires one; nothing is trained
        "zero_optimization": _ZERO_3,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},
    }
    engine, *_ = deepspeed.initialize(model=model, config=config)
    return engine


def _logits(hidden: Tensor, gathered: GatheredMaskedLM) -> Tensor:
    """fp32 logits (N, V) of hidden states (N, H)."""
    bias = gathered.decoder_bias
    return hidden.float() @ gathered.decoder_weight.float().T + (0.0 if bias is None else bias.float())


@contextmanager
def _buffers_unrounded(gathered: GatheredMaskedLM, device: torch.device) -> Iterator[None]:
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

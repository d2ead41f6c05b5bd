"""The frozen teacher in DeepSpeed's inference-only engine."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel

from dwt_ds.base.words import one_line
from dwt_ds.data.batches import Batch
from dwt_ds.data.shared_vocabulary import SharedVocabulary
from dwt_ds.distill.objective import SharedEntries, TeacherView, head_rows
from dwt_ds.engine.cuda_graphs import CudaRecorder, GraphedForward
from dwt_ds.engine.ranks import gather_from_ranks
from dwt_ds.models.build import DTYPES, parameter_count
from dwt_ds.models.load import load_masked_lm
from dwt_ds.models.masked_lm.checks import check_against_own_logits
from dwt_ds.models.masked_lm.families import known_layers
from dwt_ds.models.masked_lm.wrapper import GatheredMaskedLM

# Injected kernels round differently. A larger difference than this share of the largest logit is an error of theirs.
_INJECTION_TOLERANCE = 0.05
# Where DeepSpeed's layers with kernels come from.
_INJECTED_MODULES = "deepspeed.model_implementations.transformers"
# Each weight is used once in a forward pass, so none is kept for a second use. The memory-efficient linear layer
# would replace torch's in the whole process, and a student that resumes without its teacher would round differently.
_ZERO_3 = {"stage": 3, "stage3_max_reuse_distance": 0, "memory_efficient_linear": False}


class TeacherEngine:
    """Hidden states and head of a frozen model, without gradients and in evaluation mode.

    Args:
        path: Hugging Face folder or name.
        dtype: "fp32", "bf16" or "fp16".
        kernel_inject: True, False, or "auto": use DeepSpeed's injected kernels if a trial run on every rank succeeds
            and the logits stay close.
        device: where it computes.
        seq_len: longest row; the injected kernels size their workspace by it.
        sharded: shard the weights over the ranks, which then have to call it equally often; without injected kernels.
        everywhere: give the hidden states at all tokens, too, for the hidden loss.
        recorder: of CUDA graphs, for batches whose shape recurs; None: never. Not used for a sharded teacher, whose
            pass has collectives, nor with injected kernels, nor for a family whose layers are not known
            (`known_layers`): its pass may read values on the host.

    What the ranks do together is done by `start` and not by the constructor, since loading may fail on one rank alone.

    Raises:
        FileNotFoundError: nothing at the path.
        ValueError: not a masked LM with a head that can be split off, or `kernel_inject=True` where injection fails.
    """

    head: tuple[Tensor, Tensor | None]
    """Weight (V, H) and bias (V,), whole on every rank; (E, H) and (E,) after `keep_shared`."""
    gathered: GatheredMaskedLM
    """The model with its head split off, inside the engine."""

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
        everywhere: bool = False,
        recorder: CudaRecorder | None = None,
    ) -> None:
        self._everywhere = everywhere
        self._path, self._dtype, self._device, self._seq_len = path, DTYPES[dtype], device, seq_len
        self._trust_remote_code = trust_remote_code
        self._engine: nn.Module | None = None
        self._recorder = recorder
        self._graphs: GraphedForward | None = None
        self._shared: SharedEntries | None = None
        self._sharded, self._probes = sharded, bool(kernel_inject) and not sharded
        self._probe = _Probe()
        self.injected = False
        self.injection = "kernels not injected"
        """For the log, after `start`: whether kernels are injected, and why not or how far they moved the logits."""
        gathered = self._load(torch.device("cpu") if sharded else device)
        self.parameters = parameter_count(gathered)
        if self._probes:
            self._probe = self._inject(gathered)
            if self._probe.problem and kernel_inject is True:
                raise ValueError(f"teacher.kernel_inject=true: {self._probe.problem}; set it to auto or false")
        weight, bias = gathered.decoder_weight, gathered.decoder_bias
        if sharded:
            # The loss reads the head outside of the forward pass, where ZeRO does not gather it.
            weight = weight.detach().clone().to(device)
            bias = None if bias is None else bias.detach().clone().to(device)
        self.head = weight, bias
        self.gathered = gathered

    @property
    def model(self) -> PreTrainedModel:
        """The Hugging Face model, frozen."""
        return self.gathered.model

    @property
    def vocabulary_rows(self) -> int:
        """Rows of the decoder: the vocabulary, and padding if there is any."""
        return int(self.head[0].shape[0])

    def start(self) -> None:
        """Make the engine, once; all ranks together."""
        self._engine = self._shard(self.gathered) if self._sharded else self._choose_engine()
        can_record = not self._sharded and not self.injected and known_layers(self.model) is not None
        if self._recorder is not None and can_record:
            self._graphs = GraphedForward(self._engine, self._recorder)

    @torch.no_grad()
    def keep_shared(self, shared: SharedVocabulary) -> None:
        """Keep of the head, from here on, only what the student's vocabulary has too; the teacher's is another."""
        device = self.head[0].device
        self.head = head_rows(*self.head, torch.from_numpy(shared.teacher_ids).to(device))
        self._shared = SharedEntries.of(shared, device)

    def release(self) -> None:
        """Free weights, buffers and workspace; the teacher cannot be called after that."""
        engine, modules = self._engine, [self.gathered, *([self._engine] if self._engine is not None else [])]
        if self._graphs is not None:
            self._graphs.release()  # first: they hold the weights' addresses
        if isinstance(engine, deepspeed.DeepSpeedEngine) or (
            isinstance(engine, deepspeed.InferenceEngine) and self.injected
        ):
            engine.destroy()  # ZeRO-3's hooks; the workspace of injected kernels
        for module in modules:
            for tensor in (*module.parameters(), *module.buffers()):
                # Hooks and libraries may still refer to the tensors. ZeRO-3 has a rank's shard in `ds_tensor`.
                for each in (tensor, getattr(tensor, "ds_tensor", None)):
                    if each is not None:
                        each.data = each.data.new_empty(0)
        self._engine = self._graphs = self._recorder = self._shared = None
        self._probe = _Probe()
        del self.head, self.gathered, engine, modules
        gc.collect()  # modules and their hooks refer to each other
        get_accelerator().empty_cache()

    @torch.no_grad()
    def __call__(self, batch: Batch) -> TeacherView:
        """Hidden states at the rows' positions, and the head that turns them into logits."""
        rows = batch if batch.teacher is None else batch.teacher
        if self._engine is None:
            self.start()
        assert self._engine is not None
        inputs = rows.input_ids, rows.attention_mask, rows.positions
        if self._everywhere:
            hidden, everywhere = self._engine(*inputs, everywhere=True)
            return TeacherView(hidden, *self.head, self._shared, everywhere)
        return TeacherView((self._graphs or self._engine)(*inputs), *self.head, self._shared)

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

    def _choose_engine(self) -> nn.Module:
        """The engine with injected kernels if every rank has one; ranks must not round differently."""
        problems = [problem for problem in gather_from_ranks(self._probe.problem) if problem] if self._probes else []
        probe, self._probe = self._probe, _Probe()
        if probe.engine is None or probe.model is None or problems:
            if problems:
                self.injection = f"kernels not injected ({problems[0]})"
            return self._infer(self.gathered, inject=False)
        self.gathered.model = probe.model
        self.injected = True
        self.injection = f"{probe.layers} layers injected, which moved the logits by {probe.moved:.4f} of the largest"
        return probe.engine

    @torch.no_grad()
    def _inject(self, gathered: GatheredMaskedLM) -> _Probe:
        """Try DeepSpeed's kernels on a model of its own, since injection replaces layers in place."""
        if get_accelerator().device_name() != "cuda":
            name = get_accelerator().device_name()
            return _Probe(problem=f"DeepSpeed injects kernels on CUDA devices only, this is {name}")
        tokens = torch.randint(0, gathered.decoder_weight.shape[0], (2, self._seq_len), device=self._device)
        positions = torch.arange(0, tokens.numel(), 3, device=self._device)
        half_padded = torch.ones_like(tokens)
        half_padded[1, (self._seq_len + 1) // 2 :] = 0

        def logits(engine: nn.Module, gathered: GatheredMaskedLM) -> Tensor:
            return torch.cat([_logits(engine(tokens, mask, positions), gathered) for mask in (None, half_padded)])

        plain = logits(gathered, gathered)
        try:
            candidate = self._load(self._device)
            engine: Any = self._infer_injected(candidate)
            layers = _adapt_injected_layers(candidate)
            if not layers:
                return _Probe(problem=f"DeepSpeed has no kernels for {type(candidate.model).__name__}")
            injected = logits(engine, candidate)
            moved = ((injected - plain).abs().max() / plain.abs().max()).item()
        except Exception as error:  # whatever a kernel library raises, the plain engine is still there
            return _Probe(problem=one_line(error, with_type=True))
        if not moved <= _INJECTION_TOLERANCE:
            engine.destroy()  # frees the workspace, and lets the layers of another model begin at number 0
            return _Probe(problem=f"injected kernels moved the logits by {moved:.3f} of the largest")
        return _Probe(engine=engine, model=candidate.model, layers=layers, moved=moved)

    def _infer_injected(self, gathered: GatheredMaskedLM) -> nn.Module:
        """The last layer of a known family stays as it is: it runs at the wanted positions only, which saves more."""
        layers = known_layers(gathered.model)
        if layers is None:
            return self._infer(gathered, inject=True)
        last = layers[-1]
        del layers[-1]
        engine = self._infer(gathered, inject=True)
        layers.append(last.eval().requires_grad_(False))
        return engine


@dataclass(frozen=True)
class _Probe:
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


def shard_over_ranks(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """ZeRO-3's forward pass without an optimizer: each module's weights are gathered before it runs and then released
    (Rajbhandari et al. 2020, section 5.3; DeepSpeed calls it ZeRO-Inference).

    Every rank has to call the result equally often. `model` is whole, on the CPU and frozen; it is sharded in place.
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

"""The frozen teacher in DeepSpeed's inference-only engine."""

from __future__ import annotations

import gc

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel

from dwt_ds.data.batches import Batch
from dwt_ds.data.shared_vocabulary import SharedVocabulary
from dwt_ds.distill.objective import SharedEntries, TeacherView, head_rows
from dwt_ds.engine.cuda_graphs import CudaRecorder, GraphedForward
from dwt_ds.engine.inference import InferenceSettings, KernelTrial, buffers_unrounded, inference_engine, try_kernels
from dwt_ds.engine.ranks import gather_from_ranks
from dwt_ds.models.build import DTYPES, parameter_count
from dwt_ds.models.load import load_masked_lm
from dwt_ds.models.masked_lm.checks import check_against_own_logits
from dwt_ds.models.masked_lm.families import known_layers
from dwt_ds.models.masked_lm.wrapper import GatheredMaskedLM

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
        self._path, self._trust_remote_code = path, trust_remote_code
        self._settings = InferenceSettings(DTYPES[dtype], device, seq_len)
        self._engine: nn.Module | None = None
        self._recorder = recorder
        self._graphs: GraphedForward | None = None
        self._shared: SharedEntries | None = None
        self._sharded = sharded
        self._trial: KernelTrial | None = None
        self.injected = False
        self.injection = "kernels not injected"
        """For the log, after `start`: whether kernels are injected, and why not or how far they moved the logits."""
        gathered = self._load(torch.device("cpu") if sharded else device)
        self.parameters = parameter_count(gathered)
        if kernel_inject and not sharded:
            self._trial = try_kernels(gathered, lambda: self._load(device), self._settings)
            if self._trial.problem and kernel_inject is True:
                raise ValueError(f"teacher.kernel_inject=true: {self._trial.problem}; set it to auto or false")
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
        self._trial = None
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
        model = load_masked_lm(self._path, dtype=self._settings.dtype, trust_remote_code=self._trust_remote_code)
        gathered = GatheredMaskedLM(model).to(device)
        check_against_own_logits(gathered)
        return gathered

    def _shard(self, gathered: GatheredMaskedLM) -> nn.Module:
        gathered.eval().requires_grad_(False)
        with buffers_unrounded(gathered, self._settings.device):
            engine = shard_over_ranks(gathered, self._settings.dtype)
        engine.eval()
        return engine

    def _choose_engine(self) -> nn.Module:
        """The engine with injected kernels if every rank has one; ranks must not round differently."""
        trial, self._trial = self._trial, None
        problems = [] if trial is None else [problem for problem in gather_from_ranks(trial.problem) if problem]
        if problems:
            self.injection = f"kernels not injected ({problems[0]})"
        if trial is None or trial.engine is None or trial.model is None or problems:
            return inference_engine(self.gathered, self._settings)
        self.gathered.model = trial.model
        self.injected = True
        self.injection = f"{trial.layers} layers injected, which moved the logits by {trial.moved:.4f} of the largest"
        return trial.engine


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

"""The teacher and the student of a run as its settings describe them; the student not yet in its engine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dwt_ds.base.words import prefix_errors
from dwt_ds.distill.hidden import hidden_loss_of
from dwt_ds.distill.objective import DistillObjective
from dwt_ds.engine import ranks
from dwt_ds.engine.cuda_graphs import CudaRecorder
from dwt_ds.engine.student import gather_at_once
from dwt_ds.engine.teacher import TeacherEngine
from dwt_ds.models.build import (
    DataSizes,
    attention_implementation,
    build_student,
    check_row_length,
    data_sizes,
    longest_row,
    student_model_config,
)
from dwt_ds.models.compiled import compile_layers
from dwt_ds.models.dropout import use_cpu_dropout
from dwt_ds.models.growth.grow import grow
from dwt_ds.models.growth.plan import check_growth
from dwt_ds.models.layer_norm import fuse_layer_norms
from dwt_ds.models.load import load_masked_lm, load_model_config
from dwt_ds.models.masked_lm.checks import check_against_own_logits, check_rounded_weights, freeze_unused_parameters
from dwt_ds.models.masked_lm.families import known_layers
from dwt_ds.models.masked_lm.wrapper import GatheredMaskedLM
from dwt_ds.models.quantization import add_fake_quantizers, check_quantization
from dwt_ds.models.token_types import use_one_token_type
from dwt_ds.models.tokenizers import check_same_vocabulary
from dwt_ds.run.other_vocabulary import OtherVocabulary
from dwt_ds.run.resolve import Resolved

# Families whose own code fails in bf16 and fp16: FNet's Fourier transform, and MRA's products of two dtypes.
_FP32_FAMILIES = ("fnet", "mra")


def check_student(resolved: Resolved, tokenizer: PreTrainedTokenizerBase) -> None:
    """Whether the student can be built as it should, from its configuration alone (ValueError)."""
    student = student_model_config(resolved.config.student, **_data_sizes(resolved, tokenizer))
    if student.model_type in _FP32_FAMILIES and resolved.ds.precision != "fp32":
        family, precision = resolved.config.student.family, resolved.ds.precision
        raise ValueError(f"student.family={family!r} cannot compute in {precision}; use --deepspeed_config zero2_fp32")
    if resolved.quantization is not None:
        check_quantization(student, resolved.quantization)


def check_initial_weights(resolved: Resolved, tokenizer: PreTrainedTokenizerBase) -> None:
    """Whether the student's weights can be grown, from the configurations alone (ValueError, FileNotFoundError)."""
    init, path = resolved.config.student.init, resolved.config.teacher.path
    if init == "random":
        return
    assert path is not None  # refused with the settings
    with prefix_errors("teacher.path"):
        teacher = load_model_config(path, trust_remote_code=resolved.config.teacher.trust_remote_code)
    check_growth(teacher, student_model_config(resolved.config.student, **_data_sizes(resolved, tokenizer)), init)
    if resolved.config.teacher.vocabulary == "same":  # also where the soft weight is 0, and the teacher never loaded
        check_same_vocabulary(path, tokenizer, teacher_rows=teacher.vocab_size)


def load_teacher(
    resolved: Resolved, tokenizer: PreTrainedTokenizerBase, other: OtherVocabulary | None = None
) -> TeacherEngine | None:
    """The teacher, not started yet; None for a student that trains alone (ValueError, OSError of one line).

    `other` is its vocabulary where that may differ from the data's.
    """
    config = resolved.config.teacher
    if config.path is None:
        return None
    seq_len = resolved.corpus.seq_len if other is None else (other.longest_row or resolved.corpus.seq_len)
    dtype = resolved.ds.precision if config.dtype == "auto" else config.dtype
    with prefix_errors("teacher.path"):
        family = load_model_config(config.path, trust_remote_code=config.trust_remote_code).model_type
        if family in _FP32_FAMILIES and dtype != "fp32":
            raise ValueError(f"{family} models cannot compute in {dtype}; set teacher.dtype=fp32")
        teacher = TeacherEngine(
            config.path,
            dtype=dtype,
            kernel_inject=config.kernel_inject,
            device=ranks.device(),
            seq_len=seq_len,
            sharded=config.sharded,
            trust_remote_code=config.trust_remote_code,
            everywhere=resolved.config.distill.hidden_weight > 0,
            recorder=CudaRecorder() if uses_graphs(resolved) and not resolved.config.distill.hidden_weight else None,
        )
    if other is None:
        check_same_vocabulary(config.path, tokenizer, teacher_rows=teacher.vocabulary_rows)
        longest = longest_row(teacher.model.config)
        check_row_length(f"teacher.path={config.path!r}", seq_len, longest, "use another model")
    else:
        other.check_decoder(teacher.vocabulary_rows)
    if compiles(resolved) and not config.sharded and not config.kernel_inject:
        compile_layers(teacher.model)
    return teacher


def build_objective(
    resolved: Resolved,
    tokenizer: PreTrainedTokenizerBase,
    other: OtherVocabulary | None = None,
    *,
    grown: bool = True,
    teacher_hidden_size: int | None = None,
) -> DistillObjective:
    """The student as it starts, with the loss around it, on this rank's device and checked against its own logits.

    Args:
        other: the teacher's vocabulary where that may differ from the data's.
        grown: False: it has random weights whatever `student.init` says; a checkpoint replaces them.
        teacher_hidden_size: columns of the teacher's hidden states, for a hidden loss; None: without one.
    """
    config = resolved.config
    torch.manual_seed(config.seed)
    model = build_student(config.student, **_data_sizes(resolved, tokenizer))
    if config.student.init != "random" and grown:
        assert config.teacher.path is not None  # refused with the settings
        teacher = load_masked_lm(
            config.teacher.path, dtype=torch.float32, trust_remote_code=config.teacher.trust_remote_code
        )
        entries = None if other is None else other.entries_to_grow_from()
        grow(teacher, model, config.student.init, seed=config.seed, entries=entries)
    if config.train.activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if ranks.device().type == "cpu":
        use_cpu_dropout(model)
    else:
        use_one_token_type(model)
    gathered = GatheredMaskedLM(model).to(ranks.device())
    fuse_layer_norms(model, config.fused.layer_norm, ranks.device())
    with _attention_of_fp32(model):
        check_against_own_logits(gathered)
        freeze_unused_parameters(gathered)
    if resolved.quantization is not None:
        # After the check above: rounding can turn a tiny difference into a large one.
        add_fake_quantizers(model, resolved.quantization)
        with _attention_of_fp32(model):
            check_rounded_weights(gathered, resolved.quantization.modules)
    if compiles(resolved):
        gather_at_once(compile_layers(model))
    hidden_loss = None if teacher_hidden_size is None else hidden_loss_of(model, teacher_hidden_size, config)
    objective = DistillObjective(gathered, config.distill, resolved.corpus.vocab_size, hidden_loss)
    return objective.to(ranks.device())


def uses_graphs(resolved: Resolved) -> bool:
    """Whether passes of recurring shapes are recorded as CUDA graphs."""
    return ranks.device().type == "cuda" and allows_graphs(resolved)


def allows_graphs(resolved: Resolved) -> bool:
    """Whether the settings let passes be CUDA graphs, on a GPU.

    Not under ZeRO-3: DeepSpeed gathers weights on the default stream, which a graph's stream would have to wait for.
    """
    return resolved.config.train.cuda_graphs != "off" and resolved.ds.zero_stage < 3


def can_be_recorded(resolved: Resolved) -> bool:
    """Whether the student's training passes can be CUDA graphs, as far as the settings tell.

    Recomputing activations saves and restores the state of the random generator, and autocast keeps copies of weights.
    Flash attention reads lengths on the host where rows are padded, and DeepSpeed's profiler waits for the device in
    each layer. Quantizers and a hidden loss have not been tried.
    """
    config, values = resolved.config, resolved.ds_values
    on = any(values.get(section, {}).get("enabled") for section in ("torch_autocast", "flops_profiler"))
    untried = resolved.quantization is not None or config.distill.hidden_weight
    flash = config.student.attention == "flash_attention_2"
    return not (config.train.activation_checkpointing or on or flash or untried)


def may_replay_student(resolved: Resolved) -> bool:
    """Whether the settings let the student's training passes be recorded; gradients are in one buffer under ZeRO-2."""
    return can_be_recorded(resolved) and resolved.ds.zero_stage == 2 and uses_graphs(resolved)


def recorder_of_student(resolved: Resolved, student: GatheredMaskedLM) -> CudaRecorder | None:
    """None where its passes are not recorded: by the settings, or since its family's passes are not known."""
    known = may_replay_student(resolved) and known_layers(student.model) is not None
    return CudaRecorder() if known else None


def compiles(resolved: Resolved) -> bool:
    """Whether encoder layers are compiled. Under ZeRO-3 only if the settings say so: it has not run on a GPU there."""
    setting = resolved.config.train.compile
    if setting == "auto":
        return ranks.device().type == "cuda" and resolved.ds.zero_stage < 3
    return setting == "layers"


def _data_sizes(resolved: Resolved, tokenizer: PreTrainedTokenizerBase) -> DataSizes:
    return data_sizes(tokenizer, vocab_size=resolved.corpus.vocab_size, seq_len=resolved.corpus.seq_len)


@contextmanager
def _attention_of_fp32(model: PreTrainedModel) -> Iterator[None]:
    """FlashAttention computes in 16 bits only, and the student is in fp32 until DeepSpeed casts it."""
    chosen = model.config._attn_implementation
    if chosen == "flash_attention_2":
        model.config._attn_implementation = attention_implementation("auto", type(model))
    try:
        yield
    finally:
        model.config._attn_implementation = chosen

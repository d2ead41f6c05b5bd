"""The teacher and the student of a run, as its settings have them; DeepSpeed has not wrapped the student yet."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dwt_ds.distill.objective import DistillObjective
from dwt_ds.engine import ranks
from dwt_ds.engine.teacher import TeacherEngine
from dwt_ds.models.build import attention_implementation, build_student, load_masked_lm, longest_row
from dwt_ds.models.cpu_dropout import use_cpu_dropout
from dwt_ds.models.growth.grow import grow
from dwt_ds.models.masked_lm.wrapper import GatheredMaskedLM, check_against_own_logits, freeze_unused_parameters
from dwt_ds.models.quantization import prepare
from dwt_ds.models.swaps import fuse_layer_norms
from dwt_ds.models.vocabulary import check_same_vocabulary
from dwt_ds.run.resolve import Settled, naming, sizes


def load_teacher(settled: Settled, tokenizer: PreTrainedTokenizerBase) -> TeacherEngine | None:
    """The teacher, not started yet; None for a student that trains alone (ValueError, OSError: one line)."""
    config = settled.config.teacher
    if config.path is None:
        return None
    seq_len = settled.data.manifest.seq_len
    with naming("teacher.path"):
        teacher = TeacherEngine(
            config.path,
            dtype=settled.ds.precision if config.dtype == "auto" else config.dtype,
            kernel_inject=config.kernel_inject,
            device=ranks.device(),
            seq_len=seq_len,
            sharded=config.sharded,
            trust_remote_code=config.trust_remote_code,
        )
    check_same_vocabulary(config.path, tokenizer, teacher_rows=teacher.vocabulary_rows)
    longest = longest_row(teacher.model.config)
    if longest is not None and longest < seq_len:
        raise ValueError(
            f"teacher.path={config.path!r}: it reads {longest} tokens, the rows of {settled.config.data.dir} have "
            f"{seq_len}; prepare shorter rows or choose another teacher"
        )
    return teacher


def build_objective(settled: Settled, tokenizer: PreTrainedTokenizerBase) -> DistillObjective:
    """The student as it starts, with the loss around it, on this rank's device and checked against its own logits."""
    config = settled.config
    torch.manual_seed(config.seed)
    model = build_student(config.student, **sizes(settled, tokenizer))
    if config.student.init != "random":
        assert config.teacher.path is not None  # check_student refused it
        teacher = load_masked_lm(
            config.teacher.path, dtype=torch.float32, trust_remote_code=config.teacher.trust_remote_code
        )
        grow(teacher, model, config.student.init, seed=config.seed)
    if config.train.activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if ranks.device().type == "cpu":
        use_cpu_dropout(model)
    gathered = GatheredMaskedLM(model).to(ranks.device())
    fuse_layer_norms(model, config.fused.layer_norm, ranks.device())
    with _attention_of_fp32(model):
        check_against_own_logits(gathered)
        freeze_unused_parameters(gathered)
    if settled.quantization is not None:
        # After the check above: rounding makes a large difference of a tiny one.
        prepare(model, settled.quantization)
    return DistillObjective(gathered, config.distill, settled.data.manifest.vocab_size)


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

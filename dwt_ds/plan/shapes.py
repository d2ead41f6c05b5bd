"""Student and teacher as shapes: built on torch's meta device, where tensors have sizes but no memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PretrainedConfig

from dwt_ds.base.words import one_line
from dwt_ds.config.quantization import Quantization
from dwt_ds.config.recipe import load_recipe, recipe_names
from dwt_ds.config.schema import StudentConfig
from dwt_ds.data.overlap import Overlap
from dwt_ds.distill.release import TeacherRelease
from dwt_ds.models.build import DataSizes, build_student, check_attention, parameter_count, student_model_config
from dwt_ds.models.flops import meta_model
from dwt_ds.models.load import load_model_config
from dwt_ds.models.masked_lm.checks import freeze_unused_parameters
from dwt_ds.models.masked_lm.wrapper import GatheredMaskedLM
from dwt_ds.models.meta_device import RepeatedOperations
from dwt_ds.models.quantization import add_fake_quantizers
from dwt_ds.plan.vocabulary import check_reads_rows, find_overlap
from dwt_ds.run.resolve import Corpus, Resolved


@dataclass(frozen=True)
class Teacher:
    """The teacher's configuration, and where it comes from."""

    config: PretrainedConfig
    source: str
    """In words: its own config.json, or what is assumed."""


@dataclass(frozen=True)
class Shapes:
    """The models of a run, on the meta device."""

    student: GatheredMaskedLM
    teacher: GatheredMaskedLM | None
    teacher_source: str
    overlap: Overlap | None = None
    """With a teacher that has a vocabulary of its own."""
    overlap_source: str = ""

    @property
    def trainable_numels(self) -> list[int]:
        """Elements of each trainable parameter, in the order in which DeepSpeed lays them out."""
        return [parameter.numel() for parameter in self.student.parameters() if parameter.requires_grad]

    @property
    def muon_share(self) -> float:
        """Of the trainable elements, those that DeepSpeed's Muon trains: matrices, except for some names."""
        trained = {name: each for name, each in self.student.named_parameters() if each.requires_grad}
        matrices = [
            each.numel()
            for name, each in trained.items()
            if each.dim() > 1 and not any(part in name.lower() for part in ("embed", "lm_head"))
        ]
        return sum(matrices) / sum(self.trainable_numels)

    @property
    def student_parameters(self) -> int:
        """Tied ones counted once."""
        return parameter_count(self.student)

    @property
    def teacher_parameters(self) -> int:
        """0 without a teacher."""
        return 0 if self.teacher is None else parameter_count(self.teacher)


def build_shapes(settings: Resolved, trainer: Resolved | None = None) -> Shapes:
    """Both models as a run would build them, except for the attention implementation, which depends on the device.

    Args:
        trainer: settings of the run that will train the teacher; None: `find_teacher` looks for a teacher.

    Raises:
        ValueError: what `build_student` raises for settings that make no model, and `check_reads_rows` for a teacher.
    """
    family = settings.config.student.family
    with torch.device("meta"):
        # This machine may lack the attention that the planned one has; the simulation sets it by itself.
        config = replace(settings.config.student, attention="eager")
        student = GatheredMaskedLM(build_student(config, **corpus_sizes(settings.corpus)))
        check_attention(settings.config.student.attention, type(student.model))
        try:
            with RepeatedOperations():  # which answers the families that ask whether a mask is all ones
                freeze_unused_parameters(student)
        except RuntimeError as error:
            raise ValueError(
                f"student.family={family!r}: its code reads the values of tensors, which a plan does not have "
                f"({one_line(error)}); plan with a similar family, such as bert"
            ) from error
        if settings.quantization is not None:
            _quantize(student, settings.quantization)
    teacher = find_teacher(settings) if trainer is None else _trained_by(trainer)
    if teacher is None:
        return Shapes(student, None, "")
    trained_on = None if trainer is None else trainer.config.data.dir
    if TeacherRelease(settings.config, settings.total_steps).step != 0:  # else a run never loads it
        check_reads_rows(settings.config, settings.corpus.seq_len, teacher.config, trained_on)
    overlap, overlap_source = find_overlap(settings.config, settings.corpus.vocab_size, teacher.config, trained_on)
    return Shapes(student, meta_model(teacher.config), teacher.source, overlap, overlap_source)


def _quantize(gathered: GatheredMaskedLM, quantization: Quantization) -> None:
    """Insert the fake quantizers. On the meta device torchao makes new parameters, so tied ones are tied again here."""
    before = dict(gathered.named_parameters(remove_duplicate=False))
    add_fake_quantizers(gathered.model, quantization)
    for name, _ in list(gathered.named_parameters(remove_duplicate=False)):
        module, _, last = name.rpartition(".")
        setattr(gathered.get_submodule(module), last, before[name])


def find_teacher(settings: Resolved) -> Teacher | None:
    """The teacher's configuration from its folder, else from the recipe that trains it, else an assumption."""
    path = settings.config.teacher.path
    if path is None:
        return None
    try:
        config = load_model_config(path, trust_remote_code=settings.config.teacher.trust_remote_code)
        return Teacher(config, f"{path}: {config.model_type}, {_size_words(config)}, from its config.json")
    except FileNotFoundError:
        if Path(path).expanduser().is_dir():  # such as a run's folder in place of its export
            raise
    student, why = _assumed_teacher(settings, path)
    config = student_model_config(student, **corpus_sizes(settings.corpus))
    return Teacher(config, f"assumed, since {path} does not exist: {config.model_type}, {_size_words(config)} ({why})")


def _trained_by(trainer: Resolved) -> Teacher:
    config = student_model_config(trainer.config.student, **corpus_sizes(trainer.corpus))
    return Teacher(config, f"{config.model_type}, {_size_words(config)}, trained by the run {trainer.recipe.name}")


def _assumed_teacher(settings: Resolved, path: str) -> tuple[StudentConfig, str]:
    """A student section to use as the teacher's, and the reason."""
    for name in recipe_names():
        recipe = load_recipe(name)
        if path == f"{recipe.config.output_dir}/export":
            return recipe.config.student, f"recipe {name} trains it"
    student = settings.config.student
    if student.layers > 12 or student.hidden_size > 768:
        layers, width, heads = 12, 768, 12
        why = "no recipe trains it; BERT-base is used in its place"
    else:
        layers, width, heads = max(1, student.layers // 2), student.hidden_size, student.num_heads
        why = "no recipe trains it; half the student's layers are used in its place"
    section = StudentConfig(
        family=student.family, layers=layers, hidden_size=width, num_heads=heads, max_positions=student.max_positions
    )
    return section, why


def corpus_sizes(corpus: Corpus) -> DataSizes:
    """What the data decide of a student's shapes, without their tokenizer."""
    return DataSizes(
        vocab_size=corpus.vocab_size,
        seq_len=corpus.seq_len,
        pad_token_id=corpus.pad_token_id,
        # Which token is the mask changes no shape, but ESM's token dropout must know one.
        mask_token_id=corpus.vocab_size - 1,
    )


def _size_words(config: PretrainedConfig) -> str:
    return f"{config.num_hidden_layers} x {config.hidden_size}"

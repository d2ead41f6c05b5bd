"""Student and teacher as shapes: built on torch's meta device, where tensors have sizes but no memory.

Also what `teacher.sharded` does to the teacher's memory and traffic: the engine shards its weights over the ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PretrainedConfig

from dwt_ds.base.words import one_line
from dwt_ds.config.quantization import Quantization
from dwt_ds.config.recipe import load_recipe, recipe_names
from dwt_ds.config.schema import StudentConfig
from dwt_ds.data.overlap import Overlap
from dwt_ds.models.build import DataSizes, build_student, parameter_count, student_model_config
from dwt_ds.models.flops import meta_model, silence_padding_warning
from dwt_ds.models.load import load_model_config
from dwt_ds.models.masked_lm.checks import freeze_unused_parameters
from dwt_ds.models.masked_lm.wrapper import GatheredMaskedLM
from dwt_ds.models.quantization import prepare
from dwt_ds.plan.communication import Traffic
from dwt_ds.plan.vocabulary import find_overlap
from dwt_ds.plan.zero import Partition, ZeroSettings, zero_settings
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
        settings: of the run.
        trainer: of the run that will train its teacher; None: `find_teacher` looks for one.

    Raises:
        ValueError: what `build_student` raises for settings that make no model.
    """
    family = settings.config.student.family
    with torch.device("meta"):
        student = GatheredMaskedLM(build_student(settings.config.student, **corpus_sizes(settings.corpus)))
        silence_padding_warning(student)
        try:
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
    overlap, overlap_source = find_overlap(settings.config, settings.corpus.vocab_size, teacher.config, trained_on)
    return Shapes(student, meta_model(teacher.config), teacher.source, overlap, overlap_source)


def _quantize(gathered: GatheredMaskedLM, quantization: Quantization) -> None:
    """Insert the fake quantizers. On the meta device torchao makes new parameters, so tied ones are tied again here."""
    before = dict(gathered.named_parameters(remove_duplicate=False))
    prepare(gathered.model, quantization)
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
        pass
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


def buffer_bytes(model: nn.Module) -> int:
    """Bytes of buffers, which are not trained, such as position ids."""
    return sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())


def head_elements(model: GatheredMaskedLM, entries: int | None = None) -> int:
    """Elements of the decoder's weight and bias, or of so many of its rows."""
    head = [each for each in (model.decoder_weight, model.decoder_bias) if each is not None]
    return sum(each.numel() if entries is None else entries * each[0].numel() for each in head)


@dataclass(frozen=True)
class ShardedTeacher:
    """A teacher whose weights are sharded over the ranks, as ZeRO-3 shards a student's.

    Args:
        model: in the dtype that it computes in, on any device.
        ranks: processes of the run.
        entries: rows of the head that a rank keeps beside it; None: all.
    """

    model: GatheredMaskedLM
    ranks: int
    entries: int | None = None

    @property
    def bytes(self) -> int:
        """What a rank holds from step to step: its shard, small weights whole, and a copy of the head."""
        whole = head_elements(self.model, self.entries)
        small = self._zero.persistent_elements(self._partition)
        return self._zero.element_bytes * (self._partition.shards + small + whole) + buffer_bytes(self.model)

    @property
    def gathered_bytes(self) -> int:
        """What the forward pass has gathered at a time.

        Twice the weights: DeepSpeed copies them out of the buffer that they arrive in, and keeps both.
        """
        return 2 * self._zero.gathered_bytes(self._partition)

    def traffic(self, accumulation: int) -> Traffic:
        """The gathering of the larger weights in each of a step's forward passes."""
        numels = [numel for numel in self._partition.numels if numel > self._zero.persistence_threshold]
        gathered = self._zero.element_bytes * sum(-(-numel // self.ranks) * self.ranks for numel in numels)
        return Traffic("all_gather", "teacher's weights", gathered * accumulation, len(numels) * accumulation)

    @property
    def _partition(self) -> Partition:
        return Partition([parameter.numel() for parameter in self.model.parameters()], self.ranks)

    @property
    def _zero(self) -> ZeroSettings:
        """The engine leaves DeepSpeed's defaults alone; without a backward pass nothing is kept for a second use."""
        precision = "fp32" if self.model.decoder_weight.element_size() == 4 else "bf16"
        return zero_settings({"zero_optimization": {"stage3_max_reuse_distance": 0}}, precision, 3)

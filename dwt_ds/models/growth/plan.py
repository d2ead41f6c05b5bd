"""Which teacher layer each student layer starts from, and whether a growth is possible; no weights are needed.

`student.init` is `random`, or a depth map, a width method, or both joined by a plus sign:

    remap | stack | bert2bert | interlace       depth only (student and teacher have the same width)
    fna | net2net | fpi | aki                   width, with the depth map remap
    stack+fpi, interlace+fna, bert2bert+aki     both
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import torch
from torch import nn
from transformers import AutoModelForMaskedLM, PretrainedConfig

from dwt_ds.base.words import nearest
from dwt_ds.models.build import first_position
from dwt_ds.models.growth.layout import GROWABLE_FAMILIES, in_layer, layer_of, layout_of

# (student's layer, the teacher's number of layers, the student's) -> the teacher's layer.
DEPTH_MAPS: dict[str, Callable[[int, int, int], int]] = {
    # FNA (Fang et al. 2020, section 3.1), and the paper's: the last layer is repeated
    "remap": lambda layer, teacher, student: min(layer, teacher - 1),
    # StackBERT (Gong et al. 2019); the rule of LiGO's baselines (Wang et al. 2023)
    "stack": lambda layer, teacher, student: layer % teacher,
    # bert2BERT (Chen et al. 2022): whole copies of the stack, the rest from its top
    "bert2bert": lambda layer, teacher, student: (
        layer % teacher if layer < student - student % teacher else teacher - (student - layer)
    ),
    # each layer several times in a row (LiGO's InterBERT baseline)
    "interlace": lambda layer, teacher, student: layer // -(-student // teacher),
}
WIDTH_METHODS = ("fna", "net2net", "fpi", "aki")

# Fields of a configuration that change what the same weights compute; each family has some of them.
_FUNCTION_FIELDS = (
    "hidden_act",
    "hidden_activation",
    "activation",
    "classifier_activation",
    "layer_norm_eps",
    "norm_eps",
    "position_embedding_type",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "global_rope_theta",
    "local_rope_theta",
    "local_attention",
    "global_attn_every_n_layers",
    "layer_types",
)


@dataclass(frozen=True)
class Sizes:
    """The sizes of a model that growth depends on."""

    layers: int
    hidden_size: int
    num_heads: int
    intermediate_size: int
    embedding_size: int

    @classmethod
    def of(cls, config: PretrainedConfig) -> Sizes:
        """The sizes of one of the growable families."""
        return cls(
            layers=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            num_heads=config.num_attention_heads,
            intermediate_size=config.hidden_dim if config.model_type == "distilbert" else config.intermediate_size,
            embedding_size=getattr(config, "embedding_size", config.hidden_size),
        )

    @property
    def head_size(self) -> int:
        """Channels of one attention head."""
        return self.hidden_size // self.num_heads


@dataclass(frozen=True)
class GrowthPlan:
    """A growth that is possible."""

    depth: str
    """A key of DEPTH_MAPS."""
    width: str | None
    """One of WIDTH_METHODS; None: only the depth grows."""
    layer_sources: list[int]
    """The teacher layer that each student layer is copied from."""
    teacher: Sizes
    student: Sizes
    position_shift: int = 0
    """From a row of the student's position table to the teacher's: RoBERTa's positions begin after the padding's id."""

    def lines(self) -> list[str]:
        """One line per student layer, for people."""
        return [f"student layer {layer} <- teacher layer {source}" for layer, source in enumerate(self.layer_sources)]


def parse_method(method: str) -> tuple[str, str | None]:
    """Depth map and width method (None: depth only) of a `student.init` other than random.

    Raises ValueError, with the nearest known method, for an unknown one.
    """
    depth, plus, width = method.partition("+")
    if not plus and depth in WIDTH_METHODS:
        return "remap", depth
    if depth in DEPTH_MAPS and (width in WIDTH_METHODS or not plus):
        return depth, width if plus else None
    known = ["random", *DEPTH_MAPS, *WIDTH_METHODS, *map("+".join, product(DEPTH_MAPS, WIDTH_METHODS))]
    fix = nearest(method, known) or "; use random"
    raise ValueError(
        f"student.init={method!r} is unknown{fix} (depth: {', '.join(DEPTH_MAPS)}; width: "
        f"{', '.join(WIDTH_METHODS)}; both: stack+fpi)"
    )


def layer_sources(method: str, teacher_layers: int, student_layers: int) -> list[int]:
    """The teacher layer that each student layer is copied from, by a `student.init` other than random.

    Raises ValueError for an unknown method, or a student with fewer layers than the teacher.
    """
    depth, _ = parse_method(method)
    if student_layers < teacher_layers:
        raise ValueError(_smaller("student.layers", student_layers, teacher_layers, method))
    return [DEPTH_MAPS[depth](layer, teacher_layers, student_layers) for layer in range(student_layers)]


def check_growth(teacher_config: PretrainedConfig, student_config: PretrainedConfig, method: str) -> GrowthPlan:
    """Plan how the student starts from the teacher by this method; no weights are allocated.

    Raises:
        ValueError: one line: unknown method, different or unsupported families, a smaller student, different head
            sizes, sizes that are no multiple of the teacher's (fpi), or architectures with different parameters or
            different functions of them.
    """
    depth, width = parse_method(method)
    family, theirs = student_config.model_type, teacher_config.model_type
    if family != theirs:
        raise ValueError(
            f"student.init={method!r} needs teacher and student of one family, not {theirs!r} and {family!r}; "
            f"set student.family={theirs}, or student.init=random"
        )
    if family not in GROWABLE_FAMILIES:
        raise ValueError(
            f"student.init={method!r} does not know the weights of family {family!r}; use student.init=random, or one "
            f"of {', '.join(GROWABLE_FAMILIES)}"
        )
    teacher, student = Sizes.of(teacher_config), Sizes.of(student_config)
    sources = layer_sources(method, teacher.layers, student.layers)
    _check_sizes(teacher, student, method, width)
    _check_architectures(teacher_config, student_config, method, sources)
    shift = first_position(teacher_config) - first_position(student_config)
    return GrowthPlan(depth, width, sources, teacher, student, shift)


def _check_sizes(teacher: Sizes, student: Sizes, method: str, width: str | None) -> None:
    fields = {
        "student.hidden_size": (teacher.hidden_size, student.hidden_size),
        "student.num_heads": (teacher.num_heads, student.num_heads),
        "student.intermediate_size": (teacher.intermediate_size, student.intermediate_size),
        "student.config.embedding_size": (teacher.embedding_size, student.embedding_size),
    }
    for field, (small, large) in fields.items():
        if large < small and field != "student.num_heads":
            raise ValueError(_smaller(field, large, small, method))
    if teacher.head_size != student.head_size:
        raise ValueError(
            f"student.num_heads={student.num_heads} makes heads of {student.head_size} channels, the teacher's have "
            f"{teacher.head_size}: a head can be copied but not cut or widened, as its attention scores would change; "
            f"set student.num_heads to {_heads_that_fit(student, teacher)}"
        )
    for field, (small, large) in fields.items():
        if large != small and width is None:
            raise ValueError(
                f"student.init={method!r} grows the depth only, but {field}={large} and the teacher's is {small}; "
                f"name a width method too, such as {method}+fpi"
            )
        if width == "fpi" and large % small:
            raise ValueError(
                f"student.init={method!r}: {field}={large} is not a multiple of the teacher's {small}, and FPI keeps "
                f"the function only with equally many copies; set it to {(large // small + 1) * small}, or use aki"
            )


def _heads_that_fit(student: Sizes, teacher: Sizes) -> str:
    if student.hidden_size % teacher.head_size:
        return f"match, with a hidden_size that is a multiple of {teacher.head_size}"
    return str(student.hidden_size // teacher.head_size)


def _smaller(field: str, student: int, teacher: int, method: str) -> str:
    return (
        f"{field}={student} is smaller than the teacher's {teacher}, and student.init={method!r} only grows; "
        f"set it to {teacher} or more, or student.init=random"
    )


def _check_architectures(
    teacher_config: PretrainedConfig, student_config: PretrainedConfig, method: str, sources: list[int]
) -> None:
    for field in _FUNCTION_FIELDS:
        if not hasattr(teacher_config, field) or not hasattr(student_config, field):
            continue
        theirs, ours = getattr(teacher_config, field), getattr(student_config, field)
        wanted = theirs
        if field == "layer_types":  # one per layer; the student's further layers may be of any type
            wanted = [*theirs, *ours[len(theirs) :]]
        if wanted != ours:
            raise ValueError(
                f"student.init={method!r}: the student's {field} is {ours!r}, the teacher's {theirs!r}; "
                f"set student.config.{field}={wanted}"
            )
    if student_config.tie_word_embeddings and not teacher_config.tie_word_embeddings:
        raise ValueError(
            f"student.init={method!r}: the teacher's decoder is not tied to its embeddings, so a tied student would "
            "lose it; set student.config.tie_word_embeddings=false"
        )
    theirs = set(_parameter_names(teacher_config))
    lost = {name for name in theirs if layer_of(name) in {None, *sources} and not is_absent_by_design(name)}
    for name in _parameter_names(student_config):
        if layout_of(name) is None:
            raise ValueError(f"student.init={method!r} does not know the parameter {name}; use student.init=random")
        layer = layer_of(name)
        source = name if layer is None else in_layer(name, sources[layer])
        if source not in theirs and not is_absent_by_design(name):
            raise ValueError(
                f"student.init={method!r}: the student has {name}, and the teacher no {source}; give student.config "
                "the settings of the teacher's config.json"
            )
        lost.discard(source)
    if lost:
        raise ValueError(
            f"student.init={method!r}: the teacher has {min(lost)}, and the student nothing to copy it to; "
            "give student.config the settings of the teacher's config.json, or set student.init=random"
        )


def is_absent_by_design(name: str) -> bool:
    """ModernBERT's first layer has no norm before its attention, so a layer grown from it keeps its own."""
    return ".attn_norm." in name


def _parameter_names(config: PretrainedConfig) -> list[str]:
    with torch.device("meta"):
        model: nn.Module = AutoModelForMaskedLM.from_config(config)
    return [name for name, _ in model.named_parameters(remove_duplicate=False)]

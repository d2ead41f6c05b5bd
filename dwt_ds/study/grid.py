"""A study's grid: from YAML to a list of runs, teachers before their students.

A grid lists blocks of runs; within a block every combination of the labels is a run, once per seed:

    title: Teacher quality
    question: How weak may the teacher be?
    runs:
      - {teacher: none}
      - {teacher: [teacher4, teacher1], weight: [w1, adaptive]}

The settings of a label are in grids/common.yaml, and in the grid's own `teachers` and `axes`, which add to it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import StrictInt

from dwt_ds.base.files import find_file
from dwt_ds.base.trees import flatten, is_within, merge
from dwt_ds.base.words import nearest, prefix_errors
from dwt_ds.base.yaml_and_json import read_yaml
from dwt_ds.config.validate import validated

GRIDS_FOLDER = Path(__file__).parent / "grids"
Scale = Literal["smoke", "small", "gpu", "paper"]
SCALES = get_args(Scale)
NO_TEACHER = "none"
ALONE = "alone"
_COMMON = "common"
EVAL_SETS = "train.eval_sets"


@dataclass(frozen=True)
class _GridFile:
    """What a grid's file may have."""

    title: str = ""
    question: str = ""
    figure: int | None = None
    seeds: list[StrictInt] = field(default_factory=list)
    teacher_for_each_seed: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    settings_at: dict[Scale, dict[str, Any]] = field(default_factory=dict)
    teachers: dict[str, dict[str, Any]] = field(default_factory=dict)
    axes: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    glue: Any = None
    """Checked together with the command's options."""
    runs: list[Any] = field(default_factory=list)


@dataclass(frozen=True)
class StudyRun:
    """One pre-training run of a study."""

    name: str
    """Its folder; equal names in several grids are the same run."""
    settings: dict[str, Any]
    """A recipe, nested, with neither output_dir nor teacher.path."""
    seed: int
    labels: dict[str, str] = field(default_factory=dict)
    """Axis -> label, default labels included; for a run that trains a teacher, only `makes`."""
    teacher_run: str | None = None
    """Name of the run whose export is this one's teacher."""
    set_by: dict[str, str] = field(default_factory=dict)
    """Dotted setting -> the label in the run's name that sets it."""

    def of_its_own(self, overrides: Iterable[str]) -> list[str]:
        """The overrides that are for this run: `train.eval_sets` only if its data, and so its vocabulary, are the
        students'."""
        return [each for each in overrides if "data.dir" not in self.set_by or not is_within(key_of(each), EVAL_SETS)]


@dataclass(frozen=True)
class Grid:
    """A grid at one scale."""

    name: str
    title: str
    question: str
    """What its runs should answer; may be empty."""
    scale: Scale
    figure: int | None
    """Number of the paper's figure that it reproduces."""
    has_own_settings: bool
    """Whether its runs have other settings at this scale than runs of the same names in other grids."""
    ranks: int
    """Ranks per run."""
    glue: dict[str, Any] | None
    """Options for fine-tuning each run's exports, empty for the defaults; None: no fine-tuning."""
    runs: list[StudyRun]
    """Teachers first."""


def key_of(override: str) -> str:
    """The dotted setting of `key=value`."""
    return override.partition("=")[0]


def grid_names() -> list[str]:
    """Names of the packaged grids."""
    return sorted(path.stem for path in GRIDS_FOLDER.glob("*.yaml") if path.stem != _COMMON)


def grid_questions() -> dict[str, str]:
    """Name of each packaged grid -> the question that it answers."""
    return {name: str(read_yaml(GRIDS_FOLDER / f"{name}.yaml", "grid")["question"]) for name in grid_names()}


def load_grid(grid: str, scale: Scale, seeds: Iterable[int] | None = None, glue: str | None = None) -> Grid:
    """Read a grid given as a file or as the name of a packaged one.

    Args:
        seeds: of the students, instead of the grid's or the scale's. Their teacher keeps the first of those.
        glue: fine-tune all exports on GLUE from this folder, or from the "hub"; None: only if the grid says so.

    Raises:
        FileNotFoundError: no such grid.
        ValueError: an unknown key, axis or label; one line.
    """
    path = find_file(grid, {name: GRIDS_FOLDER / f"{name}.yaml" for name in grid_names()}, "grid")
    with prefix_errors(f"grid {path}"):
        content = validated(_GridFile, read_yaml(path, "grid"))
    common = read_yaml(GRIDS_FOLDER / f"{_COMMON}.yaml", "grid")
    if scale not in common["scales"]:
        raise ValueError(f"--scale={scale!r}: use {', '.join(SCALES)}")
    size = common["scales"][scale]
    axes = {**common["axes"], **size.get("axes", {})}
    labels = Labels(
        where=f"grid {path}",
        teachers={**common["teachers"], **size["teachers"], **content.teachers},
        axes=axes | {axis: {**axes.get(axis, {}), **own_labels} for axis, own_labels in content.axes.items()},
    )
    own = merge(content.settings, content.settings_at.get(scale, {}))
    own_seeds = content.seeds or size["seeds"]
    # Seed of the students -> seed of their teacher: the same one for seeds that are added later.
    teacher_seeds = {seed: seed if content.teacher_for_each_seed else own_seeds[0] for seed in seeds or own_seeds}
    students = [
        run for block in content.runs for run in _runs_of_block(block, labels, size["settings"], own, teacher_seeds)
    ]
    if not students:
        raise ValueError(f"grid {path}: runs is empty; list at least {{teacher: none}}")
    teachers = [
        labels.teacher_run(label, merge(size["settings"], own), seed)
        for label in dict.fromkeys(run.labels["teacher"] for run in students if run.teacher_run)
        for seed in dict.fromkeys(teacher_seeds.values())
    ]
    unique: dict[str, StudyRun] = {}
    for run in [*teachers, *students]:
        same = unique.setdefault(run.name, run)
        if (same.settings, same.teacher_run) != (run.settings, run.teacher_run):
            raise ValueError(
                f"grid {path}: two runs with different settings would be called {run.name!r}; "
                "give labels of different axes different names"
            )
    return Grid(
        name=path.stem,
        title=content.title or path.stem,
        question=content.question,
        scale=scale,
        figure=content.figure,
        has_own_settings=bool(own) or content.teacher_for_each_seed,
        ranks=size["ranks"],
        glue=_fine_tuning(f"grid {path}", size["glue"], content.glue, glue),
        runs=list(unique.values()),
    )


def _fine_tuning(where: str, of_scale: dict[str, Any], of_grid: Any, asked: str | None) -> dict[str, Any] | None:
    if of_grid is None and asked is None:
        return None
    if not isinstance(of_grid, (dict, type(None))):
        raise ValueError(f"{where}: glue={of_grid!r} must be a mapping of options, such as {{dir: hub}}")
    return merge(of_scale, {**(of_grid or {}), **({} if asked is None else {"dir": asked})})


@dataclass(frozen=True)
class Labels:
    """The settings that a grid's labels stand for."""

    where: str
    """Prefix of error messages."""
    teachers: Mapping[str, dict[str, Any]]
    """Label -> settings in which the teacher's own run differs from the student's."""
    axes: Mapping[str, dict[str, dict[str, Any]]]
    """Axis -> label -> settings; the first label is the default."""

    def teacher_run(self, label: str, base: dict[str, Any], seed: int) -> StudyRun:
        """The run that trains the teacher `label`."""
        settings = merge(_from_random(base), self.teachers[label])
        set_by = dict.fromkeys(flatten(self.teachers[label]), label)
        return StudyRun(f"{label}-s{seed}", settings, seed, {"makes": label}, set_by=set_by)

    def default(self, axis: str) -> str:
        """The label of an axis that a block does not mention."""
        return next(iter(self.axes[axis]))

    def is_special(self, axis: str, label: str) -> bool:
        """Whether the label's settings differ from the default's, so that it belongs in names of runs."""
        return self.axes[axis][label] != self.axes[axis][self.default(axis)]

    def chosen(self, axis: str, value: Any) -> list[str]:
        """The labels that a block lists for `axis`, checked."""
        known = [NO_TEACHER, *self.teachers] if axis == "teacher" else list(self.axes[axis])
        names = [str(each) for each in (value if isinstance(value, list) else [value])]
        for name in names:
            if name not in known:
                raise ValueError(
                    f"{self.where}: {axis}={name!r} is unknown{nearest(name, known)} (known: {', '.join(known)})"
                )
        return names


def _runs_of_block(
    block: Any, labels: Labels, scale: dict[str, Any], own: dict[str, Any], teacher_seeds: Mapping[int, int]
) -> Iterator[StudyRun]:
    """The runs of all combinations of a block's labels.

    Args:
        scale, own: settings of the scale, and the grid's own. Those of a label that the block does not mention come
            before the grid's own, those of a label that it mentions after them.
        teacher_seeds: seed of each student -> that of its teacher.
    """
    if not isinstance(block, dict) or "teacher" not in block:
        raise ValueError(f"{labels.where}: runs: {block!r} must be a mapping with a teacher (none: trains alone)")
    for axis in block:
        if axis != "teacher" and axis not in labels.axes:
            raise ValueError(f"{labels.where}: runs: {axis}: unknown axis{nearest(axis, ['teacher', *labels.axes])}")
    axes = ["teacher", *labels.axes]
    choices = [labels.chosen(axis, block[axis] if axis in block else labels.default(axis)) for axis in axes]
    defaults = [labels.axes[axis][labels.default(axis)] for axis in labels.axes if axis not in block]
    base = reduce(merge, [scale, *defaults, own])
    for names in itertools.product(*choices):
        chosen = dict(zip(axes, names))
        said = {axis: label for axis, label in chosen.items() if axis != "teacher" and axis in block}
        special = {axis: label for axis, label in said.items() if labels.is_special(axis, label)}
        set_by = {key: label for axis, label in special.items() for key in flatten(labels.axes[axis][label])}
        teacher = None if chosen["teacher"] == NO_TEACHER else chosen["teacher"]
        start = _from_random(base) if teacher is None else base
        settings = reduce(_with_label, (labels.axes[axis][label] for axis, label in said.items()), start)
        stem = "-".join([ALONE if teacher is None else f"with_{teacher}", *special.values()])
        for seed, teacher_seed in teacher_seeds.items():
            trainer = None if teacher is None else f"{teacher}-s{teacher_seed}"
            yield StudyRun(f"{stem}-s{seed}", settings, seed, chosen, trainer, set_by)


def _from_random(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a run that has no teacher to start from."""
    return merge(settings, {"student": {"init": "random"}}) if "init" in settings.get("student", {}) else settings


def _with_label(settings: dict[str, Any], label: dict[str, Any]) -> dict[str, Any]:
    """The settings with those of a label. A schedule that it names is a whole one: nothing of the former one stays."""
    distill = label.get("distill", {})
    replaced = [name for name, value in distill.items() if isinstance(value, Mapping) and "schedule" in value]
    return merge(merge(settings, {"distill": dict.fromkeys(replaced)}) if replaced else settings, label)

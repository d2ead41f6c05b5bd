"""The nine tasks of GLUE (Wang et al., 2019): their files, columns, labels, metrics and official sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from dwt_ds.base.words import nearest

Metric = Literal["accuracy", "f1", "matthews", "pearson", "spearman"]


@dataclass(frozen=True)
class OfficialSplit:
    """A split as GLUE ships it."""

    split: str
    """Its name in `nyu-mll/glue`: train, validation, validation_matched, validation_mismatched."""
    file: str
    """Its file in a folder of TSVs."""
    rows: int


@dataclass(frozen=True)
class Task:
    """One task. Columns are those of GLUE's TSV files; `hub_sentences` those of `nyu-mll/glue`."""

    name: str
    """GLUE's name, which is also the folder's."""
    hub_name: str
    sentences: tuple[str, ...]
    """One or two columns of text."""
    hub_sentences: tuple[str, ...]
    label: str
    labels: tuple[str, ...]
    """Labels as the files spell them, in the order of the class numbers; none for a score between 0 and 5."""
    hub_labels: tuple[str, ...]
    """The same classes as the hub spells them."""
    metrics: tuple[Metric, ...]
    train: OfficialSplit
    validation: tuple[OfficialSplit, ...]
    epochs: int = 3
    """The paper's; it names 5 for MRPC."""
    header: tuple[str, ...] | None = None
    """Columns of a file that has no header line."""
    csv_quotes: bool = False
    """Fields may be quoted as in CSV, and then hold line ends (not beside tabs); elsewhere a quote is a character."""

    @property
    def is_regression(self) -> bool:
        return not self.labels


def _train(rows: int) -> OfficialSplit:
    return OfficialSplit("train", "train.tsv", rows)


def _dev(rows: int) -> tuple[OfficialSplit, ...]:
    return (OfficialSplit("validation", "dev.tsv", rows),)


_PAIR = ("sentence1", "sentence2")
_ENTAILMENT = ("entailment", "not_entailment")

TASKS: tuple[Task, ...] = (
    Task(
        name="MNLI",
        hub_name="mnli",
        sentences=_PAIR,
        hub_sentences=("premise", "hypothesis"),
        label="gold_label",
        labels=("entailment", "neutral", "contradiction"),
        hub_labels=("entailment", "neutral", "contradiction"),
        metrics=("accuracy",),
        train=_train(392_702),
        validation=(
            OfficialSplit("validation_matched", "dev_matched.tsv", 9_815),
            OfficialSplit("validation_mismatched", "dev_mismatched.tsv", 9_832),
        ),
    ),
    Task(
        name="QQP",
        hub_name="qqp",
        sentences=("question1", "question2"),
        hub_sentences=("question1", "question2"),
        label="is_duplicate",
        labels=("0", "1"),
        hub_labels=("not_duplicate", "duplicate"),
        metrics=("accuracy", "f1"),
        train=_train(363_846),
        validation=_dev(40_430),
        csv_quotes=True,
    ),
    Task(
        name="QNLI",
        hub_name="qnli",
        sentences=("question", "sentence"),
        hub_sentences=("question", "sentence"),
        label="label",
        labels=_ENTAILMENT,
        hub_labels=_ENTAILMENT,
        metrics=("accuracy",),
        train=_train(104_743),
        validation=_dev(5_463),
    ),
    Task(
        name="SST-2",
        hub_name="sst2",
        sentences=("sentence",),
        hub_sentences=("sentence",),
        label="label",
        labels=("0", "1"),
        hub_labels=("negative", "positive"),
        metrics=("accuracy",),
        train=_train(67_349),
        validation=_dev(872),
    ),
    Task(
        name="CoLA",
        hub_name="cola",
        sentences=("sentence",),
        hub_sentences=("sentence",),
        label="label",
        labels=("0", "1"),
        hub_labels=("unacceptable", "acceptable"),
        metrics=("matthews",),
        train=_train(8_551),
        validation=_dev(1_043),
        header=("source", "label", "star", "sentence"),
    ),
    Task(
        name="STS-B",
        hub_name="stsb",
        sentences=_PAIR,
        hub_sentences=_PAIR,
        label="score",
        labels=(),
        hub_labels=(),
        metrics=("pearson", "spearman"),
        train=_train(5_749),
        validation=_dev(1_500),
    ),
    Task(
        name="MRPC",
        hub_name="mrpc",
        sentences=("#1 String", "#2 String"),
        hub_sentences=_PAIR,
        label="Quality",
        labels=("0", "1"),
        hub_labels=("not_equivalent", "equivalent"),
        metrics=("accuracy", "f1"),
        train=_train(3_668),
        validation=_dev(408),
        epochs=5,
    ),
    Task(
        name="RTE",
        hub_name="rte",
        sentences=_PAIR,
        hub_sentences=_PAIR,
        label="label",
        labels=_ENTAILMENT,
        hub_labels=_ENTAILMENT,
        metrics=("accuracy",),
        train=_train(2_490),
        validation=_dev(277),
    ),
    Task(
        name="WNLI",
        hub_name="wnli",
        sentences=_PAIR,
        hub_sentences=_PAIR,
        label="label",
        labels=("0", "1"),
        hub_labels=("not_entailment", "entailment"),
        metrics=("accuracy",),
        train=_train(635),
        validation=_dev(71),
    ),
)

# The paper leaves RTE and WNLI out of its mean; the order is that of the work, the longest first.
SEVEN = ("MNLI", "QQP", "QNLI", "SST-2", "CoLA", "STS-B", "MRPC")


def find_task(name: str, where: str) -> Task:
    """The task of a name; case and hyphens do not matter, so the hub's names (`sst2`) do as well.

    Args:
        name: as the user wrote it.
        where: the setting it stands in, for the error.

    Raises:
        ValueError: no such task; the line names the nearest one.
    """
    by_key = {_key(task.name): task for task in TASKS}
    if _key(name) in by_key:
        return by_key[_key(name)]
    known = [task.name for task in TASKS]
    raise ValueError(f"{where}: {name!r} is no task of GLUE{nearest(name, known)} (known: {', '.join(known)})")


def find_tasks(names: Sequence[str], where: str) -> list[Task]:
    """The tasks of several names, each once, in the order of `TASKS`; errors as for `find_task`."""
    wanted = {find_task(name, where).name for name in names}
    return [task for task in TASKS if task.name in wanted]


def _key(name: str) -> str:
    return name.strip().lower().replace("-", "").replace("_", "")

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
    """One task. Columns are those of GLUE's TSV files, `hub_sentences` those of `nyu-mll/glue`."""

    name: str
    """GLUE's name, which is also the folder's."""
    train: OfficialSplit
    validation: tuple[OfficialSplit, ...]
    labels: tuple[str, ...]
    """Labels as the files spell them, in the order of the class numbers; none for a score between 0 and 5."""
    hub_labels: tuple[str, ...]
    """The same classes as the hub spells them."""
    sentences: tuple[str, ...] = ("sentence1", "sentence2")
    """One or two columns of text."""
    hub_sentences: tuple[str, ...] = ("sentence1", "sentence2")
    label: str = "label"
    metrics: tuple[Metric, ...] = ("accuracy",)
    epochs: int = 3
    """The paper's; it names 5 for MRPC."""
    header: tuple[str, ...] | None = None
    """Columns of a file that has no header line."""
    csv_quotes: bool = False
    """Fields may be quoted as in CSV. A quoted field may hold line ends, but not both line ends and tabs. In files of
    the other tasks a quote is a character like any other."""

    @property
    def hub_name(self) -> str:
        return _key(self.name)

    @property
    def is_regression(self) -> bool:
        return not self.labels


def _train(rows: int) -> OfficialSplit:
    return OfficialSplit("train", "train.tsv", rows)


def _dev(rows: int) -> tuple[OfficialSplit, ...]:
    return (OfficialSplit("validation", "dev.tsv", rows),)


_ENTAILMENT = ("entailment", "not_entailment")
_NLI = ("entailment", "neutral", "contradiction")

TASKS: tuple[Task, ...] = (
    Task(
        name="MNLI",
        train=_train(392_702),
        validation=(
            OfficialSplit("validation_matched", "dev_matched.tsv", 9_815),
            OfficialSplit("validation_mismatched", "dev_mismatched.tsv", 9_832),
        ),
        labels=_NLI,
        hub_labels=_NLI,
        hub_sentences=("premise", "hypothesis"),
        label="gold_label",
    ),
    Task(
        name="QQP",
        train=_train(363_846),
        validation=_dev(40_430),
        labels=("0", "1"),
        hub_labels=("not_duplicate", "duplicate"),
        sentences=("question1", "question2"),
        hub_sentences=("question1", "question2"),
        label="is_duplicate",
        metrics=("accuracy", "f1"),
        csv_quotes=True,
    ),
    Task(
        name="QNLI",
        train=_train(104_743),
        validation=_dev(5_463),
        labels=_ENTAILMENT,
        hub_labels=_ENTAILMENT,
        sentences=("question", "sentence"),
        hub_sentences=("question", "sentence"),
    ),
    Task(
        name="SST-2",
        train=_train(67_349),
        validation=_dev(872),
        labels=("0", "1"),
        hub_labels=("negative", "positive"),
        sentences=("sentence",),
        hub_sentences=("sentence",),
    ),
    Task(
        name="CoLA",
        train=_train(8_551),
        validation=_dev(1_043),
        labels=("0", "1"),
        hub_labels=("unacceptable", "acceptable"),
        sentences=("sentence",),
        hub_sentences=("sentence",),
        metrics=("matthews",),
        header=("source", "label", "star", "sentence"),
    ),
    Task(
        name="STS-B",
        train=_train(5_749),
        validation=_dev(1_500),
        labels=(),
        hub_labels=(),
        label="score",
        metrics=("pearson", "spearman"),
    ),
    Task(
        name="MRPC",
        train=_train(3_668),
        validation=_dev(408),
        labels=("0", "1"),
        hub_labels=("not_equivalent", "equivalent"),
        sentences=("#1 String", "#2 String"),
        label="Quality",
        metrics=("accuracy", "f1"),
        epochs=5,
    ),
    Task("RTE", _train(2_490), _dev(277), _ENTAILMENT, _ENTAILMENT),
    Task("WNLI", _train(635), _dev(71), ("0", "1"), ("not_entailment", "entailment")),
)

# The paper's mean leaves RTE and WNLI out. Ordered by training time, the longest first.
SEVEN = ("MNLI", "QQP", "QNLI", "SST-2", "CoLA", "STS-B", "MRPC")


def find_task(name: str, where: str) -> Task:
    """The task of a name; case and hyphens do not matter, so the hub's names (`sst2`) do as well.

    Raises ValueError, which names the nearest task and the setting (`where`), if there is no such task.
    """
    by_key = {_key(task.name): task for task in TASKS}
    if _key(name) in by_key:
        return by_key[_key(name)]
    known = [task.name for task in TASKS]
    raise ValueError(f"{where}: {name!r} is not a task of GLUE{nearest(name, known)} (known: {', '.join(known)})")


def find_tasks(names: Sequence[str], where: str) -> list[Task]:
    """The tasks of several names, each once, in the order of `TASKS`; errors as for `find_task`."""
    wanted = {find_task(name, where).name for name in names}
    return [task for task in TASKS if task.name in wanted]


def _key(name: str) -> str:
    return name.strip().lower().replace("-", "").replace("_", "")

"""Vocabularies of data and teacher, compared where both are there: whether they are the same, or what they share."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from transformers import PretrainedConfig

from dwt_ds.config.schema import RunConfig
from dwt_ds.data.overlap import Overlap
from dwt_ds.data.prepared import TOKENIZER_FOLDER, PreparedData
from dwt_ds.data.teacher_rows import TeacherTokens
from dwt_ds.data.tokenizer import load_tokenizer
from dwt_ds.models.build import check_row_length, longest_row
from dwt_ds.models.load import load_model_config
from dwt_ds.models.tokenizers import check_same_vocabulary


def find_overlap(
    config: RunConfig, vocab_size: int, teacher: PretrainedConfig, trained_on: str | None = None
) -> tuple[Overlap | None, str]:
    """The overlap and, in words, where it comes from; (None, "") for a teacher with the data folder's vocabulary.

    Without data or teacher everything is taken to be shared. The arguments and errors are those of `measure_overlap`;
    `vocab_size` is the student's.
    """
    if config.teacher.vocabulary == "same":
        return None, ""
    try:
        return measure_overlap(config, teacher, trained_on), "on rows of the data folder"
    except FileNotFoundError:
        entries = min(vocab_size, teacher.vocab_size)
        return Overlap(entries, 1.0, 1.0), "assumed, since data or teacher are missing"


def measure_overlap(config: RunConfig, teacher: PretrainedConfig, trained_on: str | None = None) -> Overlap:
    """On the rows of the data folder.

    Args:
        teacher: its configuration.
        trained_on: the data folder on which the teacher is going to be trained, and whose tokenizer it gets; None: the
            tokenizer is in teacher.path.

    Raises:
        FileNotFoundError: data or teacher are missing.
        ValueError: a damaged data folder, or two tokenizers that share nothing or cannot be compared.
    """
    where = _tokenizer_of_teacher(config, trained_on)
    data = PreparedData.open(config.data.dir)
    tokens = TeacherTokens.of(data.tokenizer(), load_tokenizer(where), longest_row(teacher))
    return Overlap.measure(tokens, data, config.data)


def check_reads_rows(config: RunConfig, seq_len: int, teacher: PretrainedConfig, trained_on: str | None = None) -> None:
    """Refuse a teacher that cannot read the rows of `seq_len` tokens as they are, where `teacher.vocabulary` is same.

    The other arguments are those of `measure_overlap`.

    Raises:
        ValueError: the rows are too long for it, or it has another vocabulary than the data folder.
    """
    if config.teacher.vocabulary != "same":
        return
    check_row_length(f"teacher.path={config.teacher.path!r}", seq_len, longest_row(teacher), "use another model")
    ours = Path(config.data.dir).expanduser() / TOKENIZER_FOLDER
    if ours.is_dir():
        with suppress(FileNotFoundError):  # the teacher's may come later
            where = _tokenizer_of_teacher(config, trained_on)
            check_same_vocabulary(where, load_tokenizer(ours), teacher_rows=teacher.vocab_size)


def _tokenizer_of_teacher(config: RunConfig, trained_on: str | None) -> str:
    if trained_on is not None:
        return str(Path(trained_on).expanduser() / TOKENIZER_FOLDER)
    where = str(config.teacher.path)
    load_model_config(where, trust_remote_code=config.teacher.trust_remote_code)  # asks no hub for a path
    return where

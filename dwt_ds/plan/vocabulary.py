"""What a student shares with a teacher that has a vocabulary of its own: measured where data and teacher are there."""

from __future__ import annotations

from pathlib import Path

from transformers import PretrainedConfig

from dwt_ds.config.schema import RunConfig
from dwt_ds.data.overlap import Overlap
from dwt_ds.data.prepared import TOKENIZER_FOLDER, PreparedData
from dwt_ds.data.teacher_rows import TeacherTokens
from dwt_ds.data.tokenizer import load_tokenizer
from dwt_ds.models.build import longest_row
from dwt_ds.models.load import load_model_config


def find_overlap(
    config: RunConfig, vocab_size: int, teacher: PretrainedConfig, trained_on: str | None = None
) -> tuple[Overlap | None, str]:
    """The overlap and, in words, where it comes from; (None, "") for a teacher with the data folder's vocabulary.

    Without data or teacher everything is taken to be shared. The arguments and errors are those of `measure_overlap`;
    `vocab_size` is the student's.
    """
    if config.teacher.vocabulary == "same" or config.teacher.path is None:
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
    where = str(config.teacher.path) if trained_on is None else Path(trained_on).expanduser() / TOKENIZER_FOLDER
    if trained_on is None:
        load_model_config(str(where), trust_remote_code=config.teacher.trust_remote_code)  # asks no hub for a path
    data = PreparedData.open(config.data.dir)
    tokens = TeacherTokens.of(data.tokenizer(), load_tokenizer(where), longest_row(teacher))
    return Overlap.measure(tokens, data, config.data)

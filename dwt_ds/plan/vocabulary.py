"""What a student shares with a teacher that has a vocabulary of its own: measured where data and teacher are there."""

from __future__ import annotations

from pathlib import Path

from transformers import PretrainedConfig

from dwt_ds.config.schema import RunConfig
from dwt_ds.data.overlap import Overlap
from dwt_ds.data.prepared import TOKENIZER_FOLDER, PreparedData
from dwt_ds.data.teacher_rows import TeacherTokens
from dwt_ds.models.build import longest_row
from dwt_ds.models.load import load_model_config
from dwt_ds.models.vocabulary import load_tokenizer


def find_overlap(
    config: RunConfig, vocab_size: int, teacher: PretrainedConfig, trained_on: str | None = None
) -> tuple[Overlap | None, str]:
    """The overlap and, in words, where it comes from; (None, "") for a teacher with the data folder's vocabulary.

    Without data or teacher everything is taken to be shared.

    Args:
        vocab_size: the student's.
        trained_on: the data folder on which the teacher is going to be trained, and whose tokenizer it gets; None: the
            tokenizer is in teacher.path.

    Raises:
        ValueError: two tokenizers that share nothing, or that cannot be compared.
    """
    if config.teacher.vocabulary == "same" or config.teacher.path is None:
        return None, ""
    where = config.teacher.path if trained_on is None else Path(trained_on).expanduser() / TOKENIZER_FOLDER
    try:
        if trained_on is None:
            load_model_config(where, trust_remote_code=config.teacher.trust_remote_code)  # asks no hub for a path
        data = PreparedData.open(config.data.dir)
        tokens = TeacherTokens.of(data.tokenizer(), load_tokenizer(where), longest_row(teacher))
    except FileNotFoundError:
        entries = min(vocab_size, teacher.vocab_size)
        return Overlap(entries, 1.0, 1.0), "assumed, since data or teacher are missing"
    return Overlap.measure(tokens, data, config.data), "on rows of the data folder"

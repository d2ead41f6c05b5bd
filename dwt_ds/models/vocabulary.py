"""Tokenizers of models. Teacher and student must give every token the same id, or the teacher's logits mean nothing."""

from __future__ import annotations

import os
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dwt_ds.base.words import one_line

_TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model")


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """The highest token id plus one. A model's embedding may have more rows, as padding that no token uses."""
    return max(tokenizer.get_vocab().values()) + 1


def load_tokenizer(path: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder in Hugging Face format, or of a model's name on the hub; `~` is the home folder.

    Raises:
        FileNotFoundError: there is no tokenizer, or it cannot be read.
    """
    where = os.path.expanduser(path)
    if Path(where).is_dir() and not any((Path(where) / name).is_file() for name in _TOKENIZER_FILES):
        raise FileNotFoundError(f"tokenizer path {str(path)!r} holds no tokenizer; copy its tokenizer files there")
    try:
        return AutoTokenizer.from_pretrained(where)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(f"tokenizer path {str(path)!r} cannot be read: {one_line(error)}") from error


def check_same_vocabulary(
    teacher: str | os.PathLike[str], student: PreTrainedTokenizerBase, *, teacher_rows: int
) -> None:
    """Refuse a teacher whose tokenizer does not map the same tokens to the same ids.

    Args:
        teacher: `teacher.path`, from which its tokenizer is loaded.
        student: the data folder's tokenizer.
        teacher_rows: rows of the teacher's decoder; padding may make them more than the tokens.

    Raises:
        ValueError: one line with both numbers of tokens and the first id at which they differ, or too few rows.
        FileNotFoundError: the teacher has no tokenizer.
    """
    theirs, ours = load_tokenizer(teacher).get_vocab(), student.get_vocab()
    if theirs != ours:
        by_id_theirs = {number: token for token, number in theirs.items()}
        by_id_ours = {number: token for token, number in ours.items()}
        ids = sorted(by_id_theirs.keys() | by_id_ours.keys())
        first = next((each for each in ids if by_id_theirs.get(each) != by_id_ours.get(each)), None)
        where = ""
        if first is not None:
            where = f"; first at id {first}: {_shown(by_id_theirs, first)} against {_shown(by_id_ours, first)}"
        raise ValueError(
            f"teacher.path: its vocabulary of {len(theirs)} tokens is not the {len(ours)} of the data folder{where}; "
            "prepare the data with the teacher's tokenizer, or train the teacher on this data"
        )
    size = vocabulary_size(student)
    if teacher_rows < size:
        raise ValueError(
            f"teacher.path: its decoder has {teacher_rows} rows for a vocabulary of {size}; give the model that "
            "belongs to its tokenizer"
        )


def _shown(by_id: dict[int, str], number: int) -> str:
    return repr(by_id[number]) if number in by_id else "nothing"

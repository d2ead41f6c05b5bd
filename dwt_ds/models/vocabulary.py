"""Whether two tokenizers give every token the same number: a teacher's logits mean nothing to a student otherwise."""

from __future__ import annotations

import os
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dwt_ds.base.words import one_line
from dwt_ds.models.build import without_tilde

_TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model")


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """The highest token id plus one. A model's embedding may have more rows, as padding that no token uses."""
    return max(tokenizer.get_vocab().values()) + 1


def load_tokenizer(path: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder in Hugging Face format, or of a model's name there.

    Raises:
        FileNotFoundError: the folder holds no tokenizer.
    """
    where = without_tilde(path)
    folder = Path(where)
    if folder.is_dir() and not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise FileNotFoundError(f"tokenizer path {str(path)!r} holds no tokenizer; copy its tokenizer files there")
    try:
        return AutoTokenizer.from_pretrained(where)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(f"tokenizer path {str(path)!r} cannot be read: {one_line(error)}") from error


def check_same_vocabulary(
    teacher: PreTrainedTokenizerBase | str | os.PathLike[str],
    student: PreTrainedTokenizerBase,
    *,
    teacher_rows: int | None = None,
    teacher_name: str = "teacher.path",
    student_name: str = "the data folder",
) -> int:
    """Checks that both map the same tokens to the same ids, by content and not by size.

    Args:
        teacher: its tokenizer, or the folder or name to load it from.
        student: the data folder's tokenizer.
        teacher_rows: rows of the teacher's decoder, which may exceed the vocabulary but not fall short of it.
        teacher_name, student_name: how the error calls them.

    Returns:
        The true vocabulary size, which a padded embedding exceeds.

    Raises:
        ValueError: they differ; one line with both counts and the first token id where they do.
        FileNotFoundError: the teacher's folder holds no tokenizer.
    """
    if not isinstance(teacher, PreTrainedTokenizerBase):
        teacher = load_tokenizer(teacher)
    size = vocabulary_size(student)
    theirs, ours = teacher.get_vocab(), student.get_vocab()
    if theirs != ours:
        by_id_theirs = {number: token for token, number in theirs.items()}
        by_id_ours = {number: token for token, number in ours.items()}
        ids = sorted(by_id_theirs.keys() | by_id_ours.keys())
        first = next((each for each in ids if by_id_theirs.get(each) != by_id_ours.get(each)), None)
        where = (
            ""
            if first is None
            else f"; first at id {first}: {_shown(by_id_theirs, first)} against {_shown(by_id_ours, first)}"
        )
        raise ValueError(
            f"{teacher_name}: its vocabulary of {len(theirs)} tokens is not the {len(ours)} of {student_name}{where}; "
            "prepare the data with the teacher's tokenizer, or train the teacher on this data"
        )
    if teacher_rows is not None and teacher_rows < size:
        raise ValueError(
            f"{teacher_name}: its decoder has {teacher_rows} rows for a vocabulary of {size}; give the model that "
            "belongs to its tokenizer"
        )
    return size


def _shown(by_id: dict[int, str], number: int) -> str:
    return repr(by_id[number]) if number in by_id else "nothing"

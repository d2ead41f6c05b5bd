from __future__ import annotations

from pathlib import Path

import pytest
from transformers import BertTokenizerFast

from dwt_ds.models.tokenizers import check_same_vocabulary

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat", "##s"]


def tokenizer(folder: Path, words: list[str]) -> BertTokenizerFast:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    made = BertTokenizerFast(str(folder / "vocab.txt"))
    made.save_pretrained(folder)
    return made


def test_the_same_words_pass_even_with_a_padded_decoder(tmp_path: Path) -> None:
    tokenizer(tmp_path / "teacher", WORDS)
    check_same_vocabulary(tmp_path / "teacher", tokenizer(tmp_path / "student", WORDS), teacher_rows=16)


def test_the_same_size_with_other_words_is_an_error(tmp_path: Path) -> None:
    student = tokenizer(tmp_path / "student", WORDS)
    tokenizer(tmp_path / "teacher", [*WORDS[:6], "sat", "cat", "##s"])
    counts = "^teacher.path: its vocabulary of 9 tokens is not the 9 of the data folder"
    with pytest.raises(ValueError, match=f"{counts}; first at id 6: 'sat' against 'cat'; ") as caught:
        check_same_vocabulary(tmp_path / "teacher", student, teacher_rows=9)
    assert "\n" not in str(caught.value)


def test_a_longer_vocabulary_is_an_error_that_gives_both_counts(tmp_path: Path) -> None:
    student = tokenizer(tmp_path / "student", WORDS)
    tokenizer(tmp_path / "teacher", [*WORDS, "mat"])
    with pytest.raises(ValueError, match="of 10 tokens is not the 9 of .*first at id 9: 'mat' against nothing"):
        check_same_vocabulary(tmp_path / "teacher", student, teacher_rows=10)


def test_the_error_names_shared_entries_as_a_way_out_where_there_are_some(tmp_path: Path) -> None:
    student = tokenizer(tmp_path / "student", WORDS)
    tokenizer(tmp_path / "teacher", [*WORDS[:5], "sat", "cat", "dog"])
    way_out = "or set teacher.vocabulary=shared: 50% of the data folder's entries are the teacher's too$"
    with pytest.raises(ValueError, match=way_out) as caught:
        check_same_vocabulary(tmp_path / "teacher", student, teacher_rows=8)
    assert "\n" not in str(caught.value)
    tokenizer(tmp_path / "other", [*WORDS[:5], "der", "hund"])
    with pytest.raises(ValueError, match="or train the teacher on this data$"):
        check_same_vocabulary(tmp_path / "other", student, teacher_rows=7)


def test_a_decoder_with_too_few_rows_is_an_error(tmp_path: Path) -> None:
    student = tokenizer(tmp_path / "student", WORDS)
    with pytest.raises(ValueError, match="decoder has 8 rows for a vocabulary of 9"):
        check_same_vocabulary(tmp_path / "student", student, teacher_rows=8)


def test_a_folder_without_a_tokenizer_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no tokenizer"):
        check_same_vocabulary(tmp_path, tokenizer(tmp_path / "student", WORDS), teacher_rows=9)

"""Entries that two vocabularies share."""

from __future__ import annotations

import numpy as np
import pytest
from harness.languages import SPECIAL, with_roles
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, PythonBackend

from dwt_ds.data.shared_vocabulary import SharedVocabulary
from dwt_ds.prepare.case_and_accents import Treatment
from dwt_ds.prepare.tokenizer import BERT_SPECIAL_TOKENS, wordpiece_tokenizer


def numbered(entries: list[str]) -> dict[str, int]:
    return {entry: index for index, entry in enumerate(entries)}


def wordpiece(*entries: str) -> PreTrainedTokenizerBase:
    return wordpiece_tokenizer(numbered([*BERT_SPECIAL_TOKENS.values(), *entries]), Treatment(False, False))


def bpe(*entries: str) -> PreTrainedTokenizerBase:
    """Byte-level; every entry a unit that no merge makes."""
    tokenizer = Tokenizer(models.BPE(numbered([*SPECIAL, *entries]), []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    return with_roles(tokenizer)


def unigram(*entries: str) -> PreTrainedTokenizerBase:
    pieces = [(entry, -1.0) for entry in [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *entries]]
    tokenizer = Tokenizer(models.Unigram(pieces, SPECIAL.index("<unk>"), byte_fallback=True))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.add_special_tokens(SPECIAL)
    return with_roles(tokenizer)


def end_of_word(*entries: str) -> PreTrainedTokenizerBase:
    model = models.BPE(numbered([*SPECIAL, *entries]), [], unk_token="<unk>", end_of_word_suffix="</w>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Whitespace(), decoders.BPEDecoder()
    tokenizer.add_special_tokens(SPECIAL)
    return with_roles(tokenizer)


def pairs(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> set[tuple[str, str]]:
    shared = SharedVocabulary.of(student, teacher)
    ours = student.convert_ids_to_tokens(shared.student_ids.tolist())
    theirs = teacher.convert_ids_to_tokens(shared.teacher_ids.tolist())
    assert shared.student_ids.dtype == shared.teacher_ids.dtype == np.int64
    assert len(set(ours)) == len(set(theirs)) == len(ours)
    assert shared.student_ids.tolist() == sorted(shared.student_ids.tolist())
    index_of = shared.shared_index_of_student
    assert index_of[shared.student_ids].tolist() == list(range(len(ours)))
    assert (index_of >= 0).sum() == len(ours)
    return set(zip(ours, theirs, strict=True))


WORDS = wordpiece("the", "The", "##ing", "ing", ",", "##,", "(", "中", "##é", "a", "##zz", "only")
BYTES = bpe("Ġthe", "the", "ing", "Ġing", ",", "Ġ,", "Ġ(", "(", "ä¸Ń", "Ġä¸Ń", "Ã©", "Ã", "Ġ", "ĠThe", "a")
PIECES = unigram("▁the", "the", "ing", "▁ing", ",", "▁(", "中", "é", "▁", "▁The", "a", "b")


def test_wordpiece_and_byte_level_bpe() -> None:
    expected = {("the", "Ġthe"), ("The", "ĠThe"), ("##ing", "ing"), ("ing", "Ġing"), (",", ",")}
    expected |= {("(", "Ġ("), ("中", "ä¸Ń"), ("##é", "Ã©")}
    assert pairs(WORDS, BYTES) == expected
    assert pairs(BYTES, WORDS) == {(there, here) for here, there in expected}
    shared = SharedVocabulary.of(WORDS, BYTES)
    assert shared.share_of_student == 8 / 12
    assert shared.share_of_teacher == 8 / 15
    assert len(shared.shared_index_of_student) == 17


def test_wordpiece_and_unigram() -> None:
    expected = {("the", "▁the"), ("The", "▁The"), ("##ing", "ing"), ("ing", "▁ing"), (",", ",")}
    assert pairs(WORDS, PIECES) == expected | {("(", "▁("), ("中", "中"), ("##é", "é")}


def test_byte_level_bpe_and_unigram() -> None:
    expected = {("Ġthe", "▁the"), ("the", "the"), ("ing", "ing"), ("Ġing", "▁ing"), (",", ","), ("Ġ(", "▁(")}
    assert pairs(BYTES, PIECES) == expected | {("ä¸Ń", "中"), ("Ã©", "é"), ("ĠThe", "▁The"), ("a", "a")}


def test_the_same_tokenizer_shares_all_but_parts_of_characters() -> None:
    assert pairs(BYTES, BYTES) == {(entry, entry) for entry in BYTES.get_vocab() if entry not in (*SPECIAL, "Ã", "Ġ")}


def test_an_end_of_word_makes_a_word() -> None:
    teacher = end_of_word("the</w>", "the", ",</w>", "ing</w>", "The")
    assert pairs(WORDS, teacher) == {("the", "the</w>"), (",", ",</w>"), ("ing", "ing</w>")}


def test_added_and_special_tokens_are_not_shared() -> None:
    teacher = bpe("Ġthe", "Ġa")
    teacher.add_tokens([AddedToken("zz")])
    assert pairs(WORDS, teacher) == {("the", "Ġthe"), ("a", "Ġa")}


def test_nothing_in_common() -> None:
    with pytest.raises(ValueError, match="no entry in common") as error:
        SharedVocabulary.of(wordpiece("the"), bpe("Ġle"))
    assert "\n" not in str(error.value)


class SlowTokenizer(PythonBackend):
    """One that Python code makes tokens with."""

    vocab_size = 1

    def get_vocab(self) -> dict[str, int]:
        return {"a": 0}


def test_tokenizers_that_cannot_be_used() -> None:
    keeps_no_spaces = Tokenizer(models.BPE(numbered(["a", "b"]), []))
    keeps_no_spaces.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=keeps_no_spaces)
    for arguments, message in (
        ((WORDS, SlowTokenizer()), "the teacher's tokenizer is not a fast tokenizer"),
        ((SlowTokenizer(), WORDS), "the data folder's tokenizer is not a fast tokenizer"),
        ((tokenizer, WORDS), r"tokens of the data folder's tokenizer \(BPE\) do not give their text back"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            SharedVocabulary.of(*arguments)
        assert "\n" not in str(error.value)

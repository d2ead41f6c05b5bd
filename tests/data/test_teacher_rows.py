"""A teacher with a tokenizer of its own: its rows hold the student's text, and say which words both have."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
from harness.teacher_rows import LATIN, NONE, Pair, row_of, squeezed, tokenizer_of, without_accents
from tokenizers import Tokenizer, models, processors, trainers
from transformers import PreTrainedTokenizerFast

from dwt_ds.data.teacher_rows import TeacherRows, TeacherTokens
from dwt_ds.prepare.case_and_accents import Wishes


def test_rows_hold_the_text(pair: Pair) -> None:
    rows = pair.teacher_rows(NONE)
    assert len(rows.aligned) == len(rows.positions) == 0
    for row, (ids, length) in enumerate(zip(pair.ids.tolist(), pair.lengths.tolist(), strict=True)):
        theirs = row_of(rows, row)
        assert without_accents(squeezed(pair.teacher, theirs)) == without_accents(squeezed(pair.student, ids[:length]))
        assert (theirs[0], theirs[-1]) == (pair.teacher.cls_token_id, pair.teacher.sep_token_id)
        documents = ids[1 : length - 1].count(pair.student.sep_token_id)
        assert theirs[1:-1].count(pair.teacher.sep_token_id) == documents


def test_rows_are_the_teachers_own_tokens(pairs: Any) -> None:
    """Where the student's tokens keep spaces, a row is what the teacher's tokenizer makes of its text."""
    for name in ("Unigram to WordPiece", "byte-level BPE to Unigram", "Chinese characters to byte-level BPE"):
        pair = pairs(name)
        rows, alike = pair.teacher_rows(NONE), 0
        for row, (ids, length) in enumerate(zip(pair.ids.tolist(), pair.lengths.tolist(), strict=True)):
            inside = ids[1 : length - 1]
            if pair.student.sep_token_id not in inside:
                text = pair.student.decode(inside, clean_up_tokenization_spaces=False)
                alike += 1
                assert row_of(rows, row) == pair.teacher(text)["input_ids"]
        assert alike > 5


def test_words_that_both_rows_have(pair: Pair) -> None:
    """Their tokens have the same text but where one tokenizer takes two words for one."""
    words = (rows := pair.teacher_rows(NONE)).words
    assert set(words.ours.unique().tolist()) == set(words.theirs.unique().tolist()) == set(range(words.total + 1))
    assert words.ours.shape == pair.ids.shape
    assert words.theirs.shape == rows.input_ids.shape
    alike = 0
    for row in range(len(words.ours)):
        for word in words.ours[row].unique().tolist():
            ours = pair.ids[row][words.ours[row].numpy() == word].tolist()
            theirs = rows.input_ids[row][words.theirs[row] == word].tolist()
            texts = [without_accents(squeezed(*each)) for each in ((pair.student, ours), (pair.teacher, theirs))]
            # In Chinese a piece of several characters is in the word that is the first of them.
            alike += word > 0 and (texts[1].startswith(texts[0]) or texts[0].startswith(texts[1]))
    assert alike > 0.9 * words.total


def test_a_packed_row_continues_its_text_with_a_space(one: Pair) -> None:
    """In byte-level BPE the space is part of the word; a document that begins inside a row has none."""

    def firsts(rows: TeacherRows, after: int) -> set[str]:
        """How the words after this token begin."""
        ids = rows.input_ids.flatten()
        found = one.teacher.convert_ids_to_tokens(ids[1:][ids[:-1] == after].tolist())
        return {token[0] for token in found if token[0] == "Ġ" or token[0].isalpha()}

    cls, sep = one.teacher.cls_token_id, one.teacher.sep_token_id
    plain = one.teacher_rows(NONE)
    assert "Ġ" not in firsts(plain, cls) | firsts(plain, sep)
    rows = one.tokens.rows(one.ids, one.lengths, NONE, NONE, one.starts, continued=True)
    assert "Ġ" in firsts(rows, cls)
    assert "Ġ" not in firsts(rows, sep)
    batches = [batch.teacher for step in range(9) for batch in one.batches()[step]]
    assert any(each is not None and "Ġ" in firsts(each, cls) for each in batches)


@pytest.mark.parametrize("longest", [40, 20, 4])
def test_longer_rows_are_cut_at_a_word(one: Pair, longest: int) -> None:
    masked = one.masked()
    whole, plain = one.teacher_rows(masked.positions), one.teacher_rows(NONE)
    tokens = TeacherTokens.of(one.student, one.teacher, longest)
    cut = tokens.rows(one.ids, one.lengths, masked.positions, one.all_masked(masked.positions), one.starts)
    assert cut.input_ids.shape[1] <= longest
    assert whole.input_ids.shape[1] > longest
    assert len(cut.aligned) < len(whole.aligned)
    kept = []
    for row in range(len(one.rows)):
        long, short = row_of(whole, row), row_of(cut, row)
        if len(long) <= longest:
            assert short == long
            limit = len(long)
        else:
            assert short == [*long[: len(short) - 1], one.teacher.sep_token_id]
            limit = len(short) - 1
            true = row_of(plain, row)
            if longest > 4:  # a word that starts with a space, a line end or a mark
                first = one.teacher.decode([true[limit]])
                assert not first[0].isalnum() or not one.teacher.decode([true[limit - 1]])[-1].isalnum()
                assert limit > longest - 12
        width = whole.input_ids.shape[1]
        of_row = (whole.positions // width == row) & (whole.positions % width < limit)
        kept += whole.aligned[of_row].tolist()
    assert cut.aligned.tolist() == kept


def test_unknown_words_are_unknown_to_the_teacher_too(one: Pair) -> None:
    student, teacher = one.student, one.teacher
    ids = np.array([student("loka \u2603 mi.")["input_ids"]])
    assert (ids == student.unk_token_id).sum() == 1
    starts = ~one.data.facts.continues_word[ids]  # type: ignore[index]
    rows = one.tokens.rows(ids, np.array([ids.shape[1]]), NONE, NONE, starts)
    [there] = rows.input_ids.tolist()
    before, after = (teacher(text, add_special_tokens=False)["input_ids"] for text in ("loka", " mi."))
    assert there == [teacher.cls_token_id, *before, teacher.unk_token_id, *after, teacher.sep_token_id]


def test_a_row_may_begin_and_end_inside_a_character(pairs: Any) -> None:
    pair = pairs("byte-level BPE to Unigram")
    euro = pair.student("\u20ac", add_special_tokens=False)["input_ids"]
    assert len(euro) == 3
    word = pair.student(" loka", add_special_tokens=False)["input_ids"]
    ids = np.array([[pair.student.cls_token_id, *euro[1:], *word, *euro[:2], pair.student.sep_token_id]])
    starts = np.zeros(ids.shape, dtype=bool)
    starts[:, [0, 1, 3, 3 + len(word), -1]] = True
    rows = pair.tokens.rows(ids, np.array([ids.shape[1]]), np.array([4]), pair.all_masked(np.array([4])), starts)
    text = pair.teacher.decode(rows.input_ids[0].tolist(), skip_special_tokens=False)
    assert "loka" not in text
    assert squeezed(pair.teacher, rows.input_ids[0].tolist()) == ""
    plain = pair.tokens.rows(ids, np.array([ids.shape[1]]), NONE, NONE, starts)
    assert squeezed(pair.teacher, plain.input_ids[0].tolist()) == "loka"


def test_bytes_of_unknown_characters_are_hidden_by_character(pairs: Any) -> None:
    """The teacher's tokenizer says of each of them that it stands for both."""
    pair = pairs("byte-level BPE to Unigram")
    ids = np.array([pair.student("\u4e2d\u6587")["input_ids"]])
    assert ids.shape == (1, 8)
    starts = np.isin(np.arange(8), [0, 1, 4, 7])[None]
    labelled = np.array([5])
    [shown] = pair.tokens.rows(ids, np.array([8]), labelled, pair.all_masked(labelled), starts).input_ids.tolist()
    of_first = [f"<0x{byte:02X}>" for byte in "\u4e2d".encode()]
    there = pair.teacher.convert_ids_to_tokens(shown)
    assert there == ["<s>", "\u2581", *of_first, "<mask>", "<mask>", "<mask>", "</s>"]


def test_a_teacher_that_can_spell_dna_alone() -> None:
    """Any other text it reads as nothing: it has no unknown token, nor one for padding."""
    dna = Tokenizer(models.BPE())
    special = ["<s>", "</s>", "<pad>", "<mask>"]
    dna.train_from_iterator(["ACGTTGCA", "GATTACA"], trainers.BpeTrainer(vocab_size=12, special_tokens=special))
    frame = [("<s>", 0), ("</s>", 1)]
    dna.post_processor = processors.TemplateProcessing(single="<s> <s> $A </s>", special_tokens=frame)
    teacher = PreTrainedTokenizerFast(tokenizer_object=dna, cls_token="<s>", sep_token="</s>", mask_token="<mask>")
    student = tokenizer_of(LATIN, "bpe", 700, Wishes())
    *text, end = student("GATTACA aaa")["input_ids"]
    ids = np.array([[*text, student.unk_token_id, end]])
    rows = TeacherTokens.of(student, teacher, None).rows(
        ids, np.array([ids.shape[1]]), NONE, NONE, np.ones(ids.shape, dtype=bool)
    )
    spelled = teacher("GATTACA", add_special_tokens=False)["input_ids"]
    assert rows.input_ids.tolist() == [[0, 0, *spelled, teacher.mask_token_id, 1]]


def test_a_teacher_that_cannot_be_used() -> None:
    student = tokenizer_of(LATIN, "wordpiece", 500, Wishes())
    teacher = tokenizer_of(LATIN, "bpe", 700, Wishes())
    without_mask = pickle.loads(pickle.dumps(teacher))
    without_mask.mask_token = None
    with pytest.raises(ValueError, match="the teacher's tokenizer has no mask token") as error:
        TeacherTokens.of(student, without_mask, 64)
    assert "\n" not in str(error.value)

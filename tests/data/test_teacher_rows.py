"""A teacher with a tokenizer of its own: its rows hide the words that the student's hide, and say where both agree."""

from __future__ import annotations

import pickle
import random
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness.corpus import Make, made_up_documents
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from dwt_ds.config.schema import DataConfig
from dwt_ds.data.batches import Batch, StepBatches, validation_batches
from dwt_ds.data.masks import MaskedRows, draw_masks
from dwt_ds.data.teacher_rows import CommonWords, TeacherRows, TeacherTokens
from dwt_ds.prepare.case_and_accents import Wishes
from dwt_ds.prepare.train_tokenizer import train_tokenizer

CASED = Wishes(cased=True)
LATIN, CHINESE = "latin", "chinese"
# name -> (text, student's kind, entries and wishes, teacher's)
PAIRS: dict[str, tuple[str, tuple[str, int, Wishes], tuple[str, int, Wishes]]] = {
    "WordPiece uncased to byte-level BPE": (LATIN, ("wordpiece", 500, Wishes()), ("bpe", 700, Wishes())),
    "cased to uncased": (LATIN, ("wordpiece", 500, CASED), ("wordpiece", 400, Wishes())),
    "small to large": (LATIN, ("wordpiece", 300, Wishes()), ("wordpiece", 700, Wishes())),
    "Unigram to WordPiece": (LATIN, ("unigram", 600, Wishes()), ("wordpiece", 500, Wishes())),
    "byte-level BPE to Unigram": (LATIN, ("bpe", 600, Wishes()), ("unigram", 600, Wishes())),
    "Chinese characters to byte-level BPE": (CHINESE, ("characters", 400, Wishes()), ("bpe", 700, Wishes())),
    "Chinese WordPiece to byte-level BPE": (CHINESE, ("wordpiece", 600, Wishes()), ("bpe", 700, Wishes())),
}
# Without labels.
NONE = np.zeros(0, dtype=np.int64)


@lru_cache
def text_of(language: str) -> str:
    """Lines of some 20 words with capitals, accents, quotes, numbers and contractions; or of Chinese words."""
    draw = random.Random(3)
    if language == CHINESE:
        words = ["".join(chr(0x4E00 + draw.randrange(150)) for _ in range(draw.randint(1, 3))) for _ in range(300)]
        sentences = ["".join(draw.choices(words, k=draw.randint(6, 14))) + draw.choice("。！？") for _ in range(500)]
        return "\n\n".join("\n".join(sentences[k : k + 5]) for k in range(0, 500, 5))

    def changed(word: str) -> str:
        variants = [f"{word}'s", f'"{word}"', f"({word}),", "3,450.5", word.replace("e", "é")]
        return draw.choice([word, word, word, *variants])

    documents = made_up_documents(40)
    lines = [[" ".join(map(changed, line.split(" "))) for line in document] for document in documents]
    return "\n\n".join("\n".join(document) for document in lines)


@lru_cache
def tokenizer_of(language: str, kind: Any, entries: int, wishes: Wishes) -> PreTrainedTokenizerBase:
    return train_tokenizer(text_of(language).split("\n"), entries, kind, wishes)


class Pair:
    """A student's data and a teacher's tokenizer, with all training rows and their masks."""

    def __init__(self, name: str, folder: Path, make: Make, longest_row: int | None = None) -> None:
        language, ours, theirs = PAIRS[name]
        tokenizer_of(language, *ours).save_pretrained(folder / "tokenizer")
        (folder / "text.txt").write_text(text_of(language), encoding="utf-8")
        self.data = make(folder / "data", folder / "text.txt", tokenizer=str(folder / "tokenizer"), seq_len=64)
        self.student, self.teacher = self.data.tokenizer(), tokenizer_of(language, *theirs)
        self.tokens = TeacherTokens.of(self.student, self.teacher, longest_row)
        self.rows = np.arange(min(len(self.data.train), 20))
        self.ids, self.lengths = self.data.train.rows(self.rows, 64)
        self.starts = self.data.train.starts_word(self.rows, 64)

    def masked(self) -> MaskedRows:
        return draw_masks(self.ids, self.lengths, self.rows, self.rows * 0, self.data.facts, DataConfig(), 1)

    def teacher_rows(self, positions: np.ndarray, shown: np.ndarray | None = None) -> TeacherRows:
        """shown: what the student sees there; None: its mask token."""
        return self.tokens.rows(self.ids, self.lengths, positions, self.all_masked(positions, shown), self.starts)

    def all_masked(self, positions: np.ndarray, shown: np.ndarray | None = None) -> np.ndarray:
        return np.full(len(positions), self.student.mask_token_id) if shown is None else shown

    def batches(self, workers: int = 0, teacher: bool = True) -> StepBatches:
        return StepBatches(
            self.data.train,
            self.data.facts,
            DataConfig(),
            seed=3,
            micro_batch_size=2,
            accumulation=2,
            rank=0,
            world_size=1,
            teacher_tokens=self.tokens if teacher else None,
        )


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory, make: Make) -> Any:
    @lru_cache
    def pair(name: str) -> Pair:
        return Pair(name, tmp_path_factory.mktemp("pair"), make)

    return pair


@pytest.fixture(params=PAIRS)
def pair(request: pytest.FixtureRequest, pairs: Any) -> Pair:
    return pairs(request.param)


@pytest.fixture
def one(pairs: Any) -> Pair:
    return pairs("WordPiece uncased to byte-level BPE")


def squeezed(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """The text of tokens without its spaces, in lower case; special tokens left out."""
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return "".join(text.split()).removeprefix("##").lower()


@lru_cache(maxsize=1000)
def spans(tokenizer: PreTrainedTokenizerBase, ids: tuple[int, ...]) -> list[tuple[int, int]]:
    """The place of each token in the row's squeezed text: from the whole characters before it to those up to it, the
    one of which it has a part among them."""
    texts = [squeezed(tokenizer, list(ids[:count])) for count in range(len(ids) + 1)]
    whole = [len(text.rstrip("\ufffd")) for text in texts]
    begun = [count + text.endswith("\ufffd") for count, text in zip(whole, texts, strict=True)]
    return list(zip(whole, begun[1:], strict=False))


def row_of(rows: TeacherRows, row: int) -> list[int]:
    ids = rows.input_ids[row]
    return ids.tolist() if rows.attention_mask is None else ids[rows.attention_mask[row].bool()].tolist()


def without_accents(text: str) -> str:
    return text.replace("é", "e")


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


def test_aligned_tokens_are_whole_words_and_one_shared_entry(pair: Pair) -> None:
    masked = pair.masked()
    plain, rows = pair.teacher_rows(NONE), pair.teacher_rows(masked.positions)
    shared = pair.tokens.shared
    assert torch.equal(rows.aligned, rows.aligned.sort().values)
    assert torch.equal(rows.positions, rows.positions.sort().values)
    assert 0.2 < len(rows.aligned) / len(masked.labels) <= 1
    true, shown = plain.input_ids.reshape(-1), rows.input_ids.reshape(-1)
    found = {}
    for aligned, position in zip(rows.aligned.tolist(), rows.positions.tolist(), strict=True):
        index = shared.shared_index_of_student[masked.labels[aligned]]
        assert index >= 0
        assert shared.student_ids[index] == masked.labels[aligned]
        assert true[position] == shared.teacher_ids[index]
        assert shown[position] == pair.teacher.mask_token_id
        found[masked.positions[aligned]] = position
    width, width_there = pair.ids.shape[1], plain.input_ids.shape[1]
    for row, (ids, length) in enumerate(zip(pair.ids.tolist(), pair.lengths.tolist(), strict=True)):
        theirs = row_of(plain, row)
        at = {span: column for column, span in enumerate(spans(pair.teacher, tuple(theirs))) if span[0] < span[1]}
        ours = spans(pair.student, tuple(ids[:length]))
        starts = [*pair.starts[row, :length].tolist(), True]
        for column in range(length):
            place = row * width + column
            there = at.get(ours[column])
            is_word = starts[column] and starts[column + 1] and ours[column][0] < ours[column][1]
            index = shared.shared_index_of_student[ids[column]]
            expected = is_word and index >= 0 and there is not None and theirs[there] == shared.teacher_ids[index]
            if place in masked.positions:
                assert found.get(place) == (row * width_there + there if expected else None)


def test_a_random_token_that_is_not_shared_is_some_entry_of_the_teacher(one: Pair) -> None:
    shared = one.tokens.shared
    words = np.flatnonzero(one.starts[:, :-1] & one.starts[:, 1:] & (one.ids[:, :-1] >= 5))
    positions = words[:3] // 63 * 64 + words[:3] % 63
    plain = one.teacher_rows(NONE)
    for token in (int(shared.student_ids[-1]), int(np.flatnonzero(shared.shared_index_of_student < 0)[-1])):
        rows = one.teacher_rows(positions, np.full(3, token))
        changed = rows.input_ids[plain.input_ids != rows.input_ids]
        assert len(set(changed.tolist())) == 1
        assert changed[0] in shared.teacher_ids
        index = shared.shared_index_of_student[token]
        assert index < 0 or changed[0] == shared.teacher_ids[index]


def test_a_word_with_a_masked_token_is_masked_whatever_the_student_sees_of_the_rest(one: Pair) -> None:
    flat, starts = one.ids.reshape(-1), one.starts.reshape(-1)
    first = int(np.flatnonzero(starts[:-1] & ~starts[1:])[0])
    positions, mask = np.array([first, first + 1]), one.student.mask_token_id
    masked = one.teacher_rows(positions)
    for shown in ([mask, flat[first + 1]], [flat[first], mask], [mask, flat[5]], [flat[5], mask]):
        assert torch.equal(one.teacher_rows(positions, np.array(shown)).input_ids, masked.input_ids)


def test_a_row_is_the_same_in_any_batch(pair: Pair) -> None:
    masked = pair.masked()
    together = pair.teacher_rows(masked.positions)
    width, width_there = 64, together.input_ids.shape[1]
    for row in range(0, len(pair.rows), 3):
        here = masked.positions[masked.positions // width == row] % width
        length = pair.lengths[row : row + 1]
        one_row = pair.ids[row : row + 1], length, here, pair.all_masked(here), pair.starts[row : row + 1]
        alone = pair.tokens.rows(*one_row)
        assert alone.attention_mask is None
        assert alone.input_ids[0].tolist() == row_of(together, row)
        of_row = together.positions // width_there == row
        assert torch.equal(alone.positions, together.positions[of_row] % width_there)


def test_the_students_batches_are_the_same_with_a_teacher(one: Pair) -> None:
    for step in range(30):
        without = one.batches().without_teacher()[step]
        for ours, plain, after in zip(one.batches()[step], one.batches(teacher=False)[step], without, strict=True):
            assert plain.teacher is None
            assert_equal(after, plain)
            assert ours.teacher is not None
            assert len(ours.teacher.input_ids) == len(ours.input_ids)
            assert_equal(ours._replace(teacher=None), plain)
    options: dict[str, Any] = {"micro_batch_size": 4, "rank": 0, "world_size": 1}
    arguments = one.data.validation, one.data.facts, DataConfig()
    held_out = list(validation_batches(*arguments, **options, teacher_tokens=one.tokens))
    for ours, plain in zip(held_out, validation_batches(*arguments, **options), strict=True):
        assert ours.teacher is not None
        assert_equal(ours._replace(teacher=None), plain)


def test_a_rank_without_rows_has_teacher_rows_without_positions(one: Pair) -> None:
    options: dict[str, Any] = {"micro_batch_size": 4, "world_size": 64, "rank": 63, "teacher_tokens": one.tokens}
    [batch] = validation_batches(one.data.validation, one.data.facts, DataConfig(), **options)
    assert batch.token_count == 0
    assert batch.teacher is not None
    assert batch.teacher.input_ids.shape[0] == 1
    assert len(batch.teacher.positions) == len(batch.teacher.aligned) == 0


def test_a_loader_process_makes_the_same_batches(one: Pair) -> None:
    steps = one.batches()
    loader = DataLoader(steps, batch_size=None, sampler=range(4, 8), num_workers=1)  # type: ignore[arg-type]
    copied = pickle.loads(pickle.dumps(steps))
    for step, loaded in zip(range(4, 8), loader, strict=True):
        for here, there, again in zip(steps[step], loaded, copied[step], strict=True):
            assert_equal(here, there)
            assert_equal(here, again)
            assert there.teacher.input_ids.dtype == there.teacher.aligned.dtype == torch.int64


def test_a_batch_moves_with_its_teacher_rows(one: Pair) -> None:
    moved = one.batches()[0][0].to(torch.device("meta")).teacher
    assert moved is not None
    tensors = [*moved[:-1], moved.words.ours, moved.words.theirs]
    assert {each.device.type for each in tensors if each is not None} == {"meta"}


def assert_equal(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, (Batch, TeacherRows, CommonWords)):
        for ours, theirs in zip(one, other, strict=True):
            assert_equal(ours, theirs)
    else:
        assert one == other


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


def test_old_folders_without_words_need_wordpiece(pairs: Any, one: Pair) -> None:
    bpe = pairs("byte-level BPE to Unigram")
    for pair in (one, bpe):
        pair.data.train.knows_words = False
    try:
        assert one.batches()[0][0].teacher is not None
        with pytest.raises(ValueError, match="vocabulary=shared: this data folder does not say where words start"):
            bpe.batches()
    finally:
        for pair in (one, bpe):
            pair.data.train.knows_words = True


def test_a_teacher_that_cannot_be_used() -> None:
    student = tokenizer_of(LATIN, "wordpiece", 500, Wishes())
    teacher = tokenizer_of(LATIN, "bpe", 700, Wishes())
    without_mask = pickle.loads(pickle.dumps(teacher))
    without_mask.mask_token = None
    with pytest.raises(ValueError, match="the teacher's tokenizer has no mask token") as error:
        TeacherTokens.of(student, without_mask, 64)
    assert "\n" not in str(error.value)

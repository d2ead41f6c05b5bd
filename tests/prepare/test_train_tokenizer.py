"""Tokenizers trained on text: the same every time, of every kind, for every script."""

from __future__ import annotations

import hashlib
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from harness.corpus import made_up_documents
from transformers import AutoTokenizer

from dwt_ds.data.tokenizer import TokenizerFacts, tokenizer_sha256
from dwt_ds.prepare import corpus
from dwt_ds.prepare.case_and_accents import Wishes
from dwt_ds.prepare.options import PrepareOptions
from dwt_ds.prepare.train_tokenizer import Kind, train_tokenizer

ENGLISH_WORDPIECE = "e6dd040973e087588af81a2d0ad2974f96ac594c4fadf1949c566bb9cc811416"
KINDS: tuple[Kind, ...] = ("wordpiece", "bpe", "unigram", "characters")
# Written for this test: a sentence in each language.
SENTENCES = {
    "en": "The river was frozen, and nobody crossed it before March.",
    "de": "Die Brücke über den Fluß war für müde Füße zu lang.",
    "fr": "Dès l'été, la forêt gelée fut oubliée à Orléans.",
    "ru": "Мой отец шёл домой, и ёлка стояла у двери.",
    "hi": "लड़का हिंदी में किताब पढ़ता है।",
    "ar": "أين المفتاح؟ بحثت عنه في كل مكان.",
    "th": "ที่นี่มีตลาดใหญ่ริมแม่น้ำ ผู้คนมาซื้อผักทุกเช้า",
    "zh": "这里修了一座桥，谁还记得它呢？",
    "ja": "学校でピアノが聞こえた。誰かが弾いている。",
    "ko": "우리는 어제 새 등을 샀어요.",
}

TRAIN_AND_PRINT = """
import hashlib, sys
from dwt_ds.prepare.train_tokenizer import train_tokenizer
for kind in ("wordpiece", "bpe", "unigram", "characters"):
    tokenizer = train_tokenizer(open(sys.argv[1], encoding="utf-8").read().split("\\n"), 700, kind)
    print(hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest())
"""


@pytest.mark.slow  # a process for each kind
def test_training_gives_the_same_file_in_every_process(corpus_file: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(corpus_file.read_text(encoding="utf-8") + "\n".join(SENTENCES.values()), encoding="utf-8")
    there = subprocess.run(
        [sys.executable, "-c", TRAIN_AND_PRINT, str(text)], check=True, capture_output=True, text=True
    )
    lines = text.read_text(encoding="utf-8").split("\n")
    here = [train_tokenizer(lines, 700, kind).backend_tokenizer.to_str() for kind in KINDS]
    assert [hashlib.sha256(file.encode()).hexdigest() for file in here] == there.stdout.split()
    assert len(set(here)) == 4


def test_the_sample_to_train_on_is_bounded_and_drawn_from_all_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "TOKENIZER_SAMPLE_CHARS", 1000)
    for seed in range(8):
        short, long = corpus._DocumentSample(seed), corpus._DocumentSample(seed)
        for number in range(1000):
            short.offer(number, f"{number:010}")
            long.offer(number, 2000 * "a")
        kept = np.array([int(document) for document in short.documents()])
        assert 30 <= len(kept) <= 100
        assert np.bincount(kept // 250, minlength=4).min() >= 3
        assert len(long.documents()) == 1


def test_characters_are_the_most_frequent_ones_in_order() -> None:
    tokenizer = train_tokenizer(["xzzzzyyy", "xxzzyyy"], 7, "characters")
    assert tokenizer.convert_ids_to_tokens(range(5, 7)) == ["y", "z"]


def test_english_wordpiece_is_as_it_was() -> None:
    """Rows of earlier versions keep their fingerprints: the vocabulary that version 0.1 trained on this text."""
    texts = [line for lines in made_up_documents(30) for line in lines]
    assert tokenizer_sha256(train_tokenizer(texts, 250)) == ENGLISH_WORDPIECE


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_frame_and_a_stored_copy(kind: Kind, tmp_path: Path) -> None:
    texts = [line for lines in made_up_documents(30) for line in lines]
    tokenizer = train_tokenizer(texts, 500, kind)
    facts = TokenizerFacts.of(tokenizer)
    ids = tokenizer(texts[0])["input_ids"]
    assert [ids[0], ids[-1]] == [facts.cls_id, facts.sep_id]
    assert sum(facts.is_special) == 5
    assert tokenizer.unk_token_id not in ids
    pair = tokenizer.convert_ids_to_tokens(tokenizer("a", "o")["input_ids"])
    assert (
        "".join(pair).replace("##", "").replace("▁", "")
        == {
            "wordpiece": "[CLS]a[SEP]o[SEP]",
            "bpe": "<s>a</s></s>o</s>",
            "unigram": "<s>a</s></s>o</s>",
            "characters": "<cls>a<eos>o<eos>",
        }[kind]
    )
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again(texts[0])["input_ids"] == ids
    assert tokenizer_sha256(again) == tokenizer_sha256(tokenizer)


@pytest.mark.parametrize("kind", ["bpe", "unigram", "characters"])
@pytest.mark.parametrize("language", list(SENTENCES))
def test_decoding_gives_the_text_back(kind: Kind, language: str) -> None:
    sentence = SENTENCES[language]
    tokenizer = train_tokenizer([sentence] * 5, 400, kind)
    ids = tokenizer(sentence)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) == sentence


@pytest.mark.parametrize("language", list(SENTENCES))
def test_wordpiece_knows_every_character_of_its_text(language: str) -> None:
    sentence = SENTENCES[language]
    tokenizer = train_tokenizer([sentence] * 5, 400)
    ids = tokenizer(sentence)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    spelled = tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "")
    assert spelled == sentence.lower().replace(" ", "")  # every accent and vowel sign is kept, but for English


def test_accents_of_english_are_few_and_go() -> None:
    text = [SENTENCES["en"] * 10 + " café"]
    assert "e" in "".join(train_tokenizer(text, 100).tokenize("é"))
    assert "é" in "".join(train_tokenizer(text, 100, wishes=Wishes(keep_accents=True)).tokenize("é"))
    assert train_tokenizer(text, 100, wishes=Wishes(cased=True)).tokenize("T") == ["T"]


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_no_text_is_unknown_to_bytes(kind: Kind) -> None:
    tokenizer = train_tokenizer([SENTENCES["en"]] * 5, 330, kind)
    for text in (*SENTENCES.values(), "☃ \u200b\ufffd\U0001f600"):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) == text


@pytest.mark.parametrize("kind", ["bpe", "unigram", "characters"])
def test_capitals_and_accents_go_where_they_are_not_wanted(kind: Kind) -> None:
    tokenizer = train_tokenizer([SENTENCES["fr"]] * 5, 330, kind, Wishes(cased=False, keep_accents=False))
    ids = tokenizer("DÈS l'Été")["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "des l'ete"


def chinese(characters: int, count: int) -> list[str]:
    draw = random.Random(1)
    alphabet = [chr(0x4E00 + number) for number in range(characters)]
    weights = [1 / (number + 30) for number in range(characters)]
    return ["".join(draw.choices(alphabet, weights, k=30)) + "。" for _ in range(count)]


@pytest.mark.parametrize(("entries", "most_unknown"), [(8000, 0.001), (2000, 0.12), (1300, 0.2)])
def test_the_alphabet_grows_with_the_text_and_with_n(entries: int, most_unknown: float) -> None:
    texts = chinese(3000, 2000)
    tokenizer = train_tokenizer(texts, entries)
    ids = [id_ for text in texts for id_ in tokenizer(text, add_special_tokens=False)["input_ids"]]
    assert ids.count(tokenizer.unk_token_id) / len(ids) <= most_unknown
    assert len(tokenizer) <= entries


def test_a_rare_character_does_not_grow_the_alphabet() -> None:
    texts = [SENTENCES["en"]] * 3000 + ["".join(chr(0x4E00 + number) for number in range(1200))]
    assert len(train_tokenizer(texts, 4000).get_vocab()) < 1300


def test_words_of_thai_may_be_long() -> None:
    phrase = SENTENCES["th"].replace(" ", "") * 4
    tokenizer = train_tokenizer([phrase] * 5, 400)
    assert len(phrase) > 100
    assert tokenizer.unk_token_id not in tokenizer(phrase)["input_ids"]


@pytest.mark.timeout(60)  # uncut, these letters take minutes
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "wordpiece"])
def test_a_genome_is_learned_in_time_that_grows_with_its_length(kind: Kind) -> None:
    draw = random.Random(1)
    genome = "".join(draw.choices("ACGT", k=300_000))
    tokenizer = train_tokenizer([genome], 340, kind, Wishes(cased=True))
    ids = tokenizer(genome[: PrepareOptions.max_chars], add_special_tokens=False)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert len(ids) == 2000 if kind == "characters" else len(ids) < 1400


def test_a_genome_is_no_text_for_wordpiece() -> None:
    """It reads a word as a whole, in a time that grows with the square of its length, and has to give up at some."""
    genome = "".join(random.Random(1).choices("ACGT", k=20_000))
    said = "--train-tokenizer 340: 100% of the text is in words of 1,000 characters and more, which WordPiece cannot"
    with pytest.raises(ValueError, match=said):
        train_tokenizer([genome], 340, "wordpiece", Wishes(cased=True))
    some = [" ".join("the lamp and the sun" for _ in range(300)) for _ in range(5)]
    train_tokenizer([*some, genome[:1500]], 340, "wordpiece", Wishes(cased=True))


@pytest.mark.parametrize(("kind", "entries"), [("wordpiece", 20), ("bpe", 261), ("unigram", 270), ("characters", 5)])
def test_too_small_a_vocabulary(kind: Kind, entries: int) -> None:
    with pytest.raises(ValueError, match=f"--train-tokenizer {entries}: .* need [0-9]+ entries; ask for more"):
        train_tokenizer([line for lines in made_up_documents(5) for line in lines], entries, kind)

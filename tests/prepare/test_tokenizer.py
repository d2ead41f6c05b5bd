"""Given tokenizers: made from a vocab.txt, which decides on capitals and accents, or complete."""

from __future__ import annotations

from pathlib import Path
from string import ascii_lowercase

import pytest
from harness.corpus import Make
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import BertConfig, PreTrainedTokenizerFast

from dwt_ds.data.tokenizer import tokenizer_sha256
from dwt_ds.prepare.case_and_accents import Wishes, described
from dwt_ds.prepare.tokenizer import find_tokenizer


def write_vocab(path: Path, entries: list[str]) -> str:
    path.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *entries]) + "\n", encoding="utf-8")
    return str(path)


UNCASED = ["the", "caf", "##e", *ascii_lowercase]


@pytest.mark.parametrize(
    ("entries", "text", "tokens"),
    [
        (UNCASED, "The Café", ["the", "caf", "##e"]),
        ([*UNCASED, "X"], "The Café", ["the", "caf", "##e"]),  # one stray capital makes no cased vocabulary
        (["the", "lamp", "X"], "The Lamp", ["the", "lamp"]),  # nor among few entries
        (["The", "Old", "the", "caf", "##é"], "The café", ["The", "caf", "##é"]),
        (["grün", "das", "##e", "blätter"], "Das grüne", ["das", "grün", "##e"]),
        (["déjà", "vu"], "Déjà vu", ["déjà", "vu"]),
        (["дом", "мой"], "Мой дом", ["мой", "дом"]),
        (["में", "किताब"], "किताब में", ["किताब", "में"]),
        (["أكل", "آن"], "آن أكل", ["آن", "أكل"]),
        (["ที่นี่"], "ที่นี่", ["ที่นี่"]),
        (["が", "##ぎ"], "がぎ", ["が", "##ぎ"]),
        (["책상", "##을", "등"], "책상을 등", ["책상", "##을", "등"]),
        (["北", "京", "abc"], "北京 ABC", ["北", "京", "abc"]),
    ],
    ids=["en", "stray", "stray of few", "cased", "de", "fr", "ru", "hi", "ar", "th", "ja", "ko", "zh"],
)
def test_the_entries_tell_what_happens_to_capitals_and_accents(
    tmp_path: Path, entries: list[str], text: str, tokens: list[str]
) -> None:
    assert find_tokenizer(write_vocab(tmp_path / "v.txt", entries)).tokenize(text) == tokens


def test_what_was_concluded_is_printed(tmp_path: Path) -> None:
    tokenizer = find_tokenizer(write_vocab(tmp_path / "v.txt", ["grün", "das", "##e", "[unused1]"]))
    assert described(tokenizer) == "lower-cased, accents kept (0 of 3 entries have a capital, 1 an accent)"
    tokenizer.save_pretrained(tmp_path / "whole")
    assert described(find_tokenizer(str(tmp_path / "whole"))) == described(tokenizer)


@pytest.mark.parametrize(
    ("wishes", "tokens"),
    [
        (Wishes(cased=True), ["[UNK]", "[UNK]"]),
        (Wishes(cased=False), ["das", "grün"]),
        (Wishes(keep_accents=False), ["das", "[UNK]"]),
        (Wishes(cased=True, keep_accents=False), ["[UNK]", "[UNK]"]),
    ],
)
def test_the_user_decides_against_the_entries(tmp_path: Path, wishes: Wishes, tokens: list[str]) -> None:
    assert find_tokenizer(write_vocab(tmp_path / "v.txt", ["grün", "das"]), wishes).tokenize("Das Grün") == tokens


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        (Wishes(cased=True), "--cased: the tokenizer .* decides this itself .lower-cased, accents kept"),
        (Wishes(keep_accents=False), "--strip-accents: the tokenizer .* leave --strip-accents out"),
        (Wishes(cased=False, keep_accents=True), None),
    ],
)
def test_a_whole_tokenizer_is_not_to_be_changed(tmp_path: Path, wishes: Wishes, message: str | None) -> None:
    find_tokenizer(write_vocab(tmp_path / "v.txt", ["grün"])).save_pretrained(tmp_path / "whole")
    if message is None:
        find_tokenizer(str(tmp_path / "whole"), wishes)
        return
    with pytest.raises(ValueError, match=message):
        find_tokenizer(str(tmp_path / "whole"), wishes)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[PAD]\n[UNK]\n[CLS]\n[SEP]\nthe\n", r"lacks \[MASK\]; choose another tokenizer"),
        ("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nthe\nthe\n", "1 entries are duplicates; list each entry once"),
    ],
)
def test_bad_vocab_files(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "vocab.txt").write_text(content)
    with pytest.raises(ValueError, match=message):
        find_tokenizer(str(tmp_path / "vocab.txt"))


@pytest.mark.parametrize("name", ["nowhere/vocab.txt", "not/a/folder"])
def test_missing_files(name: str) -> None:
    with pytest.raises(FileNotFoundError, match=name):
        find_tokenizer(name)


def test_a_data_folder_means_the_tokenizer_that_made_it(tmp_path: Path) -> None:
    given = find_tokenizer(write_vocab(tmp_path / "v.txt", ["the", "caf"]))
    given.save_pretrained(tmp_path / "data" / "tokenizer")
    assert tokenizer_sha256(find_tokenizer(str(tmp_path / "data"))) == tokenizer_sha256(given)


def test_a_finished_folder_is_not_that_of_a_changed_vocabulary(tmp_path: Path, make: Make, corpus_file: Path) -> None:
    vocabulary = write_vocab(
        tmp_path / "vocab.txt", [*UNCASED, *(f"##{letter}" for letter in ascii_lowercase if letter != "e"), *".!?"]
    )
    made = make(tmp_path / "data", corpus_file, tokenizer=vocabulary).manifest
    write_vocab(tmp_path / "vocab.txt", UNCASED)
    with pytest.raises(ValueError, match=f"with other settings .tokenizer_sha256 is {made.tokenizer_sha256} there"):
        make(tmp_path / "data", corpus_file, tokenizer=vocabulary)


def test_folder_without_a_tokenizer(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(ValueError, match=f"^--tokenizer {tmp_path}: .* holds no tokenizer; .*; give a vocab.txt, "):
            find_tokenizer(str(tmp_path))
        BertConfig().save_pretrained(tmp_path)  # transformers would make a tokenizer of five entries of it


def save_as_tokenizer(tokenizer: Tokenizer, folder: Path, *, unknown: bool) -> str:
    roles = {f"{role}_token": f"[{role.upper()}]" for role in ("pad", "cls", "sep", "mask", *["unk"] * unknown)}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles).save_pretrained(folder)
    return str(folder)


def byte_level_bpe(alphabet: list[str], unknown: str | None = None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    special = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", *([unknown] if unknown else [])]
    trainer = trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["the old lamp is on"], trainer)
    return tokenizer


def test_a_tokenizer_that_would_lose_text_is_refused(tmp_path: Path) -> None:
    """Without an unknown token BPE leaves out what it lacks, without a word, and Unigram fails at it."""
    every = pre_tokenizers.ByteLevel.alphabet()
    whole = save_as_tokenizer(byte_level_bpe(every), tmp_path / "whole", unknown=False)
    assert find_tokenizer(whole).tokenize("12 é\n") == ["Ġ", "1", "2", "Ġ", "Ã", "©", "Ċ"]
    known = save_as_tokenizer(byte_level_bpe([], "[UNK]"), tmp_path / "known", unknown=True)
    assert "[UNK]" in find_tokenizer(known).tokenize("12 é")
    unigram = Tokenizer(models.Unigram([("[PAD]", 0.0), ("[CLS]", 0.0), ("[SEP]", 0.0), ("[MASK]", 0.0), ("a", -1.0)]))
    for name, tokenizer, message in [
        ("some bytes", byte_level_bpe([]), r"lacks 2\d\d bytes; train it with initial_alphabet"),
        ("a byte", byte_level_bpe([each for each in every if each != "Ċ"]), "lacks 1 bytes; "),
        ("characters", Tokenizer(models.BPE(byte_level_bpe([]).get_vocab(), [])), "would be lost"),
        ("Unigram", unigram, "would be lost"),
    ]:
        with pytest.raises(ValueError, match=f"^--tokenizer .*: its model has no unknown token.*{message}"):
            find_tokenizer(save_as_tokenizer(tokenizer, tmp_path / name, unknown=False))


def test_vocab_files_of_other_systems(tmp_path: Path) -> None:
    path = tmp_path / "v.txt"
    write_vocab(path, ["grün"])
    text = path.read_text(encoding="utf-8")
    path.write_text(text, encoding="utf-8-sig")
    assert find_tokenizer(str(path)).tokenize("grün") == ["grün"]
    path.write_text(text, encoding="utf-8", newline="\r\n")
    assert find_tokenizer(str(path)).tokenize("grün") == ["grün"]
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=f"^--tokenizer {path}: is not UTF-8 "):
        find_tokenizer(str(path))

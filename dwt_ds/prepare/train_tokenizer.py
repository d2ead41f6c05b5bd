"""Trains a tokenizer of any of the kinds that encoders use; the same text gives the same file.

| kind | special tokens and frame of | unknown token |
|---|---|---|
| wordpiece | BERT | a character beyond the alphabet |
| bpe (byte-level) | RoBERTa | none: every byte is an entry |
| unigram | XLM-R | none: characters beyond the alphabet become bytes |
| characters | ESM | a character beyond the N most frequent |
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any, Literal

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers.normalizers import Normalizer
from transformers import PreTrainedTokenizerFast

from dwt_ds.prepare import case_and_accents
from dwt_ds.prepare.case_and_accents import Treatment, Wishes
from dwt_ds.prepare.tokenizer import (
    BERT_SPECIAL_TOKENS,
    ESM_SPECIAL_TOKENS,
    LONGEST_WORD,
    ROBERTA_SPECIAL_TOKENS,
    character_counts,
    check_size,
    most_frequent_first,
    set_frame,
    wordpiece_tokenizer,
)
from dwt_ds.prepare.train_unigram import COVERED, train_unigram

Kind = Literal["wordpiece", "bpe", "unigram", "characters"]
# A WordPiece alphabet has this many characters, or as many as cover COVERED of the text if that is more, in at most
# this share of the entries.
_ALPHABET_CHARACTERS = 1000
_ALPHABET_OF_ENTRIES = 0.9
# No byte-level entry spans two of these words, which are those of GPT-2 and RoBERTa, but with marks as a part of their
# letters: otherwise the vowel signs of Hindi or Thai would end a word.
_BPE_WORDS = r"'(?:s|t|re|ve|m|ll|d)| ?[\p{L}\p{M}]+| ?\p{N}+| ?[^\s\p{L}\p{M}\p{N}]+|\s+(?!\S)|\s+"
# Text without spaces has words beyond LONGEST_WORD. If they have more than this share of it, the limit is raised.
_IN_LONG_WORDS = 0.001
_LONGEST_UNSPACED = 1000
# Longer runs of text without spaces, such as genomes and base64, are cut before training: the time that the library
# takes for a word grows with the square of its length, an hour for a million letters.
# WordPiece is refused where their share is above _IN_CUT_WORDS: it would read each of them as one unknown token.
_IN_CUT_WORDS = 0.1
_UNSPACED_RUN = re.compile(rf"(?<!\S)\S{{{_LONGEST_UNSPACED + 1},}}")


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    kind: Kind = "wordpiece",
    wishes: Wishes = Wishes(),  # noqa: B008
) -> PreTrainedTokenizerFast:
    """A tokenizer of at most `vocab_size` entries.

    Unless `wishes` say otherwise, WordPiece drops capitals and the other kinds keep them, as their model families do.
    Accents are dropped with the capitals, unless the text needs them. Raises ValueError if `vocab_size` is too small.
    """
    lines = [line for text in texts for line in _UNSPACED_RUN.sub(_cut, text).split("\n")]
    characters = Counter(chain.from_iterable(lines))
    treatment = case_and_accents.of_text(characters, wishes, usually_cased=kind != "wordpiece")
    if kind == "wordpiece":
        return _train_wordpiece(lines, vocab_size, treatment)
    train = {"bpe": _train_bpe, "unigram": train_unigram, "characters": _train_characters}[kind]
    return train(lines, vocab_size, normalizer_of(treatment))


def _cut(run: re.Match[str]) -> str:
    """The run in lines of at most _LONGEST_UNSPACED characters."""
    text = run.group()
    return "\n".join(text[start : start + _LONGEST_UNSPACED] for start in range(0, len(text), _LONGEST_UNSPACED))


def normalizer_of(treatment: Treatment) -> Normalizer | None:
    """The normalizer of the kinds other than WordPiece; None if it would change nothing."""
    steps: list[Normalizer] = []
    if treatment.strip_accents:
        steps += [normalizers.NFD(), normalizers.StripAccents(), normalizers.NFC()]
    if treatment.lowercase:
        steps.append(normalizers.Lowercase())
    return normalizers.Sequence(steps) if steps else None


def _train_wordpiece(lines: Sequence[str], vocab_size: int, treatment: Treatment) -> PreTrainedTokenizerFast:
    special = {token: index for index, token in enumerate(BERT_SPECIAL_TOKENS.values())}
    tokenizer = wordpiece_tokenizer(special, treatment).backend_tokenizer
    words = Counter(word for line in lines for word in tokenizer.normalizer.normalize_str(line).split())
    in_all = sum(len(word) * count for word, count in words.items())
    _check_cut_words(words, in_all, tokenizer.pre_tokenizer, vocab_size)
    # The trainer numbers single characters in the order of a hash map, and breaks ties between merges by these numbers.
    # Listing the characters beforehand makes two runs agree.
    characters, alphabet = _wordpiece_characters(words, vocab_size)
    first_entries = [*special, *characters]
    check_size(vocab_size, len(first_entries), "the special tokens and the text's single characters")
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        show_progress=False,
        special_tokens=first_entries,
        limit_alphabet=max(_ALPHABET_CHARACTERS, alphabet),
        continuing_subword_prefix="##",
    )
    tokenizer.train_from_iterator(lines, trainer)
    in_long = sum(len(word) * count for word, count in words.items() if len(word) > LONGEST_WORD)
    longest_word = _LONGEST_UNSPACED if in_long > _IN_LONG_WORDS * in_all else LONGEST_WORD
    return wordpiece_tokenizer(tokenizer.get_vocab(), treatment, longest_word)


def _check_cut_words(
    words: Counter[str], characters: int, pre_tokenizer: pre_tokenizers.PreTokenizer, vocab_size: int
) -> None:
    """Refuse text, of so many `characters`, much of which is in words that had to be cut (ValueError)."""
    cut = sum(
        len(word) * count
        for word, count in words.items()
        if len(word) >= _LONGEST_UNSPACED
        and any(len(piece) >= _LONGEST_UNSPACED for piece, _ in pre_tokenizer.pre_tokenize_str(word))
    )
    if cut > _IN_CUT_WORDS * characters:
        raise ValueError(
            f"--train-tokenizer {vocab_size}: {cut / characters:.0%} of the text is in words of {_LONGEST_UNSPACED:,} "
            "characters and more, which WordPiece cannot read; choose --kind bpe, unigram or characters"
        )


def _wordpiece_characters(words: Counter[str], vocab_size: int) -> tuple[list[str], int]:
    """(entries for the most frequent characters, number of these characters).

    First the sorted characters ("c"), then those that occur inside words ("##c").
    """
    counts = character_counts(words)
    inside = {character for word in words for character in word[1:]}
    needs_both = {character for character in inside if not _stands_alone(character)}
    kept: list[str] = []
    covered = entries = 0
    for character in most_frequent_first(counts):
        entries += 1 + (character in needs_both)
        full = covered >= COVERED * counts.total() or entries > _ALPHABET_OF_ENTRIES * vocab_size
        if full and len(kept) >= _ALPHABET_CHARACTERS:
            break
        kept.append(character)
        covered += counts[character]
    return sorted(kept) + ["##" + character for character in sorted(needs_both.intersection(kept))], len(kept)


def _stands_alone(character: str) -> bool:
    """Whether BERT's pre-tokenizer makes a token of this character: ASCII symbols and all Unicode punctuation."""
    if character.isascii():
        return not character.isalnum()
    return unicodedata.category(character).startswith("P")


def _train_bpe(lines: Sequence[str], vocab_size: int, normalizer: Normalizer | None) -> PreTrainedTokenizerFast:
    special = list(dict.fromkeys(ROBERTA_SPECIAL_TOKENS.values()))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    check_size(vocab_size, len(special) + len(alphabet), "the special tokens and the 256 bytes")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_BPE_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        show_progress=False,
        special_tokens=special,
        initial_alphabet=alphabet,
    )
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.decoder = decoders.ByteLevel()
    end, start = ("</s>", special.index("</s>")), ("<s>", special.index("<s>"))
    tokenizer.post_processor = processors.RobertaProcessing(end, start, trim_offsets=True, add_prefix_space=False)
    # As in RoBERTa, the mask includes the space before it.
    special_tokens: dict[str, Any] = ROBERTA_SPECIAL_TOKENS | {"mask_token": AddedToken("<mask>", lstrip=True)}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_input_names=["input_ids", "attention_mask"], **special_tokens
    )


def _train_characters(lines: Sequence[str], vocab_size: int, normalizer: Normalizer | None) -> PreTrainedTokenizerFast:
    special = list(dict.fromkeys(ESM_SPECIAL_TOKENS.values()))
    check_size(vocab_size, len(special), "the special tokens")
    normalized = map(normalizer.normalize_str, lines) if normalizer is not None else lines
    counts = Counter(chain.from_iterable(normalized))
    entries = special + sorted(most_frequent_first(counts)[: vocab_size - len(special)])
    tokenizer = Tokenizer(models.WordLevel({entry: n for n, entry in enumerate(entries)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    set_frame(tokenizer, ("<cls>", "<eos>"), single="<cls> $A <eos>", pair="<cls> $A <eos> $B <eos>")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_input_names=["input_ids", "attention_mask"], **ESM_SPECIAL_TOKENS
    )

"""Trains a Unigram tokenizer (Kudo 2018) deterministically.

The trainer of the tokenizers library sums in the order of a hash map, so no two of its runs agree. Here byte-pair
merges propose the pieces. Then, in turns, the most probable segmentation of the text is counted and the least used
pieces are dropped, until the wanted number is left. Counts are integers and ties are broken by the piece, so the same
text gives the same tokenizer. The library does the segmenting.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import regex
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.normalizers import Normalizer
from transformers import PreTrainedTokenizerFast

from dwt_ds.data.text_tokenizer import BYTE_ENTRIES
from dwt_ds.prepare.tokenizer import (
    ROBERTA_SPECIAL_TOKENS,
    character_counts,
    check_size,
    most_frequent_first,
    set_frame,
)

_SPACE = "\u2581"
# Pieces are learned from words with the space before them, and from punctuation marks; no piece spans two of them.
_WORD = regex.compile(rf"{_SPACE}?(?:\p{{Punctuation}}|[^{_SPACE}\p{{Punctuation}}]+)|{_SPACE}")
# Learn from the most frequent words, up to this many characters: in text without spaces, hardly any word repeats.
_LEARNED_CHARACTERS = 16_000_000
# The alphabet covers this share of the text (Kudo and Richardson 2018); other characters become bytes.
COVERED = 0.9995
# Proposed pieces for each wanted one.
_PROPOSED_PIECES = 3
_KEPT_A_TURN = 0.75
_TURNS_AT_THE_END = 2
_PIECE_CHARACTERS = 16


def train_unigram(lines: Sequence[str], vocab_size: int, normalizer: Normalizer | None) -> PreTrainedTokenizerFast:
    """A Unigram tokenizer with byte fallback and XLM-R's special tokens and frame, of at most `vocab_size` entries.

    Raises ValueError where `vocab_size` is too small.
    """
    special = list(dict.fromkeys(ROBERTA_SPECIAL_TOKENS.values()))
    words = _words(lines, normalizer)
    alphabet = _alphabet(words)
    fixed = len(special) + len(BYTE_ENTRIES)
    check_size(vocab_size, fixed + len(alphabet), "the special tokens, 256 bytes and the text's characters")
    scores = _learned_scores(words, alphabet, vocab_size - fixed)
    # Special tokens and bytes score so low that text which looks like them is never segmented into them.
    never = min(scores.values()) - 100.0
    vocabulary = [(entry, never) for entry in (*special, *BYTE_ENTRIES)]
    vocabulary += sorted(scores.items(), key=lambda item: (-item[1], item[0]))
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=special.index("<unk>"), byte_fallback=True))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme="always")
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(replacement=_SPACE, prepend_scheme="always")]
    )
    set_frame(tokenizer, ("<s>", "</s>"), single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_input_names=["input_ids", "attention_mask"],
        **ROBERTA_SPECIAL_TOKENS | {"mask_token": AddedToken("<mask>", lstrip=True)},
    )


def _words(lines: Sequence[str], normalizer: Normalizer | None) -> dict[str, int]:
    """Words and how often they occur, the most frequent first."""
    counts: Counter[str] = Counter()
    for line in lines:
        text = normalizer.normalize_str(line) if normalizer is not None else line
        counts.update(_WORD.findall(_SPACE + text.replace(" ", _SPACE)))
    words = most_frequent_first(counts)
    return {word: counts[word] for word, end in zip(words, accumulate(map(len, words))) if end <= _LEARNED_CHARACTERS}


def _alphabet(words: dict[str, int]) -> list[str]:
    counts = character_counts(words)
    characters = most_frequent_first(counts)
    covered, enough = accumulate(map(counts.__getitem__, characters), initial=0), COVERED * counts.total()
    return sorted(character for character, before in zip(characters, covered) if before < enough)


def _learned_scores(words: dict[str, int], alphabet: list[str], size: int) -> dict[str, float]:
    """Pieces, the alphabet among them, with their log probabilities."""
    pieces = _proposed(words, alphabet, _PROPOSED_PIECES * size)
    scores = dict.fromkeys(pieces, -1.0)  # at first, the segmentation into the fewest pieces is the best
    single = set(alphabet)
    turns_left = _TURNS_AT_THE_END
    while turns_left:
        counts = _counts(words, scores)
        if len(scores) > size:
            ranked = sorted(
                (piece for piece in scores if piece not in single), key=lambda piece: (-counts[piece], piece)
            )
            pieces = alphabet + ranked[: max(size, int(_KEPT_A_TURN * len(scores))) - len(alphabet)]
        else:
            turns_left -= 1
        total = math.log(sum(max(1, counts[piece]) for piece in pieces))
        scores = {piece: math.log(max(1, counts[piece])) - total for piece in pieces}
    return scores


def _proposed(words: dict[str, int], alphabet: list[str], size: int) -> list[str]:
    """The alphabet, then the pieces that byte-pair encoding merges in `words`."""
    merging = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=2,
        show_progress=False,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        max_token_length=_PIECE_CHARACTERS,
    )
    merging.train_from_iterator((word for word, count in words.items() for _ in range(count)), trainer)
    vocabulary = merging.get_vocab()
    return alphabet + sorted(vocabulary.keys() - set(alphabet), key=vocabulary.__getitem__)


def _counts(words: dict[str, int], scores: dict[str, float]) -> dict[str, int]:
    """How often each piece is in the most probable segmentation of the words."""
    model = Tokenizer(models.Unigram([("<unk>", min(scores.values()) - 100.0), *scores.items()], unk_id=0))
    encodings = model.encode_batch_fast(list(words), add_special_tokens=False)
    lengths = [len(encoding.ids) for encoding in encodings]
    ids = np.concatenate([encoding.ids for encoding in encodings])
    weights = np.repeat(np.array(list(words.values()), dtype=np.int64), lengths)
    # Exact: floats add whole numbers up to 2^53 without rounding.
    counts = np.bincount(ids, weights=weights, minlength=len(scores) + 1)[1:].astype(np.int64)
    return dict(zip(scores, counts.tolist(), strict=True))

"""A Unigram tokenizer (Kudo 2018) that is the same for the same text.

The trainer of the tokenizers library sums in the order of a hash map, so that no two runs agree. Here byte-pair merges
propose the pieces; then the most probable segmentation of the text is counted and the pieces it uses least are dropped,
in turns, until the wanted number is left. Counts are whole numbers and ties go by the piece, so nothing is left to
chance; segmenting is the library's.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import regex
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

ROBERTA_SPECIAL_TOKENS = {
    "bos_token": "<s>",
    "cls_token": "<s>",
    "pad_token": "<pad>",
    "eos_token": "</s>",
    "sep_token": "</s>",
    "unk_token": "<unk>",
    "mask_token": "<mask>",
}
_SPACE = "\u2581"
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
# What pieces are learned from: words with the space before them, and punctuation, in which no piece spans two.
_WORD = regex.compile(rf"{_SPACE}?(?:\p{{Punctuation}}|[^{_SPACE}\p{{Punctuation}}]+)|{_SPACE}")
# The most frequent words, until they have so many characters: where there are no spaces, nearly each is another.
_LEARNED_CHARACTERS = 16_000_000
# The alphabet covers this share of the text; what is beyond becomes bytes. Kudo and Richardson 2018.
_COVERED = 0.9995
# Pieces that are proposed, for each that is wanted.
_PROPOSED_PIECES = 3
_KEPT_A_TURN = 0.75
_TURNS_AT_THE_END = 2
_PIECE_CHARACTERS = 16


def train_unigram(
    lines: Sequence[str], vocab_size: int, normalizer: normalizers.Normalizer | None
) -> PreTrainedTokenizerFast:
    """A Unigram tokenizer with byte fallback and XLM-R's special tokens and frame, of at most `vocab_size` entries.

    Raises ValueError where `vocab_size` is too small.
    """
    special = list(dict.fromkeys(ROBERTA_SPECIAL_TOKENS.values()))
    words = _words(lines, normalizer)
    alphabet = _alphabet(words)
    room = vocab_size - len(special) - len(_BYTES)
    if room <= len(alphabet):
        raise ValueError(
            f"--train-tokenizer {vocab_size}: the special tokens, 256 bytes and the text's characters alone need "
            f"{vocab_size - room + len(alphabet)} entries; ask for more"
        )
    scores = _learned_scores(words, alphabet, room)
    # Special tokens and bytes stand in the vocabulary, but are never the best reading of text that looks like them.
    never = min(scores.values()) - 100.0
    vocabulary = [(entry, never) for entry in special + _BYTES]
    vocabulary += sorted(scores.items(), key=lambda item: (-item[1], item[0]))
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=special.index("<unk>"), byte_fallback=True))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme="always")
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(replacement=_SPACE, prepend_scheme="always")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[(name, tokenizer.token_to_id(name)) for name in ("<s>", "</s>")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_input_names=["input_ids", "attention_mask"],
        **ROBERTA_SPECIAL_TOKENS | {"mask_token": AddedToken("<mask>", lstrip=True)},
    )


def _words(lines: Sequence[str], normalizer: normalizers.Normalizer | None) -> dict[str, int]:
    """Words and how often they occur, the most frequent first, ties by the word."""
    counts: Counter[str] = Counter()
    for line in lines:
        text = normalizer.normalize_str(line) if normalizer is not None else line
        counts.update(_WORD.findall(_SPACE + text.replace(" ", _SPACE)))
    kept: dict[str, int] = {}
    characters = 0
    for word in sorted(counts, key=lambda word: (-counts[word], word)):
        characters += len(word)
        if characters > _LEARNED_CHARACTERS:
            break
        kept[word] = counts[word]
    return kept


def _alphabet(words: dict[str, int]) -> list[str]:
    counts: Counter[str] = Counter()
    for word, count in words.items():
        for character in word:
            counts[character] += count
    kept: list[str] = []
    covered = 0
    for character in sorted(counts, key=lambda character: (-counts[character], character)):
        if covered >= _COVERED * counts.total():
            break
        kept.append(character)
        covered += counts[character]
    return sorted(kept)


def _learned_scores(words: dict[str, int], alphabet: list[str], size: int) -> dict[str, float]:
    """Pieces, the alphabet among them, with their log probabilities."""
    pieces = _proposed(words, alphabet, _PROPOSED_PIECES * size)
    scores = dict.fromkeys(pieces, -1.0)  # at first the reading of the fewest pieces is the best
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
    """What byte-pair encoding merges in `words`, the alphabet first."""
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
    # Exact: as floats, whole numbers up to 2^53 add without rounding.
    counts = np.bincount(ids, weights=weights, minlength=len(scores) + 1)[1:].astype(np.int64)
    return dict(zip(scores, counts.tolist(), strict=True))

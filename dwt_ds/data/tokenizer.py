"""The tokenizer of a data folder: loaded, made from a vocab.txt or trained here; fingerprinted by what it does."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers.models import WordPiece
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

BERT_SPECIAL_TOKENS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
# WordPiece keeps at most this many distinct characters; a rarer one becomes [UNK] (as in BERT's own vocabulary).
_ALPHABET_CHARACTERS = 1000
# Exercises case, accents, punctuation, digits, subwords and unknown characters; part of the fingerprint.
_PROBE = "The café's 1,234 re-tokenised WORDS (naïve; “quoted”) \u4e2d\u6587 e.g. unbelievableness\t\u2603 end."


@dataclass(frozen=True)
class TokenizerFacts:
    """What masking and batching need to know of a tokenizer."""

    vocab_size: int
    pad_id: int
    cls_id: int
    sep_id: int
    mask_id: int
    is_special: np.ndarray
    """(V,) bool: tokens that are never labelled nor put in as random ones (the unknown token among them)."""
    continues_word: np.ndarray
    """(V,) bool: tokens that carry on the word of the token before them."""
    ordinary_ids: np.ndarray
    """(V',) int64: the ids that are not special."""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> TokenizerFacts:
        """Raises ValueError for a tokenizer without the special tokens that masked language modelling needs."""
        for role in ("pad_token", "cls_token", "sep_token", "mask_token"):
            if getattr(tokenizer, role, None) is None:
                raise ValueError(
                    f"tokenizer {tokenizer.name_or_path or type(tokenizer).__name__} has no {role}: "
                    "masked language modelling needs pad, cls, sep and mask tokens; choose another tokenizer"
                )
        vocabulary = tokenizer.get_vocab()
        vocab_size = max(vocabulary.values()) + 1
        is_special = np.zeros(vocab_size, dtype=bool)
        is_special[list(tokenizer.all_special_ids)] = True
        continues_word = np.zeros(vocab_size, dtype=bool)
        continues = _continuation_rule(tokenizer)
        continues_word[[index for token, index in vocabulary.items() if continues(token)]] = True
        in_vocabulary = np.zeros(vocab_size, dtype=bool)
        in_vocabulary[list(vocabulary.values())] = True
        return cls(
            vocab_size=vocab_size,
            pad_id=int(tokenizer.pad_token_id),
            cls_id=int(tokenizer.cls_token_id),
            sep_id=int(tokenizer.sep_token_id),
            mask_id=int(tokenizer.mask_token_id),
            is_special=is_special,
            continues_word=continues_word & ~is_special,
            ordinary_ids=np.flatnonzero(in_vocabulary & ~is_special),
        )


def _continuation_rule(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], bool]:
    """Tells whether a token carries on a word; known from how the vocabulary writes the starts of words."""
    vocabulary = tokenizer.get_vocab()
    for marker in ("\u0120", "\u2581"):  # byte-level BPE and SentencePiece mark the space before a word
        if sum(token.startswith(marker) for token in vocabulary) > len(vocabulary) // 10:
            return lambda token: not token.startswith(marker) and any(c.isalnum() for c in token)
    return lambda token: token.startswith("##")


def wordpiece_tokenizer(vocabulary: dict[str, int], lowercase: bool) -> PreTrainedTokenizerFast:
    """BERT's tokenizer around a WordPiece vocabulary (token -> id) that holds BERT's five special tokens."""
    model = WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=100)
    return _as_bert(Tokenizer(model), lowercase)


def _as_bert(tokenizer: Tokenizer, lowercase: bool) -> PreTrainedTokenizerFast:
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        do_lower_case=lowercase,
        **BERT_SPECIAL_TOKENS,
    )


def train_wordpiece(texts: Iterable[str], vocab_size: int, lowercase: bool = True) -> PreTrainedTokenizerFast:
    """A WordPiece tokenizer of at most `vocab_size` entries; the same for the same texts in the same order.

    Raises ValueError where the text holds too little for that many entries to mean anything (under 5 + its alphabet).
    """
    sample = list(texts)
    tokenizer = Tokenizer(WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    # The trainer numbers single characters as a hash map yields them, and breaks ties between merges by those numbers:
    # naming them all beforehand, in order, is what makes two runs agree.
    characters = _characters(sample, tokenizer)
    first_entries = list(BERT_SPECIAL_TOKENS.values()) + characters
    if vocab_size <= len(first_entries):
        raise ValueError(
            f"--train-tokenizer {vocab_size}: the special tokens and the text's single characters alone need "
            f"{len(first_entries)} entries; ask for more"
        )
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        show_progress=False,
        special_tokens=first_entries,
        limit_alphabet=_ALPHABET_CHARACTERS,
        continuing_subword_prefix="##",
    )
    tokenizer.train_from_iterator(sample, trainer)
    return wordpiece_tokenizer(tokenizer.get_vocab(), lowercase)


def _characters(texts: Iterable[str], tokenizer: Tokenizer) -> list[str]:
    """Entries for single characters: at the start of a word ("c") and inside one ("##c"), each list sorted.

    The most frequent characters after normalisation, ties by code point.
    """
    words: Counter[str] = Counter()
    for text in texts:
        words.update(tokenizer.normalizer.normalize_str(text).split())
    counts: Counter[str] = Counter()
    inside: set[str] = set()
    for word, count in words.items():
        inside.update(word[1:])
        for character in word:
            counts[character] += count
    kept = sorted(counts, key=lambda character: (-counts[character], character))[:_ALPHABET_CHARACTERS]
    return sorted(kept) + ["##" + c for c in sorted(inside.intersection(kept)) if not _stands_alone(c)]


def _stands_alone(character: str) -> bool:
    """Whether BERT's pre-tokenizer makes a token of this character: ASCII symbols and all Unicode punctuation."""
    if character.isascii():
        return not character.isalnum()
    return unicodedata.category(character).startswith("P")


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """`name`: a WordPiece vocabulary (a .txt file, an entry a line), a folder, or a name on the Hugging Face hub.

    A vocab.txt is taken as cased if an entry other than a [SPECIAL] one holds an upper-case letter.
    Raises FileNotFoundError or ValueError, each with the fix.
    """
    path = Path(name)
    if path.suffix == ".txt":
        return _from_vocab_file(path)
    if path.exists() or "/" not in name or name.count("/") == 1:
        try:
            tokenizer = AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError, ImportError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(
                f"--tokenizer {name}: not a vocab.txt, not a folder with a tokenizer, and not loadable from the "
                f"Hugging Face hub ({reason})"
            ) from None
        if not tokenizer.is_fast:
            raise ValueError(f"--tokenizer {name}: only fast tokenizers (with a tokenizer.json) are supported")
        return tokenizer
    raise FileNotFoundError(f"--tokenizer {name}: no such file or folder")


def _from_vocab_file(path: Path) -> PreTrainedTokenizerFast:
    if not path.is_file():
        raise FileNotFoundError(f"--tokenizer {path}: no such file")
    entries = path.read_text(encoding="utf-8").split("\n")
    while entries and not entries[-1]:
        entries.pop()
    vocabulary = {entry.rstrip("\r"): index for index, entry in enumerate(entries)}
    missing = [token for token in BERT_SPECIAL_TOKENS.values() if token not in vocabulary]
    if missing:
        raise ValueError(f"--tokenizer {path}: the vocabulary lacks {', '.join(missing)}")
    if len(vocabulary) != len(entries):
        raise ValueError(f"--tokenizer {path}: {len(entries) - len(vocabulary)} entries are there twice")
    cased = any(entry != entry.lower() for entry in vocabulary if not _looks_special(entry))
    return wordpiece_tokenizer(vocabulary, lowercase=not cased)


def _looks_special(entry: str) -> bool:
    return entry.startswith("[") and entry.endswith("]")


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """A fingerprint of what the tokenizer does: its vocabulary by id, its special tokens' roles, and the ids of a
    fixed probe text. Not of its files, whose form changes between library versions."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    roles = [tokenizer.pad_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.mask_token_id]
    probe = tokenizer.encode(_PROBE, add_special_tokens=False)
    content = json.dumps([vocabulary, roles, probe], ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(content.encode("ascii")).hexdigest()

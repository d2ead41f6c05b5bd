"""The tokenizer that makes the rows: found by its name, made from a vocab.txt, or trained on the text itself."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers.models import WordPiece
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from dwt_ds.base.words import one_line

BERT_SPECIAL_TOKENS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
# WordPiece keeps at most this many distinct characters; a rarer one becomes [UNK] (as in BERT's own vocabulary).
_ALPHABET_CHARACTERS = 1000


def find_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """`name`: a WordPiece vocabulary (a .txt file, one entry a line), a folder, or a name on the Hugging Face hub.

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
            raise ValueError(
                f"--tokenizer {name}: not a vocab.txt, not a folder with a tokenizer, and not loadable from the "
                f"Hugging Face hub ({one_line(error)})"
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


def wordpiece_tokenizer(vocabulary: dict[str, int], lowercase: bool) -> PreTrainedTokenizerFast:
    """BERT's tokenizer around a WordPiece vocabulary (token -> id) that holds BERT's five special tokens."""
    tokenizer = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=100))
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

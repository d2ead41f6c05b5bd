"""Finds the tokenizer that `--tokenizer` names, and builds BERT's from a vocabulary."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import WordPiece
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from dwt_ds.data.prepared import TOKENIZER_FOLDER
from dwt_ds.data.tokenizer import load_tokenizer
from dwt_ds.prepare import case_and_accents
from dwt_ds.prepare.case_and_accents import Treatment, Wishes
from dwt_ds.prepare.rows_tokenizer import why_text_is_lost

BERT_SPECIAL_TOKENS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
ROBERTA_SPECIAL_TOKENS = {
    "bos_token": "<s>",
    "cls_token": "<s>",
    "pad_token": "<pad>",
    "eos_token": "</s>",
    "sep_token": "</s>",
    "unk_token": "<unk>",
    "mask_token": "<mask>",
}
ESM_SPECIAL_TOKENS = {
    "cls_token": "<cls>",
    "pad_token": "<pad>",
    "eos_token": "<eos>",
    "sep_token": "<eos>",
    "unk_token": "<unk>",
    "mask_token": "<mask>",
}
# A longer word becomes the unknown token (BERT's own limit).
LONGEST_WORD = 100


def find_tokenizer(name: str, wishes: Wishes = Wishes()) -> PreTrainedTokenizerBase:  # noqa: B008
    """The tokenizer that `--tokenizer` names.

    Args:
        name: a WordPiece vocabulary (a .txt file, one entry a line), the folder of a tokenizer or of prepared data, or
            a name on the Hugging Face hub.
        wishes: for capitals and accents; what is left open follows from the entries of a vocab.txt.

    Raises:
        FileNotFoundError, ValueError: with the fix; also for a complete tokenizer that does not do what `wishes` say.
    """
    path = Path(name).expanduser()
    if path.suffix == ".txt":
        return _from_vocab_file(path, wishes)
    if not path.exists() and name.count("/") > 1:
        raise FileNotFoundError(f"--tokenizer {name}: no such file or folder; correct the path")
    of_data = path / TOKENIZER_FOLDER
    try:
        tokenizer = load_tokenizer(of_data if of_data.is_dir() else name)
    except FileNotFoundError as error:
        fix = "give a vocab.txt, a folder with a tokenizer, or a name on the hub"
        raise ValueError(f"--tokenizer {name}: {error}; {fix}") from None
    if not tokenizer.is_fast:
        raise ValueError(
            f"--tokenizer {name}: only fast tokenizers (with a tokenizer.json) are supported; choose another tokenizer"
        )
    case_and_accents.check_wishes(name, case_and_accents.of_tokenizer(tokenizer), wishes)
    reason = why_text_is_lost(tokenizer.backend_tokenizer)
    if reason:
        raise ValueError(f"--tokenizer {name}: {reason}, or choose another tokenizer")
    return tokenizer


def _from_vocab_file(path: Path, wishes: Wishes) -> PreTrainedTokenizerFast:
    if not path.is_file():
        raise FileNotFoundError(f"--tokenizer {path}: no such file; correct the path")
    try:
        entries = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"--tokenizer {path}: is not UTF-8 ({error}); save it as UTF-8") from None
    while entries and not entries[-1]:
        entries.pop()
    vocabulary = {entry: index for index, entry in enumerate(entries)}
    missing = [token for token in BERT_SPECIAL_TOKENS.values() if token not in vocabulary]
    if missing:
        raise ValueError(f"--tokenizer {path}: the vocabulary lacks {', '.join(missing)}; choose another tokenizer")
    if len(vocabulary) != len(entries):
        duplicates = len(entries) - len(vocabulary)
        raise ValueError(f"--tokenizer {path}: {duplicates} entries are duplicates; list each entry once")
    ordinary = [entry for entry in vocabulary if not case_and_accents.looks_special(entry)]
    return wordpiece_tokenizer(vocabulary, case_and_accents.of_vocabulary(ordinary, wishes))


def wordpiece_tokenizer(
    vocabulary: dict[str, int], treatment: Treatment, longest_word: int = LONGEST_WORD
) -> PreTrainedTokenizerFast:
    """BERT's tokenizer around a WordPiece vocabulary (token -> id) that holds BERT's five special tokens.

    A word of more than `longest_word` characters is [UNK].
    """
    tokenizer = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=longest_word))
    case, accents = treatment.lowercase, treatment.strip_accents
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=case, strip_accents=accents)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    set_frame(tokenizer, ("[CLS]", "[SEP]"), single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        do_lower_case=case,
        strip_accents=accents,
        **BERT_SPECIAL_TOKENS,
    )


def set_frame(tokenizer: Tokenizer, special: Iterable[str], *, single: str, pair: str) -> None:
    """Put special tokens around a text and around a pair of texts: templates of `TemplateProcessing`."""
    ids = [(name, tokenizer.token_to_id(name)) for name in special]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=ids)


def check_size(vocab_size: int, needed: int, of_what: str) -> None:
    """Raises ValueError if `vocab_size` leaves no room beyond the `needed` entries of `of_what`."""
    if vocab_size <= needed:
        raise ValueError(f"--train-tokenizer {vocab_size}: {of_what} alone need {needed} entries; ask for more")


def character_counts(words: Mapping[str, int]) -> Counter[str]:
    """How often each character is in a text, given its words and how often each of them is."""
    counts: Counter[str] = Counter()
    for word, count in words.items():
        for character in word:
            counts[character] += count
    return counts


def most_frequent_first(counts: Counter[str]) -> list[str]:
    """Ties are broken by the text, so that equal counts give equal lists."""
    return sorted(counts, key=lambda text: (-counts[text], text))

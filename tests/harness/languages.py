"""Paragraphs in nine languages, and tokenizers of each kind trained on them."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

# Each with several sentences, with the marks and the spaces that its readers expect.
PARAGRAPHS = {
    "English": "The old lamp doesn't work. We bought another one at 3.50 pounds! Would you like to see it?",
    "German": "Die Straße führt über den großen Fluss. Dort wohnt ein älterer Bäcker. Schön ist es auch.",
    "French": "L’été dernier, nous étions à Orléans. La forêt était gelée en février. Où est passée la clé du garçon ?",
    "Russian": "Старый фонарь на столе не работает. Мы купили другой ещё вчера. Хотите на него посмотреть?",
    "Hindi": "लड़का मेज़ पर किताब पढ़ता है। उसकी बहन बाज़ार से फल लाती है। क्या आप भी चाय पीते हैं?",
    "Arabic": "كتب الولد رسالة طويلة إلى أخته. هل تأتي إلى المدينة غدا؟ الطقس جميل في هذا الشهر.",
    "Thai": "เด็กชายอ่านหนังสืออยู่บนโต๊ะ น้องสาวของเขาซื้อผลไม้จากตลาด พรุ่งนี้เราจะไปเที่ยวทะเลด้วยกัน",
    "Chinese": "桌子上的旧台灯已经坏了。我们昨天又买了一盏新的灯！你想不想过来看一看呢？",
    "Japanese": "机の上の古いランプは壊れています。私たちは昨日新しいランプを買いました。あなたも見に来ませんか？",
}
WITHOUT_SPACES = ("Chinese", "Japanese")
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
WITH_SPECIAL = "Here <s> and <mask> hide, <pad> fills, </s> ends, <unk> is unknown, [MASK] too."
_TEXTS = [*PARAGRAPHS.values(), WITH_SPECIAL] * 3


def _wordpiece(lowercase: bool, strip_accents: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase, strip_accents=strip_accents)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator(
        _TEXTS, trainers.WordPieceTrainer(vocab_size=520, special_tokens=SPECIAL, show_progress=False)
    )
    return tokenizer


def _byte_level(add_prefix_space: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXTS, trainer)
    return tokenizer


def _end_of_word_bpe() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.BPEDecoder()
    trainer = trainers.BpeTrainer(
        vocab_size=520, special_tokens=SPECIAL, end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator(_TEXTS, trainer)
    return tokenizer


def _unigram(pre_tokenizer: pre_tokenizers.PreTokenizer, normalizer: normalizers.Normalizer | None = None) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=500, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(_TEXTS, trainer)
    return tokenizer


def byte_fallback_bpe() -> Tokenizer:
    """Llama's kind, as the library trains it: only special tokens can become the entries of bytes."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, max_token_length=8, show_progress=False)
    tokenizer.train_from_iterator([PARAGRAPHS["English"]] * 3, trainer)
    return tokenizer


def _characters() -> Tokenizer:
    names = [*SPECIAL, *sorted(set("".join(_TEXTS)))]
    tokenizer = Tokenizer(models.WordLevel({name: index for index, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "WordPiece, cased": lambda: _wordpiece(lowercase=False, strip_accents=False),
    "WordPiece, uncased": lambda: _wordpiece(lowercase=True, strip_accents=True),
    "WordPiece, uncased with accents": lambda: _wordpiece(lowercase=True, strip_accents=False),
    "byte-level BPE": lambda: _byte_level(add_prefix_space=False),
    "byte-level BPE, prefix space": lambda: _byte_level(add_prefix_space=True),
    "BPE </w>": _end_of_word_bpe,
    "Unigram": lambda: _unigram(pre_tokenizers.Metaspace()),
    "Unigram, as XLM-R": lambda: _unigram(
        pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    ),
    "Unigram, as DeBERTa-v3": lambda: _unigram(
        pre_tokenizers.Metaspace(), normalizers.Sequence([normalizers.Strip(), normalizers.NFC()])
    ),
    "characters": _characters,
}
# Their tokens hold all of the text; the others leave out or add spaces.
LOSSLESS = (
    "byte-level BPE",
    "byte-level BPE, prefix space",
    "Unigram",
    "Unigram, as XLM-R",
    "Unigram, as DeBERTa-v3",
    "characters",
)


def trained(kind: str) -> Tokenizer:
    """A tokenizer of that kind whose special tokens are known as such."""
    tokenizer = KINDS[kind]()
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


@lru_cache
def tokenizer_of(kind: str) -> Tokenizer:
    """As `trained`, but one for all tests, which must not change it."""
    return trained(kind)


def with_roles(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """The tokenizer as transformers has it, its special tokens in their roles."""
    names = ("cls_token", "pad_token", "sep_token", "unk_token", "mask_token")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **dict(zip(names, SPECIAL, strict=True)))

"""The text that each token of a vocabulary stands for."""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from dwt_ds.data.text_tokenizer import Form, bytes_of_fallback, parts
from dwt_ds.data.tokenizer import vocabulary_size

# Pre-tokenizers that drop spaces.
_WITHOUT_SPACES = ("BertPreTokenizer", "Whitespace", "WhitespaceSplit", "CharDelimiterSplit")


@dataclass(frozen=True)
class TokenTexts:
    """The texts of a vocabulary's V tokens."""

    texts: list[bytes]
    """UTF-8, spaces included where tokens hold them; a byte-level token may be a part of a character. b"" for special
    tokens."""
    joins_left: np.ndarray
    """(V,) bool: the token follows the text before it directly: any space is in the texts themselves. If neither of two
    neighbours joins the other, there may be a space between them or not."""
    joins_right: np.ndarray
    """(V,) bool: likewise for the text after the token."""
    is_ordinary: np.ndarray
    """(V,) bool: entries that words are made of: not special or added tokens, not bytes of byte fallback."""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, whose: str) -> TokenTexts:
        """The texts of a tokenizer; `whose`, such as "the teacher's", is for errors.

        Raises ValueError, in one line, for a tokenizer that is not fast, or whose tokens lose their text.
        """
        if not tokenizer.is_fast:
            raise ValueError(
                f"teacher.vocabulary=shared: {whose} tokenizer is not a fast tokenizer, and only "
                "those give the offsets of tokens; save it as a tokenizer.json, or choose another model"
            )
        form: Form = json.loads(tokenizer.backend_tokenizer.to_str())
        vocabulary = tokenizer.get_vocab()
        entries = [""] * vocabulary_size(tokenizer)
        is_ordinary = np.zeros(len(entries), dtype=bool)
        for entry, index in vocabulary.items():
            entries[index] = entry
            is_ordinary[index] = True
        found = _texts(entries, form)
        if found is None:
            raise ValueError(
                f"teacher.vocabulary=shared: tokens of {whose} tokenizer ({form['model']['type']}) do not give their "
                "text back; choose WordPiece, byte-level BPE, a SentencePiece model or characters"
            )
        texts, joins_left, joins_right = found
        for token in form["added_tokens"]:
            is_ordinary[token["id"]] = False
            texts[token["id"]] = b"" if token["special"] else token["content"].encode()
        if form["model"].get("byte_fallback"):
            byte = bytes_of_fallback(entries)
            is_ordinary &= byte < 0
            for index in np.flatnonzero(byte >= 0).tolist():
                texts[index] = bytes([byte[index]])
        for index in tokenizer.all_special_ids:
            is_ordinary[index] = False
            texts[index] = b""
        return cls(texts, joins_left, joins_right, is_ordinary)


def _texts(entries: list[str], form: Form) -> tuple[list[bytes], np.ndarray, np.ndarray] | None:
    """(texts, joins_left, joins_right) of entries, by how the tokenizer marks spaces; None if it does not."""
    model, steps = form["model"], parts(form["pre_tokenizer"], "pretokenizers")
    none, every = np.zeros(len(entries), dtype=bool), np.ones(len(entries), dtype=bool)
    if any(step["type"] == "ByteLevel" for step in steps):
        byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
        return [bytes(byte_of[each] for each in entry if each in byte_of) for entry in entries], every, every
    mark = _space_mark(form)
    if mark is not None:
        return [entry.replace(mark, " ").encode() for entry in entries], every, every
    prefix, suffix = model.get("continuing_subword_prefix"), model.get("end_of_word_suffix")
    if model["type"] == "WordPiece":
        continues = np.array([entry.startswith(prefix) for entry in entries])
        return [entry.removeprefix(prefix).encode() for entry in entries], continues, none
    if suffix and not prefix:
        goes_on = np.array([not entry.endswith(suffix) for entry in entries])
        return [entry.removesuffix(suffix).encode() for entry in entries], none, goes_on
    texts = [entry.encode() for entry in entries]
    drops_spaces = any(step["type"] in _WITHOUT_SPACES or step.get("behavior") == "Removed" for step in steps)
    if not drops_spaces:
        return None if prefix else (texts, every, every)
    return (texts, none, none) if model["type"] == "WordLevel" else None


def _space_mark(form: Form) -> str | None:
    """The character for a space, such as SentencePiece's "▁"; None if there is none."""
    for step in [*parts(form["pre_tokenizer"], "pretokenizers"), *parts(form["decoder"], "decoders")]:
        if step["type"] == "Metaspace":
            return str(step["replacement"])
        if step["type"] == "Replace" and step["content"] == " " and step["pattern"].get("String"):
            return str(step["pattern"]["String"])
    return None

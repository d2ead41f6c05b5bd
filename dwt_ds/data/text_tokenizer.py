"""Tokenizers of the library `tokenizers` that treat names of special tokens as text, and offsets of byte tokens.

A tokenizer finds its special tokens in a text: by name (`[MASK]` in a page about BERT) or, in Unigram, like any other
piece. Worker processes of `prepare` import this module, so it does not import torch or transformers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import regex
from tokenizers import Tokenizer

Form = dict[str, Any]
"""A tokenizer or a part of one, as in tokenizer.json."""
BYTE_ENTRIES = tuple(f"<0x{byte:02X}>" for byte in range(256))
_BYTE = regex.compile(r"<0x([0-9A-F]{2})>")


def all_is_text(tokenizer: Tokenizer) -> Form:
    """The tokenizer without truncation, padding and added tokens, which finds no special token in a text; same ids."""
    form: Form = json.loads(tokenizer.to_str())  # as this version of the library writes it
    form |= {"truncation": None, "padding": None, "post_processor": None}
    _hide_special_tokens(form)
    return form


def load_form(form: Form) -> Tokenizer:
    """The tokenizer that `all_is_text` describes."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # workers are processes; threads inside would only compete
    tokenizer = Tokenizer.from_str(json.dumps(form))
    tokenizer.encode_special_tokens = True
    return tokenizer


def _hide_special_tokens(form: Form) -> None:
    """Give special tokens names that occur in no text, with the same ids: some models find them as entries of the
    vocabulary in spite of `encode_special_tokens`. One that text needs keeps its name: pieces of BPE merges, and the
    bytes of byte fallback, which the library's trainers can only make as special tokens."""
    model = form["model"]
    of_text = {piece for pair in model.get("merges", []) for piece in (*pair, "".join(pair))}
    if model.get("byte_fallback"):
        of_text.update(BYTE_ENTRIES)
    hidden = {}
    for token in form["added_tokens"]:
        if token["special"] and token["content"] not in of_text:
            hidden[token["content"]] = token["content"] = f"\0{token['content']}\0"
    vocabulary = model["vocab"]
    if isinstance(vocabulary, list):
        model["vocab"] = [[hidden.get(entry, entry), score] for entry, score in vocabulary]
    else:
        model["vocab"] = {hidden.get(entry, entry): index for entry, index in vocabulary.items()}
    if model.get("unk_token") is not None:
        model["unk_token"] = hidden.get(model["unk_token"], model["unk_token"])


def parts(component: Form | None, key: str) -> list[Form]:
    """The flat list of steps of a normalizer (key "normalizers"), pre-tokenizer ("pretokenizers") or decoder
    ("decoders")."""
    if component is None:
        return []
    if component["type"] != "Sequence":
        return [component]
    return [step for part in component[key] for step in parts(part, key)]


def bytes_of_fallback(entries: Sequence[str | None]) -> np.ndarray:
    """(V,) int64: the byte of an entry of byte fallback ("<0x00>" to "<0xFF>"), -1 for other entries."""
    found = [_BYTE.fullmatch(entry or "") for entry in entries]
    return np.array([int(match[1], 16) if match else -1 for match in found], dtype=np.int64)


def by_character(start: np.ndarray, end: np.ndarray, byte: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Correct the offsets (N,) of tokens for single bytes `byte` (N,; -1: other tokens) to those of their character.

    For several unknown characters in a row, the tokenizer gives each of their bytes the offsets of all of them.
    """
    is_byte = byte >= 0
    same = np.zeros(len(byte), dtype=bool)
    same[1:] = is_byte[1:] & is_byte[:-1] & (start[1:] == start[:-1]) & (end[1:] == end[:-1])
    run = np.maximum.accumulate(np.where(same, 0, np.arange(len(byte))))
    characters = np.cumsum(byte & 0xC0 != 0x80)  # other bytes than these begin a character in UTF-8
    start = np.where(is_byte, np.minimum(start + characters - characters[run], end - 1), start)
    return start, np.where(is_byte, start + 1, end)

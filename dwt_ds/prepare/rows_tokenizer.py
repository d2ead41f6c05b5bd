"""The tokenizer for rows: also encodes sentences inside a text, and treats names of special tokens as text.

A tokenizer treats each string as a whole text. For a sentence inside a paragraph this is wrong: SentencePiece
tokenizers, and RoBERTa's with `add_prefix_space`, would put a space before it, which Chinese does not have.
"""

from __future__ import annotations

import json

from tokenizers import Tokenizer, pre_tokenizers

from dwt_ds.data.text_tokenizer import BYTE_ENTRIES, Form, all_is_text, load_form, parts


class RowsTokenizer:
    """Two tokenizers out of one tokenizer.json: for the beginning of a text, and for text that goes on."""

    def __init__(self, path: str) -> None:
        form = all_is_text(Tokenizer.from_file(path))
        going_on = _going_on(form)
        self.beginning = load_form(form)
        self.going_on = self.beginning if going_on is form else load_form(going_on)
        self.unknown_id = _unknown_id(form["model"])
        """None if no text is unknown, as with all bytes in the vocabulary."""
        self.byte_fallback = bool(form["model"].get("byte_fallback"))
        """Whether unknown characters become tokens for their UTF-8 bytes, "<0x00>" to "<0xFF>"."""
        self.continuation_prefix: str | None = None
        """Prefix of tokens inside a word, for WordPiece with BERT's pre-tokenizer; None for others."""
        if form["model"]["type"] == "WordPiece" and (form["pre_tokenizer"] or {}).get("type") == "BertPreTokenizer":
            self.continuation_prefix = form["model"]["continuing_subword_prefix"]
        self.ends_words = bool(form["model"].get("end_of_word_suffix"))
        """Whether pieces at the end of a word differ from those inside it, as with "</w>"."""
        self.spaces_matter = self.going_on.encode(" a").ids != self.going_on.encode("a").ids
        self._gaps: dict[str, str] = {}

    def known_gap(self, gap: str) -> str:
        """The spaces before a sentence as the vocabulary can encode them: `gap` itself, one space, or none."""
        if gap not in self._gaps:
            self._gaps[gap] = next((known for known in (gap, " ") if self._is_known(known)), "")
        return self._gaps[gap]

    def _is_known(self, text: str) -> bool:
        return self.unknown_id not in self.going_on.encode(text).ids


def why_text_is_lost(tokenizer: Tokenizer) -> str:
    """Why the tokenizer would lose text, and the fix; empty if it has a token for everything, be it the unknown one.

    A model without an unknown token drops what its vocabulary lacks (BPE), or fails there (the others).
    """
    form: Form = json.loads(tokenizer.to_str())
    model = form["model"]
    if _unknown_id(model) is not None:
        return ""
    entries = {entry[0] for entry in model["vocab"]} if isinstance(model["vocab"], list) else set(model["vocab"])
    steps = [*parts(form["normalizer"], "normalizers"), *parts(form["pre_tokenizer"], "pretokenizers")]
    if any(step["type"] == "ByteLevel" for step in steps):
        # Characters of the bytes C0, C1 and F5 to FF, which UTF-8 never has.
        never = {chr(code) for code in (0xC0, 0xC1, *range(0xF5, 0x100))}
        lacking = len(set(pre_tokenizers.ByteLevel.alphabet()) - never - entries)
        fix = "train it with initial_alphabet=ByteLevel.alphabet() or an unk_token"
    elif model["type"] == "BPE" and model.get("byte_fallback"):
        lacking = len(set(BYTE_ENTRIES) - entries)
        fix = "add them or an unk_token"
    else:
        return "its model has no unknown token, so text that its vocabulary lacks would be lost; give it an unk_token"
    return f"its model has no unknown token, and its vocabulary lacks {lacking} bytes; {fix}" if lacking else ""


def _unknown_id(model: Form) -> int | None:
    if isinstance(model["vocab"], list):
        return model["unk_id"]
    return model["vocab"].get(model["unk_token"])


def _going_on(form: Form) -> Form:
    """The tokenizer that neither adds nor removes anything before a text; `form` itself if that does neither."""
    before = parts(form["normalizer"], "normalizers"), parts(form["pre_tokenizer"], "pretokenizers")
    # Strip has nothing to do: sentences have no spaces at their ends, and the gap before them is kept.
    normalizers = [part for part in before[0] if part["type"] not in ("Strip", "Prepend")]
    pre_tokenizers: list[Form] = []
    for part in before[1]:
        if part["type"] == "ByteLevel":
            pre_tokenizers.append(part | {"add_prefix_space": False})
        elif part["type"] == "Metaspace" and part["prepend_scheme"] != "never":
            if any(earlier["type"] == "WhitespaceSplit" for earlier in pre_tokenizers):
                # It removes the spaces and Metaspace puts one before each piece; let Metaspace find them instead.
                pre_tokenizers = [earlier for earlier in pre_tokenizers if earlier["type"] != "WhitespaceSplit"]
                normalizers.append({"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "})
            pre_tokenizers.append(part | {"prepend_scheme": "never"})
        else:
            pre_tokenizers.append(part)
    if (normalizers, pre_tokenizers) == before:
        return form
    return form | {
        "normalizer": _steps(normalizers, "normalizers"),
        "pre_tokenizer": _steps(pre_tokenizers, "pretokenizers"),
    }


def _steps(steps: list[Form], key: str) -> Form | None:
    return {"type": "Sequence", key: steps} if steps else None

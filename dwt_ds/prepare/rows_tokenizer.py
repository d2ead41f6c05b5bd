"""The tokenizer as rows need it: made of a tokenizer.json, but for text that goes on, and in which all is text.

A tokenizer takes each string for a whole text. A sentence inside a paragraph is none: RoBERTa's tokenizer with
`add_prefix_space` and every SentencePiece one would put a space before it, where Chinese has none.
"""

from __future__ import annotations

from tokenizers import Tokenizer

from dwt_ds.data.text_tokenizer import Form, all_is_text, load_form, parts


class RowsTokenizer:
    """Two tokenizers of one vocabulary, for the beginning of a text and for text that goes on.

    Args:
        path: of a tokenizer.json.
    """

    def __init__(self, path: str) -> None:
        form = all_is_text(Tokenizer.from_file(path))
        going_on = _going_on(form)
        self.beginning = load_form(form)
        self.going_on = self.beginning if going_on is None else load_form(going_on)
        self.unknown_id = _unknown_id(form["model"])
        """None where every text has tokens of its own, as with all bytes in the vocabulary."""
        self.byte_fallback = bool(form["model"].get("byte_fallback"))
        """Whether unknown characters become tokens for their UTF-8 bytes, "<0x00>" to "<0xFF>"."""
        self.continuation_prefix: str | None = None
        """What begins the tokens inside a word, where BERT's pre-tokenizer makes the words of a WordPiece model."""
        if form["model"]["type"] == "WordPiece" and (form["pre_tokenizer"] or {}).get("type") == "BertPreTokenizer":
            self.continuation_prefix = form["model"]["continuing_subword_prefix"]
        self.ends_words = bool(form["model"].get("end_of_word_suffix"))
        """Whether a piece at the end of a word is another than inside it, as with "</w>"."""
        self.spaces_matter = self.going_on.encode(" a").ids != self.going_on.encode("a").ids
        self._gaps: dict[str, str] = {}

    def known_gap(self, gap: str) -> str:
        """`gap`, the spaces before a sentence, as the vocabulary can write it: as they are, one space, or none."""
        if gap not in self._gaps:
            self._gaps[gap] = next((known for known in (gap, " ") if self._is_known(known)), "")
        return self._gaps[gap]

    def _is_known(self, text: str) -> bool:
        return self.unknown_id not in self.going_on.encode(text).ids


def _unknown_id(model: Form) -> int | None:
    if isinstance(model["vocab"], list):
        return model["unk_id"]
    return model["vocab"].get(model["unk_token"])


def _going_on(form: Form) -> Form | None:
    """The same tokenizer, which neither adds nor removes anything before a text; None where this one does not."""
    normalizers: list[Form] = []
    for part in parts(form["normalizer"], "normalizers"):
        if part["type"] not in ("Strip", "Prepend"):  # sentences have no spaces at their ends, and their gap is kept
            normalizers.append(part)
    pre_tokenizers: list[Form] = []
    for part in parts(form["pre_tokenizer"], "pretokenizers"):
        if part["type"] == "ByteLevel":
            pre_tokenizers.append(part | {"add_prefix_space": False})
        elif part["type"] == "Metaspace" and part["prepend_scheme"] != "never":
            if any(earlier["type"] == "WhitespaceSplit" for earlier in pre_tokenizers):
                # It takes the spaces away, and Metaspace puts one before each piece: let Metaspace find them instead.
                pre_tokenizers = [earlier for earlier in pre_tokenizers if earlier["type"] != "WhitespaceSplit"]
                normalizers.append({"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "})
            pre_tokenizers.append(part | {"prepend_scheme": "never"})
        else:
            pre_tokenizers.append(part)
    changed = {
        "normalizer": _steps(normalizers, "normalizers"),
        "pre_tokenizer": _steps(pre_tokenizers, "pretokenizers"),
    }
    before = {
        "normalizer": _steps(parts(form["normalizer"], "normalizers"), "normalizers"),
        "pre_tokenizer": _steps(parts(form["pre_tokenizer"], "pretokenizers"), "pretokenizers"),
    }
    return None if changed == before else form | changed


def _steps(steps: list[Form], key: str) -> Form | None:
    return {"type": "Sequence", key: steps} if steps else None

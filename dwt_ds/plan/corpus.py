"""What the plan knows of the data: a prepared folder's manifest, or the paper's corpus if there is no folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dwt_ds.config.schema import DataConfig
from dwt_ds.data.manifest import MANIFEST_NAME, ONE_SENTENCE_PER_ROW, read_manifest
from dwt_ds.data.masks import labels_by_length

# Lee et al. (2023): one of every four sentences of Wikipedia and BookCorpus. Tokens a sentence as `dwt-ds prepare
# --every 4` packs them, [CLS] and [SEP] included: 30.8 on 4 MB of Wikipedia, 24.2 on 4 MB of books, mixed like the
# 2,500M and 800M words of the two corpora (Devlin et al. 2019, section 3.1).
PAPER_SENTENCES = 30_000_000
TOKENS_PER_SENTENCE = 28.9
PAPER_SEQ_LEN = 128
PAPER_VOCABULARY = 30_522


@dataclass(frozen=True)
class Corpus:
    """Rows and their contents."""

    rows: int
    """Training rows."""
    seq_len: int
    tokens_per_row: float
    """Real tokens, padding excluded."""
    vocab_size: int
    pad_token_id: int
    validation_rows: int | None
    """Held-out rows; None: not known."""
    fingerprint: str | None
    """The manifest's, of the rows; None: there is no data folder, and the figures are assumed."""
    source: str
    """Where the figures come from, in words."""

    def labels_per_row(self, mask_probability: float) -> int:
        """Labelled tokens of a full row, as `dwt_ds.data.masks` draws them."""
        return int(labels_by_length(np.array(self.seq_len), mask_probability))


def corpus_of(data: DataConfig) -> Corpus:
    """The data folder's corpus, or the paper's if there is no such folder.

    Raises ValueError or FileNotFoundError for a folder that exists but cannot be used.
    """
    folder = Path(data.dir).expanduser()
    if not (folder / MANIFEST_NAME).is_file() and not folder.is_dir():
        return paper_corpus(data.dir)
    manifest = read_manifest(folder)
    tokens_per_row = manifest.tokens / max(1, manifest.rows + manifest.validation_rows)
    form = ", a sentence a row" if manifest.form == ONE_SENTENCE_PER_ROW else ""
    return Corpus(
        rows=manifest.rows,
        seq_len=manifest.seq_len,
        tokens_per_row=tokens_per_row,
        vocab_size=manifest.vocab_size,
        pad_token_id=int(manifest.settings["pad_id"]),
        validation_rows=manifest.validation_rows,
        fingerprint=manifest.fingerprint,
        source=f"{data.dir}: {manifest.sentences_kept:,} sentences in {manifest.rows:,} rows{form}",
    )


def paper_corpus(missing: str) -> Corpus:
    """30M sentences, packed into rows of 128 tokens of BERT's vocabulary."""
    rows = int(PAPER_SENTENCES * TOKENS_PER_SENTENCE / PAPER_SEQ_LEN)
    return Corpus(
        rows=rows,
        seq_len=PAPER_SEQ_LEN,
        tokens_per_row=float(PAPER_SEQ_LEN),
        vocab_size=PAPER_VOCABULARY,
        pad_token_id=0,
        validation_rows=None,
        fingerprint=None,
        source=(
            f"assumed, since {missing} does not exist: the paper's {PAPER_SENTENCES / 1e6:.0f}M sentences of "
            f"{TOKENS_PER_SENTENCE} tokens, packed into {rows:,} rows of {PAPER_SEQ_LEN} tokens, vocabulary "
            f"{PAPER_VOCABULARY:,}"
        ),
    )

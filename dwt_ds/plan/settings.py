"""A plan's settings: resolved as a run's are, with the paper's corpus where the data folder is missing."""

from __future__ import annotations

from pathlib import Path

from dwt_ds.base.words import prefix_errors
from dwt_ds.config.recipe import load_recipe
from dwt_ds.config.schema import DataConfig
from dwt_ds.data.manifest import read_data_manifest
from dwt_ds.run.resolve import Corpus, Resolved, resolve

# Lee et al. (2023): one of every four sentences of Wikipedia and BookCorpus. Tokens a sentence as `dwt-ds prepare
# --every 4` packs them, [CLS] and [SEP] included: 30.8 on 4 MB of Wikipedia, 24.2 on 4 MB of books, mixed like the
# 2,500M and 800M words of the two corpora (Devlin et al. 2019, section 3.1).
PAPER_SENTENCES = 30_000_000
TOKENS_PER_SENTENCE = 28.9
PAPER_SEQ_LEN = 128
PAPER_VOCABULARY = 30_522


def resolve_plan(recipe: str, overrides: list[str], deepspeed_config: str | None, world_size: int) -> Resolved:
    """Load a recipe and resolve it for `world_size` ranks; needs neither ranks nor data nor teacher.

    Raises:
        ValueError, OSError: one line for the mistakes that a run would stop at, except for those that show only on its
            devices or in the data's rows.
    """
    loaded = load_recipe(recipe, overrides)
    eval_sets = {}
    for name, path in (loaded.config.train.eval_sets or {}).items():
        folder = Path(path).expanduser()
        if folder.is_dir():
            with prefix_errors(f"train.eval_sets.{name}"):
                eval_sets[name] = Corpus.of(read_data_manifest(folder), path)
    return resolve(loaded, deepspeed_config, world_size, corpus_of(loaded.config.data), eval_sets)


def corpus_of(data: DataConfig) -> Corpus:
    """The data folder's corpus, or the paper's if there is no such folder.

    Raises ValueError or FileNotFoundError for a folder that exists but cannot be used.
    """
    folder = Path(data.dir).expanduser()
    if not folder.is_dir():
        return paper_corpus(data.dir)
    return Corpus.of(read_data_manifest(folder), data.dir)


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

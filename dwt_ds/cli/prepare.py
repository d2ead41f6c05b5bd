"""Make a data folder for training out of raw text: sentences, tokens, rows of equal length, and a manifest.

Text comes from files (.txt with a paragraph a line and a blank line between documents; JSON lines, whatever they are
called; .parquet; FASTA; plain or .gz, .xz, .zst), from datasets on the Hugging Face hub, or from the documentation of
the installed Python packages; several may be given and are used together. After an interruption the same command
resumes. The result does not depend on the number of workers. --show without a source shows an existing folder.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING

from dwt_ds.base.processes import home_path
from dwt_ds.cli.options import options_of

if TYPE_CHECKING:
    from dwt_ds.prepare.options import PrepareOptions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    sources = parser.add_argument_group("what to read")
    sources.add_argument("--text", nargs="+", action="extend", default=[], metavar="FILE", help="files or globs")
    sources.add_argument(
        "--dataset",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME[:CONFIG[:SPLIT]]",
        help="datasets on the Hugging Face hub, or local folders that `datasets` reads; SPLIT is train by default",
    )
    sources.add_argument(
        "--streaming", action="store_true", help="read datasets twice over the network, storing nothing"
    )
    sources.add_argument(
        "--docs", action="store_true", help="the documentation of the installed Python packages (about 17 MB)"
    )
    sources.add_argument(
        "--text-column", default="text", metavar="NAME", help="column of a record's text (default: %(default)s)"
    )
    sources.add_argument(
        "--encoding",
        default="utf-8",
        metavar="NAME",
        help="encoding of text files and of columns of bytes, by its name in Python: gb18030, cp1252, utf-16 ... "
        "(default: %(default)s)",
    )
    sources.add_argument(
        "--records-are-lines",
        action="store_true",
        help="each record of a .jsonl, .parquet or dataset is a line, an empty one ends a document (BookCorpus, "
        "WikiText); default: each is a document",
    )

    tokenizer = parser.add_argument_group("tokenizer (one of the first two)")
    tokenizer.add_argument(
        "--tokenizer",
        metavar="VOCAB_OR_NAME",
        help="a vocab.txt, a folder of a tokenizer or of prepared data, or a name on the hub",
    )
    tokenizer.add_argument(
        "--train-tokenizer", type=int, metavar="N", help="train a tokenizer of N entries on the text"
    )
    tokenizer.add_argument(
        "--kind",
        default="wordpiece",
        choices=("wordpiece", "bpe", "unigram", "characters"),
        help="kind of the tokenizer trained here: wordpiece (like BERT's), bpe (byte-level, like RoBERTa's), unigram "
        "(like XLM-R's; unknown characters become bytes), characters (one entry each, for proteins); default: "
        "%(default)s",
    )
    case = tokenizer.add_mutually_exclusive_group()
    case.add_argument(
        "--cased",
        action="store_true",
        default=None,
        help="keep capitals; default: decided by the entries of a vocab.txt; of the tokenizers trained here, only "
        "wordpiece drops capitals",
    )
    case.add_argument("--uncased", dest="cased", action="store_false", default=None, help="drop capitals")
    accents = tokenizer.add_mutually_exclusive_group()
    accents.add_argument(
        "--keep-accents",
        action="store_true",
        default=None,
        help="keep accents and vowel signs; default: decided by the entries of a vocab.txt, or by the training text",
    )
    accents.add_argument(
        "--strip-accents", dest="keep_accents", action="store_false", default=None, help="remove accents"
    )

    tokenizer.add_argument(
        "--allow-unknown",
        action="store_true",
        help="continue even if more than a fifth of the tokens are unknown to the tokenizer",
    )

    rows = parser.add_argument_group("sentences and rows")
    rows.add_argument(
        "--every", type=int, default=1, metavar="K", help="take one of every K sentences (default: %(default)s)"
    )
    rows.add_argument("--seq-len", type=int, default=128, metavar="S", help="tokens of a row (default: %(default)s)")
    rows.add_argument(
        "--one-sentence-per-row",
        action="store_true",
        help="a row for each sentence, batches grouped by length; default: rows filled with running text",
    )
    rows.add_argument(
        "--keep-documents-apart",
        action="store_true",
        help="each document starts a new row; costs padding; default: they share rows, with [SEP] between them",
    )
    rows.add_argument(
        "--min-chars", type=int, default=10, metavar="N", help="drop shorter sentences (default: %(default)s)"
    )
    rows.add_argument(
        "--max-chars", type=int, default=2000, metavar="N", help="cut longer sentences (default: %(default)s)"
    )
    rows.add_argument("--drop-long", action="store_true", help="drop sentences over --max-chars rather than cut them")
    rows.add_argument("--keep-duplicates", action="store_true", help="keep lines that repeat an earlier line")
    rows.add_argument(
        "--validation", type=float, default=0.01, metavar="SHARE", help="share held out (default: %(default)s)"
    )
    rows.add_argument("--seed", type=int, default=0, help="decides what is sampled and held out (default: %(default)s)")

    parser.add_argument("--out", type=home_path, required=True, metavar="DIR", help="the data folder")
    parser.add_argument(
        "--workers", type=int, default=_cores(), metavar="N", help="processes (default: all cores, here %(default)s)"
    )
    parser.add_argument("--show", type=int, default=0, metavar="N", help="print N rows with their masks at the end")


def main(args: argparse.Namespace) -> int:
    from dwt_ds.config.schema import DataConfig
    from dwt_ds.data.manifest import read_data_manifest
    from dwt_ds.data.prepared import PreparedData
    from dwt_ds.data.show import examples, manifest_table, warnings_of
    from dwt_ds.prepare.pipeline import prepare

    if args.show < 0:
        raise ValueError(f"--show={args.show}: must be at least 0")
    if args.show and not (args.text or args.dataset or args.docs):
        manifest = read_data_manifest(args.out)
    else:
        options = prepare_options(args)
        try:
            manifest = prepare(options)
        except KeyboardInterrupt:
            print("interrupted: the same command resumes from here", file=sys.stderr)
            return 130
    print(manifest_table(manifest), end="")
    print(f"\n{args.out} is ready" + (f"; {args.show} rows, {{true -> shown}}:" if args.show else ""))
    if args.show:
        for example in examples(PreparedData.open(args.out), args.show, DataConfig(), args.seed):
            print(f"\n{example}")
    for warning in warnings_of(manifest):
        print(f"warning: {warning}")
    return 0


def prepare_options(args: argparse.Namespace) -> PrepareOptions:
    """What the parsed options, or those of `dwt_ds.api.prepare`, ask for."""
    from dwt_ds.prepare.documentation import InstalledDocumentation
    from dwt_ds.prepare.encoding import known_encoding
    from dwt_ds.prepare.hub import HubDataset
    from dwt_ds.prepare.options import PrepareOptions
    from dwt_ds.prepare.reading import find_files
    from dwt_ds.prepare.sources import Source, TextForm

    form = TextForm(args.text_column, args.records_are_lines, known_encoding(args.encoding))
    sources: list[Source] = [*find_files(args.text, form)]
    sources += [HubDataset.parse(name, args.streaming, form) for name in args.dataset]
    if args.docs:
        sources.append(InstalledDocumentation(workers=args.workers))
    given = options_of(PrepareOptions, args)
    return PrepareOptions(**given, sources=sources, join_documents=not args.keep_documents_apart)


def _cores() -> int:
    return len(os.sched_getaffinity(0))

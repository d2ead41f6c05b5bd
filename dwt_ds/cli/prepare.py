"""Make a data folder for training out of raw text: sentences, tokens, rows, a manifest."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from dwt_ds.data.documentation import InstalledDocumentation
from dwt_ds.data.prepare import PrepareOptions, prepare
from dwt_ds.data.reading import Source, find_files


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--text", nargs="+", default=[], metavar="FILE", help="text files or globs")
    parser.add_argument("--docs", action="store_true", help="the documentation of the installed Python packages")
    parser.add_argument("--tokenizer", help="a vocab.txt, a tokenizer folder or a name on the Hugging Face hub")
    parser.add_argument("--train-tokenizer", type=int, metavar="N", help="train a WordPiece tokenizer of N entries")
    parser.add_argument("--cased", action="store_true", help="keep upper case in a tokenizer trained here")
    parser.add_argument("--out", type=Path, required=True, help="the data folder to make")
    parser.add_argument("--every", type=int, default=1, help="take one of every EVERY sentences")
    parser.add_argument("--seq-len", type=int, default=128, help="tokens a row")
    parser.add_argument("--one-sentence-per-row", action="store_true", help="a row for each sentence, as the paper has it")
    parser.add_argument("--keep-documents-apart", action="store_true", help="no row holds text of two documents")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--validation", type=float, default=0.01, help="share of documents held out")
    parser.add_argument("--workers", type=int, default=os.cpu_count())


def main(args: argparse.Namespace) -> int:
    sources: list[Source] = list(find_files(args.text, "text"))
    if args.docs:
        sources.append(InstalledDocumentation())
    manifest = prepare(
        PrepareOptions(
            sources=sources,
            out=args.out,
            tokenizer=args.tokenizer,
            train_tokenizer=args.train_tokenizer,
            cased=args.cased,
            seq_len=args.seq_len,
            every=args.every,
            one_sentence_per_row=args.one_sentence_per_row,
            join_documents=not args.keep_documents_apart,
            validation=args.validation,
            seed=args.seed,
            workers=args.workers,
        )
    )
    print(manifest.to_json())
    return 0

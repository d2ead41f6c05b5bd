"""Configurations and sizes of a run's models, from the files that are on this machine."""

from __future__ import annotations

from pathlib import Path

from transformers import PretrainedConfig

from dwt_ds.base.files import MANIFEST
from dwt_ds.base.run_files import EXPORT
from dwt_ds.config.recipe import parse_run_config
from dwt_ds.models.build import parameter_count, student_model_config
from dwt_ds.models.flops import meta_model
from dwt_ds.models.load import load_model_config
from dwt_ds.plan.settings import corpus_of
from dwt_ds.plan.shapes import corpus_sizes
from dwt_ds.run.resolve import Corpus
from dwt_ds.study.records import RunRecord


def data_of(run: RunRecord) -> Corpus | None:
    """Facts of the run's data; None if the data folder is not on this machine, or was prepared again since."""
    data = parse_run_config(run.config).data
    if not (Path(data.dir).expanduser() / MANIFEST).is_file():
        return None
    corpus = corpus_of(data)
    return corpus if run.data_fingerprint in (None, corpus.fingerprint) else None


def student_config(run: RunRecord) -> PretrainedConfig | None:
    """From the export or, before there is one, from recipe and data folder; None if neither is there."""
    if (run.path / EXPORT / "config.json").is_file():
        return load_model_config(run.path / EXPORT)
    corpus = data_of(run)
    if corpus is None:
        return None
    return student_model_config(parse_run_config(run.config).student, **corpus_sizes(corpus))


def teacher_config(run: RunRecord) -> PretrainedConfig | None:
    """From the teacher's folder; None without a teacher, or if the folder is not on this machine."""
    path = run.config["teacher"]["path"]
    folder = Path(path).expanduser() if path else None
    return load_model_config(folder) if folder is not None and (folder / "config.json").is_file() else None


def size_in_words(config: PretrainedConfig | None) -> str:
    """`6 x 128, 1.93 M parameters`: layers, width and parameters, tied ones counted once."""
    if config is None:
        return "not known"
    count = parameter_count(meta_model(config))
    return f"{config.num_hidden_layers} x {config.hidden_size}, {count / 1e6:,.2f} M parameters"

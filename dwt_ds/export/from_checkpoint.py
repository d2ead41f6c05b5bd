"""A Hugging Face folder out of a checkpoint, after the run or during it."""

from __future__ import annotations

import sys
from pathlib import Path

from dwt_ds.base.files import MANIFEST, problems, read_manifest, through_links
from dwt_ds.base.locks import LOCK_NAME, FolderLock
from dwt_ds.base.run_files import CHECKPOINTS, EXPORT, METRICS, TOKENIZER
from dwt_ds.config.quantization import parse_quantization
from dwt_ds.config.schema import StudentConfig
from dwt_ds.data.tokenizer import load_tokenizer
from dwt_ds.engine.checkpoint.manifest import RunFacts, RunState, newest_checkpoint
from dwt_ds.engine.checkpoint.weights import checkpoint_fp32_weights
from dwt_ds.export.model_card import held_out_losses_at, model_card
from dwt_ds.export.writer import write_export
from dwt_ds.models.build import build_student, data_sizes

# Names of the student's parameters inside the trained objective.
_PREFIX = "student.model."


def export_checkpoint(path: Path, out: Path) -> int:
    """Write the student of a run's newest good checkpoint, or of the checkpoint at `path`, to `out`.

    Returns the step it stands at.

    Raises:
        ValueError: no checkpoint there, a damaged one, or `out` exists, is the run's own, or is being written.
        FileNotFoundError: the run's tokenizer cannot be read.
        RuntimeError: the folder, read back, gives other logits.
    """
    checkpoint = _find(path.absolute())  # its parents are the run's folders, also of one named within them
    run = checkpoint.parent.parent
    beside = through_links(out)
    if beside == through_links(run / EXPORT):
        raise ValueError(f"--out {out}: the run itself writes there; name another folder")
    with FolderLock(beside.parent, f"--out {out}", name=f".{beside.name}{LOCK_NAME}"):
        if beside.exists():
            raise ValueError(f"--out {out}: exists already; name a new folder")
        return _export(checkpoint, run, out)


def _export(checkpoint: Path, run: Path, out: Path) -> int:
    manifest = read_manifest(checkpoint)
    if "state" not in manifest:
        raise ValueError(f"{checkpoint}: not a checkpoint; name a run, or a folder in its checkpoints/")
    facts, state = RunFacts.from_manifest(manifest), RunState(**manifest["state"])
    tokenizer = load_tokenizer(run / TOKENIZER)
    # Weights do not depend on the attention's implementation, which this machine may lack.
    student = StudentConfig(**{**facts.settings["student"], "attention": "eager"})
    model = build_student(student, **data_sizes(tokenizer, vocab_size=facts.vocab_size, seq_len=facts.seq_len))
    trained = checkpoint_fp32_weights(checkpoint)
    weights = {name: trained[_PREFIX + name] for name in model.state_dict() if _PREFIX + name in trained}
    card = model_card(facts, state, held_out_losses_at(state.step, run / METRICS))
    quantization = parse_quantization(student.quantization)
    write_export(model, weights, tokenizer, card, out, seq_len=facts.seq_len, quantization=quantization)
    return state.step


def _find(path: Path) -> Path:
    if (path / MANIFEST).is_file():
        found = problems(path)
        if found:
            raise ValueError(f"{path}: not a good checkpoint: {found[0]}; name the run, or another of its checkpoints")
        return path
    newest = newest_checkpoint(path / CHECKPOINTS)
    if newest.path is None:
        raise ValueError(f"{path}: no good checkpoint there{'; ' + newest.damaged[0] if newest.damaged else ''}")
    for problem in newest.damaged:
        print(f"checkpoint not used: {problem}", file=sys.stderr)
    return newest.path

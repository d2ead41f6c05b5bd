"""`make quickstart`: data, a weak teacher, the same student alone and distilled, and a page that compares them.

Every model is trained by DeepSpeed under ZeRO-2, as a user would do it; the commands are printed.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from dwt_ds.base.files import MANIFEST
from dwt_ds.base.gpus import gpu_count
from dwt_ds.base.processes import own_command
from dwt_ds.base.quiet import quieten_libraries
from dwt_ds.base.run_files import EXPORT
from dwt_ds.base.words import table
from dwt_ds.study.records import RunRecord

DATA = Path("data/quickstart")
RUNS = Path("runs/quickstart")
VOCABULARY = 8000
MASKED_SENTENCE = "returns a new [MASK] with the same shape as the input."

# The three runs: a recipe and what is changed in it.
RUN_RECIPES: dict[str, list[str]] = {
    "teacher": ["quickstart_teacher"],
    "alone": ["quickstart", "teacher.path=null"],
    "distilled": ["quickstart"],
}


def main() -> int:
    """Exit code 0 when all three runs are complete."""
    began = time.perf_counter()
    if not (DATA / MANIFEST).is_file():
        words = ["--docs", "--train-tokenizer", str(VOCABULARY), "--seq-len", "128", "--out", str(DATA)]
        _run("prepare", *words)
    for name, recipe in RUN_RECIPES.items():
        _run("launch", *recipe, f"output_dir={RUNS}/{name}", *_precision())
    runs = [RunRecord(name, RUNS / name) for name in RUN_RECIPES]
    _print_table(runs)
    quieten_libraries()
    # Imported here: it needs matplotlib, of which the data and the runs have no need.
    from dwt_ds.study.report import write_report

    _fill_mask(RUNS / "distilled" / EXPORT)
    page = write_report([run.path for run in runs], RUNS / "report", against="alone")
    print(f"\ndone in {time.perf_counter() - began:.0f} s")
    print(f"student: {RUNS}/distilled/export   its settings: {RUNS}/distilled/config.yaml")
    print(f"the three runs beside one another, for a browser: {page}")
    return 0


def _precision() -> list[str]:
    """fp32 where a CPU has no instructions for the recipes' bf16: torch emulates them, at a fraction of the speed."""
    capabilities = torch.cpu.get_capabilities()
    in_hardware = any(value for name, value in capabilities.items() if name.endswith("bf16"))
    return [] if gpu_count() or in_hardware else ["deepspeed_config=zero2_fp32"]


def _run(*arguments: str) -> None:
    print(f"\n$ dwt-ds {' '.join(arguments)}", flush=True)
    # Ctrl-C reaches the command as well, which saves and ends; subprocess.run would kill it within a second.
    former = signal.signal(signal.SIGINT, lambda *_: None)
    exit_code = subprocess.run(own_command(*arguments)).returncode
    signal.signal(signal.SIGINT, former)
    if exit_code:
        raise SystemExit(f"error: the command above ended with exit code {exit_code}; make quickstart resumes there")


def _print_table(runs: Sequence[RunRecord]) -> None:
    rows = [("model", "held-out MLM loss", "seconds", "tokens/s")]
    for run in runs:
        tokens, seconds = (run.training[-1][key] for key in ("tokens", "elapsed_seconds"))
        rows.append((run.name, f"{run.final_loss:.4f}", f"{seconds:.0f}", f"{tokens / seconds:,.0f}"))
    print("", *table(rows, "<>"), sep="\n")


def _fill_mask(export: Path) -> None:
    import transformers

    fill = transformers.pipeline("fill-mask", model=str(export), device="cpu")
    guesses = ", ".join(f"{guess['token_str']} ({guess['score']:.2f})" for guess in fill(MASKED_SENTENCE, top_k=3))
    print(f"\n{MASKED_SENTENCE}\n  [MASK] = {guesses}")


if __name__ == "__main__":
    sys.exit(main())

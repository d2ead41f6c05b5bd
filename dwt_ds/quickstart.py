"""`make quickstart`: data, a weak teacher, the same student alone and distilled, and what came out.

Every model is trained by DeepSpeed under ZeRO-2, as a user would do it; the commands are printed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from dwt_ds.base.quiet import quieten_libraries

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
    if not (DATA / "manifest.json").is_file():
        words = ["--docs", "--train-tokenizer", str(VOCABULARY), "--seq-len", "128", "--out", str(DATA)]
        _run("prepare", *words)
    for name, recipe in RUN_RECIPES.items():
        _run("launch", *recipe, f"output_dir={RUNS}/{name}")
    _print_table()
    _draw_curves(RUNS / "curves.png")
    _fill_mask(RUNS / "distilled" / "export")
    print(f"\ndone in {time.perf_counter() - began:.0f} s")
    print(f"curves: {RUNS}/curves.png   student: {RUNS}/distilled/export   its settings: {RUNS}/distilled/config.yaml")
    return 0


def _run(*arguments: str) -> None:
    print(f"\n$ dwt-ds {' '.join(arguments)}", flush=True)
    exit_code = subprocess.run([sys.executable, "-m", "dwt_ds.cli.main", *arguments]).returncode
    if exit_code:
        raise SystemExit(f"error: the command above ended with exit code {exit_code}; make quickstart resumes there")


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def _print_table() -> None:
    print("\nmodel       held-out MLM loss   seconds   tokens/s")
    for name in RUN_RECIPES:
        rows = read_metrics(RUNS / name)
        last = next(row for row in reversed(rows) if "loss" in row)
        held_out = next(row["eval_hard_loss"] for row in reversed(rows) if "eval_hard_loss" in row)
        rate = last["tokens"] / last["elapsed_seconds"]
        print(f"{name:<11} {held_out:>17.4f} {last['elapsed_seconds']:>9.0f} {rate:>10,.0f}")


def _draw_curves(path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), constrained_layout=True)
    # Told apart by dashes and markers as well as by colour.
    styles = {"teacher": ("#777777", ":", "^"), "alone": ("#0072B2", "--", "o"), "distilled": ("#D55E00", "-", "s")}
    for name, (colour, dashes, marker) in styles.items():
        rows = read_metrics(RUNS / name)
        trained = [(row["step"], row["hard_loss"]) for row in rows if "hard_loss" in row]
        held_out = [(row["step"], row["eval_hard_loss"]) for row in rows if "eval_hard_loss" in row]
        axes.plot(*zip(*trained), color=colour, linestyle=dashes, linewidth=0.8, alpha=0.6)
        axes.plot(*zip(*held_out), color=colour, linestyle=dashes, marker=marker, label=f"{name}, held-out")
    axes.set(xlabel="optimizer steps", ylabel="masked-token cross-entropy", title="Alone and with a weak teacher")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def _fill_mask(export: Path) -> None:
    quieten_libraries()
    import transformers

    fill = transformers.pipeline("fill-mask", model=str(export), device="cpu")
    guesses = ", ".join(f"{guess['token_str']} ({guess['score']:.2f})" for guess in fill(MASKED_SENTENCE, top_k=3))
    print(f"\n{MASKED_SENTENCE}\n  [MASK] = {guesses}")


if __name__ == "__main__":
    sys.exit(main())

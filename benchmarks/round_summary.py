"""A page about a GPU round, from the rows and logs that its stages have written so far.

python benchmarks/round_summary.py RESULTS > summary.md
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from rows import Row, read_rows

NOT_MEASURED = "not measured"
LIGER_SHAPE = ("8192", "128256")


def summary(results: Path) -> str:
    """Markdown."""
    checks = _rows(results, "preflight.csv")
    machine = next((row["found"] for row in checks if row["check"] == "machine"), NOT_MEASURED)
    steps = _rows(results, "training_steps.csv")
    logits = [*_rows(results, "logits_form_*.csv"), *_rows(results, "compiled/logits_form_*.csv")]
    linear = _rows(results, "linear_form_*.csv")
    tests = (results / "tests.log").read_text(errors="replace") if (results / "tests.log").is_file() else ""
    parts = [
        f"# GPU round\n\n{machine}",
        "## Stages\n\n" + _table(_rows(results, "stages.csv"), ("stage", "seconds", "seconds_allowed", "exit_code")),
        "## Checks\n\n" + _table([row for row in checks if row["check"] != "machine"], ("check", "ok", "found")),
        "## Training, paper_weak_h100, beside the loop that users write\n\n" + _table(steps, _TRAINING),
        "## Loss on logits\n\n" + _table(logits, (*_KERNEL, "share_of_copy_bandwidth", "error")),
        "## Loss on hidden states\n\n" + _table(linear, (*_KERNEL, "share_of_gemm_rate", "error")),
        "## Alone beside distilled, at once\n\n" + _pair(results),
        "## Injected kernels\n\n" + _table(_rows(results, "kernel_injection.csv"), _INJECTION),
        "## Tests\n\n" + (tests.strip().splitlines() or [NOT_MEASURED])[-1].strip("= "),
        "## Goals\n\n" + _goals(steps, logits, linear, tests),
    ]
    return "\n\n".join(parts) + "\n"


_TRAINING = (
    "provider",
    "optimizer",
    "compile",
    "cuda_graphs",
    "micro_batch",
    "tokens_per_second",
    "ms_per_step",
    "mfu",
    "share_of_matrix_rate",
    "launches_per_step",
    "device_busy_share",
    "peak_mib",
    "planned_peak_mib",
    "device",
    "code",
    "error",
)
_KERNEL = ("provider", "rows", "vocabulary", "p50_ms", "host_ms", "peak_mib")
_INJECTION = ("family", "dtype", "injected", "moved_share_of_largest", "plain_ms", "auto_ms")


def _goals(steps: Sequence[Row], logits: Sequence[Row], linear: Sequence[Row], tests: str) -> str:
    ours = [row for row in logits if row["provider"] == "dwt_kernels"]
    large = [_number(row["share_of_copy_bandwidth"]) for row in ours if int(row["rows"]) >= 4096]
    at_512 = [row for row in logits if row["rows"] == "512"]
    liger = [row for row in linear if (row["rows"], row["vocabulary"]) == LIGER_SHAPE]
    peaks = [_ratio(row["peak_mib"], row["planned_peak_mib"]) for row in steps if row["provider"] == "dwt_ds"]
    linear_ratio = _times(liger, "dwt_kernels chunked", "liger chunked")
    rows = [
        ("logits form from 4,096 rows, least share of the copy bandwidth", "0.85", _least(large)),
        ("logits form at 512 rows, eager's time over ours", "1", _times(at_512, "eager", "dwt_kernels")),
        ("linear form at Liger's shape, ours over Liger's", "0.5", linear_ratio),
        ("training at 128 rows, share of the matrix rate", "0.45", _share(steps, "128")),
        ("training at 16 rows, share of the matrix rate", "0.2", _share(steps, "16")),
        ("allocator's peak over plan's, each micro-batch", "0.9 to 1.1", ", ".join(filter(None, peaks))),
        ("20 steps with Triton as 20 with torch, in fp32, bf16 and fp16", "3 passed", _alike(tests)),
    ]
    return _table([{"what": what, "goal": goal, "found": found or NOT_MEASURED} for what, goal, found in rows])


def _pair(results: Path) -> str:
    """Held-out loss and rate of the two students after the same steps."""
    rows = []
    for run in ("alone", "distilled"):
        path = results / f"{run}.jsonl"
        metrics = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
        for row in (row for row in metrics if "eval_hard_loss" in row):
            logged = [each for each in metrics if "loss" in each and each["step"] <= row["step"]]
            rate = f"{logged[-1]['tokens_per_second']:.0f}" if logged else ""
            # metrics.jsonl has null for NaN and infinity.
            loss = "not finite" if row["eval_hard_loss"] is None else f"{row['eval_hard_loss']:.4f}"
            rows.append({"step": row["step"], "run": run, "held_out_loss": loss, "tokens_per_second": rate})
    return _table(sorted(rows, key=lambda row: (row["step"], row["run"])))


def _rows(results: Path, pattern: str) -> list[Row]:
    return [row for path in sorted(results.glob(pattern)) for row in read_rows(path)]


def _table(rows: Sequence[Row], columns: Iterable[str] = ()) -> str:
    """A Markdown table of the columns that have anything in them; all, if none is named."""
    used = [name for name in columns or (rows[0] if rows else ()) if any(row.get(name) for row in rows)]
    if not used:
        return NOT_MEASURED
    lines = [used, ["---"] * len(used), *([str(row.get(name, "")) for name in used] for row in rows)]
    return "\n".join("| " + " | ".join(cell.replace("|", "/") for cell in line) + " |" for line in lines)


def _number(text: str) -> float | None:
    return float(text) if text not in ("", "nan") else None


def _least(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{min(known):g}" if known else ""


def _ratio(above: str, below: str) -> str:
    over, under = _number(above), _number(below)
    return f"{over / under:.2f}" if over and under else ""


def _times(rows: Sequence[Row], above: str, below: str) -> str:
    """One provider's time over another's, at the one shape of these rows."""
    found = {row["provider"]: row["p50_ms"] for row in rows}
    return _ratio(found.get(above, ""), found.get(below, ""))


def _share(steps: Sequence[Row], micro_batch: str) -> str:
    """Of the best mode."""
    shares = [_number(row["share_of_matrix_rate"]) for row in steps if row["micro_batch"] == micro_batch]
    known = [share for share in shares if share is not None]
    return f"{max(known):g}" if known else ""


def _alike(tests: str) -> str:
    """Outcomes of the tests that train with either back end."""
    lines = [line for line in tests.splitlines() if "test_triton_and_torch_back_ends_train_alike" in line]
    counts = {word: sum(word in line for line in lines) for word in ("PASSED", "FAILED", "ERROR")}
    return ", ".join(f"{count} {word.lower()}" for word, count in counts.items() if count)


if __name__ == "__main__":
    sys.stdout.write(summary(Path(sys.argv[1])))

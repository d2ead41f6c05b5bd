"""What the benchmarks share: clocks, peak memory, the machine's limits, the CSV file and the figure."""

from __future__ import annotations

import csv
import ctypes
import hashlib
import importlib.metadata
import math
import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import dwt_kernels
import torch

RESULTS = Path(__file__).parent / "results"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# More than any GPU's L2 cache: written between two timed calls, so that each finds its inputs in memory.
FLUSH_BYTES = COPY_BYTES = 1 << 28
MEBIBYTE = 1 << 20


# Ten milliseconds of a GPU at 2 GHz: longer than the host takes to issue a step of ours or of eager torch, some 4 ms.
QUEUE_CYCLES = 20_000_000


class Elapsed(NamedTuple):
    device_seconds: float
    host_seconds: float


class Provider(NamedTuple):
    """One way to compute the loss: ``step`` runs forward and backward."""

    name: str
    step: Callable[[], Any]


class Timing(NamedTuple):
    """``error`` is empty, or says in one line why there are no figures; they are then NaN.

    On a GPU the first three are the device's time with its queue full, and ``host_ms`` is what the host took to fill
    it: a loop that does nothing else waits for the longer of the two. With a ``host_ms`` above the ten milliseconds of
    QUEUE_CYCLES the queue ran empty, as it does for a loss that waits for the device: the first three then have host
    time in them. On a CPU there is only one time.
    """

    p20_ms: float
    p50_ms: float
    p80_ms: float
    host_ms: float
    peak_mib: float
    error: str = ""

    def rounded(self) -> dict[str, float | str]:
        """The fields as the CSV holds them."""
        return {name: value if isinstance(value, str) else round(value, 3) for name, value in self._asdict().items()}


def device_name() -> str:
    if DEVICE == "cuda":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"CPU: {models[0] if models else platform.machine()}, {torch.get_num_threads()} threads"


def versions() -> str:
    found = []
    for package in ("torch", "triton", "liger-kernel"):
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return f"python {platform.python_version()}; {'; '.join(found)}; code {code_hash()}"


@cache
def code_hash() -> str:
    """Of the kernels and the benchmarks: figures of other code are not those of this one."""
    folders = Path(dwt_kernels.__file__).parent, Path(__file__).parent
    files = [path for folder in folders for path in sorted(folder.rglob("*.py"))]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]


def time_all(providers: Sequence[Provider], rounds: int) -> dict[str, Timing]:
    """Rounds of all providers alternate, so that a machine whose speed drifts treats them alike.

    One that fails, for want of memory or because another version of its package wants other arguments, takes no further
    part and has its error in its ``Timing``.
    """
    peaks: dict[str, float] = {}
    seconds: dict[str, list[Elapsed]] = {provider.name: [] for provider in providers}
    errors: dict[str, str] = {}
    for turn in range(rounds + 1):
        for name, step in providers:
            if name in errors:
                continue
            try:
                if turn == 0:
                    peaks[name] = peak_mib(step)
                else:
                    seconds[name].append(elapsed_seconds(step))
            except Exception as error:
                errors[name] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
                print(f"{name} failed: {errors[name]}", flush=True)
            if name in errors and DEVICE == "cuda":
                torch.cuda.empty_cache()
    nothing = [math.nan] * 5
    return {
        name: Timing(*nothing, errors[name]) if name in errors else Timing(*percentiles_ms(values), peaks[name])
        for name, values in seconds.items()
    }


def percentiles_ms(seconds: Sequence[Elapsed]) -> tuple[float, ...]:
    """The device's 20th, 50th and 80th percentile and the host's median."""
    device, host = torch.tensor(seconds, dtype=torch.float64).mul(1e3).unbind(1)
    quantiles = torch.quantile(device, torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64))
    return *quantiles.tolist(), torch.quantile(host, 0.5).item()


def elapsed_seconds(step: Callable[[], Any]) -> Elapsed:
    if DEVICE == "cpu":
        start = time.perf_counter()
        step()
        return Elapsed(time.perf_counter() - start, math.nan)
    torch.empty(FLUSH_BYTES, dtype=torch.int8, device=DEVICE).zero_()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # Without something before them, short kernels would be timed as they come from the host.
    torch.cuda._sleep(QUEUE_CYCLES)
    begin.record()
    start = time.perf_counter()
    step()
    host = time.perf_counter() - start
    end.record()
    torch.cuda.synchronize()
    return Elapsed(begin.elapsed_time(end) / 1e3, host)


def peak_mib(step: Callable[[], Any]) -> float:
    """Memory that one step needs beyond what is there before it; also the first run, which compiles."""
    step()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / MEBIBYTE
    resettable = Path("/proc/self/clear_refs")
    if not os.access(resettable, os.W_OK):
        return float("nan")
    ctypes.CDLL(None).malloc_trim(0)  # what is free goes back, so that a step that needs it again is seen
    resettable.write_text("5")  # Linux: the peak of the resident set starts anew
    before_kib = resident_kib("VmRSS")
    step()
    return max(0, resident_kib("VmHWM") - before_kib) / 1024


def resident_kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(field)))


def copy_provider() -> Provider:
    """A copy of COPY_BYTES, for the machine's bandwidth; timed between the others, as it drifts with them."""
    source = torch.zeros(COPY_BYTES, dtype=torch.int8, device=DEVICE)
    target = torch.empty_like(source)
    return Provider("copy", lambda: target.copy_(source))


def gemm_provider(rows: int, width: int, columns: int) -> Provider:
    """torch's bf16 (rows x width) @ (width x columns), for the machine's rate; timed between the others."""
    left = torch.randn(rows, width, device=DEVICE).bfloat16()
    right = torch.randn(columns, width, device=DEVICE).bfloat16()
    return Provider("gemm", lambda: left @ right.t())


@cache
def liger_installed() -> bool:
    try:
        importlib.metadata.version("liger-kernel")
    except importlib.metadata.PackageNotFoundError:
        print("liger-kernel is not installed: its losses are left out (pip install liger-kernel)")
        return False
    return True


def csv_path(name: str, folder: Path | None) -> Path:
    """In `folder`, or the benchmarks' own."""
    return (folder or RESULTS) / f"{name}_{DEVICE}.csv"


def write_csv(name: str, lines: Sequence[dict[str, Any]], folder: Path | None = None) -> Path:
    path = csv_path(name, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
    return path


class Results:
    """The lines of one benchmark, in a CSV file that is written after each shape, for a run that is cut short.

    The next run goes on from there. Of the file's lines, it keeps those without an error that have its device, versions
    and rounds.
    """

    def __init__(self, name: str, folder: Path | None, rounds: int) -> None:
        self._name, self._folder = name, folder
        self.path = csv_path(name, folder)
        self.lines: list[dict[str, Any]] = []
        if self.path.exists():
            same = {"device": device_name(), "versions": versions(), "rounds": rounds, "error": ""}
            with self.path.open(newline="") as file:
                self.lines = [line for line in csv.DictReader(file) if _matches(line, same)]

    def has(self, providers: Iterable[str], shape: Mapping[str, Any]) -> bool:
        """Whether all of these are measured at a shape, given by its columns."""
        return {line["provider"] for line in self.lines if _matches(line, shape)}.issuperset(providers)

    def add(self, lines: Sequence[dict[str, Any]], shape: Mapping[str, Any]) -> None:
        """What was measured at a shape, in place of earlier lines of the same providers."""
        providers = {line["provider"] for line in lines}
        kept = [line for line in self.lines if line["provider"] not in providers or not _matches(line, shape)]
        self.lines = [*kept, *lines]
        for line in lines:
            print({key: line[key] for key in ("provider", "rows", "vocabulary", "p50_ms", "peak_mib")}, flush=True)
        write_csv(self._name, self.lines, self._folder)


def _matches(line: Mapping[str, Any], values: Mapping[str, Any]) -> bool:
    """Whether a line, which may have been read as text, has these values."""
    return all(str(line[name]) == str(value) for name, value in values.items())


def draw(results: Path, lines: list[dict[str, Any]], sweeps: dict[str, str]) -> Path | None:
    """Time and memory against rows and against the vocabulary, beside the CSV file ``results``; ``sweeps`` maps a CSV
    column to the axis' label."""
    try:
        import matplotlib
    except ImportError:
        print("matplotlib is not installed: no figure (pip install matplotlib)")
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(sweeps), figsize=(4.5 * len(sweeps), 6), squeeze=False)
    for column, (sweep, label) in enumerate(sweeps.items()):
        swept = [line for line in lines if line["sweep"] == sweep]
        for provider in dict.fromkeys(line["provider"] for line in swept):
            own = sorted((line for line in swept if line["provider"] == provider), key=lambda line: int(line[sweep]))
            places = [int(line[sweep]) for line in own]
            for row, field in enumerate(("p50_ms", "peak_mib")):
                axes[row][column].plot(places, [float(line[field]) for line in own], marker="o", label=provider)
        for row, unit in enumerate(("forward + backward, ms", "extra memory, MiB")):
            axes[row][column].set(xlabel=label, ylabel=unit, xscale="log", yscale="log")
            axes[row][column].grid(alpha=0.3)
    axes[0][0].legend(fontsize=7)
    figure.suptitle(f"{lines[0]['kernel']}: {lines[0]['device']}", fontsize=9)
    figure.tight_layout()
    path = results.with_suffix(".png")
    figure.savefig(path, dpi=70)
    return path

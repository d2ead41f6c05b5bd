"""Compiles every Triton kernel for GPUs that are not here and prints what the assemblies say.

Usage: assemble.py TARGET [CASE ...], one of TARGETS and all its cases unless some are named. Prints a JSON list of
{case, registers, spilled_bytes, loops, accesses, shared_bytes}.
Must not run with TRITON_INTERPRET set. NVIDIA: Triton's own assembler on the PTX, with -v, and its disassembler; AMD:
comments in the assembly.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import triton
from dwt_kernels.on_triton.row_kernels import gradient_kernel, statistics_kernel
from dwt_kernels.on_triton.scalar_kernels import (
    losses_kernel,
    prepare_kernel,
    reduce_kernel,
    scale_kernel,
    terms_kernel,
)
from dwt_kernels.on_triton.tile_gradient import tile_gradient_kernel
from dwt_kernels.on_triton.tile_statistics import merge_kernel, tile_statistics_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Instructions as sm_80's, less shared memory, which the tile kernels fill.
TILES_ONLY = ("sm_89",)
# The newer of Triton's two assemblers; the older one does not read its PTX for the last two architectures.
ASSEMBLER = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas-blackwell"
ARCHITECTURES = {"sm_80": "sm_80", "sm_89": "sm_89", "sm_90": "sm_90a", "sm_100": "sm_100a"}

TENSOR_DTYPES = {
    "labels": "*i64",
    "scalars": "*fp64",
    "temperature": "*fp64",
    "hard_weight": "*fp64",
    "soft_weight": "*fp64",
    "hard_normalizer": "*fp64",
    "soft_normalizer": "*fp64",
    "valid": "*i32",
    **dict.fromkeys(
        ("statistics", "upstream", "partials", "hard", "soft", "loss", "hard_rows", "soft_rows", "factor", "terms"),
        "*fp32",
    ),
    **dict.fromkeys(("d_hidden", "d_weight", "d_bias"), "*fp32"),
}
# In the dtype of the case.
MODEL_TENSORS = ("student", "teacher", "out", "tensor", "student_hidden", "student_weight", "student_bias")
MODEL_TENSORS += ("teacher_hidden", "teacher_weight", "teacher_bias")
COLUMN_STRIDES = ("student_column_stride", "teacher_column_stride")


class Case(NamedTuple):
    name: str
    kernel: Any
    constants: dict[str, Any]
    options: dict[str, int]
    dtype: str = "bf16"
    teacher_dtype: str = ""
    """Where it is another."""


def cases(backend: str) -> list[Case]:
    """As on_triton.rows and logit_free launch them: every kernel at BERT's vocabulary in bf16, and its variants."""
    lanes = 512 if backend == "hip" else 256
    whole = 30522 // (16 * lanes) * 16 * lanes
    row = {"V": 30522, "FIRST": 8, "WHOLE": whole, "LANES": lanes, "ALIGNMENT": 2, "SOFT_ALL": False}
    row |= {"TAIL_STEPS": 4, "TAIL_WIDTH": 2}
    tile_8 = {**row, "STEPS": 2, "WIDTH": 8}
    tile_4 = {**row, "FIRST": 4, "STEPS": 4, "WIDTH": 4}
    tile_2 = {**row, "FIRST": 0, "STEPS": 8, "WIDTH": 2}
    aligned_8 = {**tile_8, "FIRST": 0, "ALIGNMENT": 16, "TAIL_STEPS": 1, "TAIL_WIDTH": 8}
    aligned_4 = {**tile_4, "FIRST": 0, "ALIGNMENT": 16, "TAIL_STEPS": 2, "TAIL_WIDTH": 4}
    short_tile = {**tile_8, "V": 401, "WHOLE": 0, "LANES": 32, "ALIGNMENT": 1, "TAIL_STEPS": 16, "TAIL_WIDTH": 1}
    no_bias = {"student_bias": None, "teacher_bias": None}
    forward = {**no_bias, "upstream": None, "IN_PLACE_GRADIENT": False}
    in_place = {"IN_PLACE_GRADIENT": True}
    hard_only = {"teacher": None, "teacher_bias": None}
    gradient_row = {"V": 30522, "BLOCK": 2048, "WIDTH": 8, "OUT_ALIGNMENT": 2, "SOFT_ALL": False}
    row_options, gradient_options = {"num_warps": 8}, {"num_warps": 4 if backend == "hip" else 8}

    tile = {"V": 30522, "STUDENT_WIDTH": 1024, "TEACHER_WIDTH": 768, "BLOCK_ROWS": 64, "BLOCK_COLUMNS": 128}
    tile |= {"BLOCK_WIDTH": 64, "SOFT_ALL": False, "PRECISION": "ieee"}
    fp32_tile = {**tile, "BLOCK_COLUMNS": 64, "BLOCK_WIDTH": 32}
    group = {"GROUP_ROWS": 16}
    no_teacher = {"teacher_hidden": None, "teacher_weight": None, "teacher_bias": None, "TEACHER_WIDTH": 0}
    tile_options = {"num_warps": 8, "num_stages": 2 if backend == "hip" else 3}

    prepare = {"BLOCK": 4096, "MEAN": True, "SOFT_ALL": False, "TEMPERATURE_SQUARED": True}
    local_counts = {"hard_normalizer": None, "soft_normalizer": None}
    losses = {"BLOCK": 128, "HAS_TEACHER": True, "SOFT_ALL": False}
    merge = {"SPLITS_BLOCK": 128, "HAS_TEACHER": True, "SOFT_ALL": False}
    scalar_options = {"num_warps": 4}
    return [
        Case("statistics", statistics_kernel, {**tile_8, **forward}, row_options),
        Case("statistics, aligned rows", statistics_kernel, {**aligned_8, **forward}, row_options),
        Case("statistics, any rows", statistics_kernel, {**tile_2, **forward}, row_options),
        Case("statistics, hard only", statistics_kernel, {**tile_8, **forward, **hard_only}, row_options),
        Case("statistics, fp32", statistics_kernel, {**tile_4, **forward}, row_options, "fp32"),
        Case("statistics, V < BLOCK", statistics_kernel, {**short_tile, **forward}, {"num_warps": 1}, "fp16"),
        Case("in place", statistics_kernel, {**aligned_8, **in_place}, row_options),
        Case("in place, hard only", statistics_kernel, {**aligned_8, **in_place, **hard_only}, row_options),
        Case("in place, fp32", statistics_kernel, {**aligned_4, **in_place}, row_options, "fp32"),
        Case("in place, V < BLOCK", statistics_kernel, {**short_tile, **in_place}, {"num_warps": 1}, "fp16"),
        Case("gradient", gradient_kernel, gradient_row, gradient_options),
        Case("gradient, any rows", gradient_kernel, {**gradient_row, "WIDTH": 1, "OUT_ALIGNMENT": 1}, gradient_options),
        Case("gradient, hard only", gradient_kernel, {**gradient_row, "teacher": None}, gradient_options),
        Case("gradient, fp32", gradient_kernel, {**gradient_row, "WIDTH": 4}, gradient_options, "fp32"),
        Case(
            "gradient, V < BLOCK",
            gradient_kernel,
            {**gradient_row, "V": 401, "BLOCK": 512, "OUT_ALIGNMENT": 1},
            {"num_warps": gradient_options["num_warps"] // 4},
            "fp16",
        ),
        Case("tile statistics", tile_statistics_kernel, tile, tile_options),
        Case("tile statistics, hard only", tile_statistics_kernel, {**tile, **no_teacher}, tile_options),
        Case("merge", merge_kernel, merge, scalar_options),
        Case("merge, hard only", merge_kernel, {**merge, "HAS_TEACHER": False}, scalar_options),
        Case("tile gradient", tile_gradient_kernel, {**tile, **group}, tile_options),
        Case("tile gradient, hard only", tile_gradient_kernel, {**tile, **group, **no_teacher}, tile_options, "fp16"),
        Case("tile gradient, fp32", tile_gradient_kernel, {**fp32_tile, **group}, tile_options, "fp32"),
        Case("tile gradient, fp32 teacher", tile_gradient_kernel, {**fp32_tile, **group}, tile_options, "bf16", "fp32"),
        Case("prepare", prepare_kernel, prepare, row_options),
        Case("prepare, local counts", prepare_kernel, {**prepare, **local_counts}, row_options),
        Case("losses", losses_kernel, losses, scalar_options),
        Case("losses, hard only", losses_kernel, {**losses, "HAS_TEACHER": False}, scalar_options),
        Case("terms", terms_kernel, losses, scalar_options),
        Case("terms, hard only", terms_kernel, {**losses, "HAS_TEACHER": False}, scalar_options),
        Case("reduce", reduce_kernel, {"BLOCK": 4096}, row_options),
        Case("scale", scale_kernel, {"BLOCK": 4096}, row_options, "bf16"),
    ]


def compile_for(case: Case, target: GPUTarget) -> Any:
    constants = dict(case.constants)
    # A stride of 1 is a constant at every launch: Triton specializes on it.
    constants.update({name: 1 for name in COLUMN_STRIDES if name in case.kernel.arg_names})
    dtypes = {**TENSOR_DTYPES, **dict.fromkeys(MODEL_TENSORS, f"*{case.dtype}")}
    if case.teacher_dtype:
        dtypes.update({name: f"*{case.teacher_dtype}" for name in MODEL_TENSORS if name.startswith("teacher")})
    signature = {name: "constexpr" if name in constants else dtypes.get(name, "i32") for name in case.kernel.arg_names}
    pointers = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(signature) if signature[name].startswith("*")}
    source = ASTSource(case.kernel, signature, constexprs=constants, attrs=pointers)
    return triton.compile(source, target=target, options=case.options)


def of_nvidia(ptx: str, architecture: str) -> dict[str, Any]:
    """Registers of a thread, bytes of it spilled to memory, its loops, and its accesses to global memory by width."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(ptx)
        command = [str(ASSEMBLER), "-v", f"-arch={architecture}", str(file), "-o", f"{file}.cubin"]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        command = [str(ASSEMBLER.with_name("nvdisasm")), "-c", f"{file}.cubin"]
        assembly = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", report)
    registers = int(re.search(r"Used (\d+) registers", report)[1])
    found = {"registers": registers, "spilled_bytes": sum(map(int, spills))}
    return {**found, "loops": loops(assembly), "accesses": accesses(assembly)}


def accesses(assembly: str) -> dict[str, int]:
    """Loads and stores in an NVIDIA assembly by their bits, as "load 128" or "store 32"."""
    found: Counter[str] = Counter()
    for kind, suffixes in re.findall(r"\b(LDG|STG)((?:\.\w+)*)", assembly):
        bits = re.search(r"\.(128|64|[SU]16|[SU]8)\b", suffixes)
        found[f"{'load' if kind == 'LDG' else 'store'} {bits[1].strip('SU') if bits else 32}"] += 1
    return dict(sorted(found.items()))


def loops(assembly: str) -> list[dict[str, int]]:
    """Of every loop in an NVIDIA assembly its instructions, and how many of them wait for other threads."""
    labels: dict[str, int] = {}
    operations: list[str] = []
    found = []
    for line in assembly.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(operations)
        elif operation := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?\s*(\S+?);?\s", line + " "):
            operations.append(operation[1])
            target = re.search(r"BRA.*`\((\.L_\w+)\)", line)
            # A branch to itself is what follows a kernel's end.
            if target and labels.get(target[1], len(operations)) < len(operations) - 1:
                body = operations[labels[target[1]] :]
                waiting = sum(name.partition(".")[0] in ("BAR", "SHFL") for name in body)
                found.append({"instructions": len(body), "waiting": waiting})
    return found


def of_amd(assembly: str) -> dict[str, Any]:
    vector = int(re.search(r"\.vgpr_count:\s+(\d+)", assembly)[1])
    spilled = re.findall(r"\.[sv]gpr_spill_count:\s+(\d+)", assembly)
    return {"registers": vector, "spilled_bytes": 4 * sum(map(int, spilled)), "loops": [], "accesses": {}}


def main(name: str, *chosen: str) -> None:
    target = TARGETS[name]
    if target.backend == "cuda":
        triton.knobs.nvidia.ptxas.path = str(ASSEMBLER)
    report = []
    for case in cases(target.backend):
        if chosen and case.name not in chosen or name in TILES_ONLY and not case.name.startswith("tile"):
            continue
        compiled = compile_for(case, target)
        if target.backend == "cuda":
            found = of_nvidia(compiled.asm["ptx"], ARCHITECTURES[name])
        else:
            found = of_amd(compiled.asm["amdgcn"])
        report.append({"case": case.name, **found, "shared_bytes": compiled.metadata.shared})
    print(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])

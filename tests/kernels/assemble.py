"""Compiles every Triton kernel for GPUs that are not here and prints what the assemblers say about registers.

Usage: assemble.py TARGET, one of TARGETS. Prints a JSON list of {kernel, registers, spilled_bytes}. Must not run with
TRITON_INTERPRET set. NVIDIA: Triton's own assembler on the PTX, with -v; AMD: the comments in the assembly.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import triton
from dwt_kernels import logit_free_kernels, triton_kernels, triton_scalars
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# The newer of Triton's two assemblers; the older one does not read its PTX for the last two architectures.
ASSEMBLER = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas-blackwell"
ARCHITECTURES = {"sm_80": "sm_80", "sm_90": "sm_90a", "sm_100": "sm_100a"}

TENSOR_DTYPES = {
    "labels": "*i64",
    "scalars": "*fp64",
    "temperature": "*fp64",
    "hard_weight": "*fp64",
    "soft_weight": "*fp64",
    "hard_normalizer": "*fp64",
    "soft_normalizer": "*fp64",
    "valid": "*i32",
    **dict.fromkeys(("student", "teacher", "out", "student_hidden", "student_weight"), "*bf16"),
    **dict.fromkeys(("teacher_hidden", "teacher_weight", "student_bias", "teacher_bias"), "*bf16"),
    **dict.fromkeys(("statistics", "upstream", "partials", "hard", "soft", "loss", "hard_rows", "soft_rows"), "*fp32"),
    **dict.fromkeys(("d_hidden", "d_weight", "d_bias"), "*fp32"),
}
COLUMN_STRIDES = ("student_column_stride", "teacher_column_stride")


class Case(NamedTuple):
    name: str
    kernel: Any
    constants: dict[str, Any]
    options: dict[str, int]


def cases(backend: str) -> list[Case]:
    """As triton_backend and logit_free launch them, at BERT's vocabulary in bf16."""
    row = {"V": 30522, "BLOCK": 4096, "STUDENT_ALIGNMENT": 2, "TEACHER_ALIGNMENT": 2, "SOFT_ALL": False}
    no_bias = {"student_bias": None, "teacher_bias": None}
    tile = {"V": 30522, "STUDENT_WIDTH": 1024, "TEACHER_WIDTH": 768, "BLOCK_ROWS": 64, "BLOCK_COLUMNS": 128}
    tile |= {"BLOCK_WIDTH": 64, "SOFT_ALL": False, "PRECISION": "ieee"}
    tile_options = {"num_warps": 8, "num_stages": 2 if backend == "hip" else 3}
    prepare = {"BLOCK": 1024, "MEAN": True, "SOFT_ALL": False, "TEMPERATURE_SQUARED": True}
    losses = {"BLOCK": 128, "HAS_TEACHER": True, "SOFT_ALL": False}
    merge = {"SPLITS": 20, "SPLITS_BLOCK": 32, "HAS_TEACHER": True, "SOFT_ALL": False}
    forward = {**row, **no_bias, "upstream": None, "IN_PLACE_GRADIENT": False}
    return [
        Case("statistics", triton_kernels.statistics_kernel, forward, {"num_warps": 8}),
        Case(
            "statistics and gradient",
            triton_kernels.statistics_kernel,
            {**row, "IN_PLACE_GRADIENT": True},
            {"num_warps": 8},
        ),
        Case("gradient", triton_kernels.gradient_kernel, {**row, "OUT_ALIGNMENT": 2}, {"num_warps": 8}),
        Case("tile statistics", logit_free_kernels.tile_statistics_kernel, {**tile, "SPLITS": 20}, tile_options),
        Case("merge", logit_free_kernels.merge_kernel, merge, {"num_warps": 4}),
        Case("tile gradient", logit_free_kernels.tile_gradient_kernel, {**tile, "GROUP_ROWS": 16}, tile_options),
        Case("prepare", triton_scalars.prepare_kernel, prepare, {"num_warps": 4}),
        Case("losses", triton_scalars.losses_kernel, losses, {"num_warps": 4}),
        Case("reduce", triton_scalars.reduce_kernel, {"BLOCK": 1024}, {"num_warps": 4}),
    ]


def compile_for(case: Case, target: GPUTarget) -> Any:
    constants = dict(case.constants)
    # A stride of 1 is a constant at every launch: Triton specializes on it.
    constants.update({name: 1 for name in COLUMN_STRIDES if name in case.kernel.arg_names})
    signature = {
        name: "constexpr" if name in constants else TENSOR_DTYPES.get(name, "i32") for name in case.kernel.arg_names
    }
    if case.name == "reduce":  # its hard and soft are sums, its inputs rows
        signature.update(hard_rows="*fp32", soft_rows="*fp32")
    pointers = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(signature) if signature[name].startswith("*")}
    source = ASTSource(case.kernel, signature, constexprs=constants, attrs=pointers)
    return triton.compile(source, target=target, options=case.options)


def nvidia_registers(ptx: str, architecture: str) -> tuple[int, int]:
    """(registers of a thread, bytes of it spilled to memory)."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(ptx)
        command = [str(ASSEMBLER), "-v", f"-arch={architecture}", str(file), "-o", f"{file}.cubin"]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", report)
    return int(re.search(r"Used (\d+) registers", report)[1]), sum(map(int, spills))


def amd_registers(assembly: str) -> tuple[int, int]:
    vector = int(re.search(r"\.vgpr_count:\s+(\d+)", assembly)[1])
    spilled = re.findall(r"\.[sv]gpr_spill_count:\s+(\d+)", assembly)
    return vector, 4 * sum(map(int, spilled))


def main(name: str) -> None:
    target = TARGETS[name]
    if target.backend == "cuda":
        triton.knobs.nvidia.ptxas.path = str(ASSEMBLER)
    report = []
    for case in cases(target.backend):
        assembly = compile_for(case, target).asm
        if target.backend == "cuda":
            registers, spilled = nvidia_registers(assembly["ptx"], ARCHITECTURES[name])
        else:
            registers, spilled = amd_registers(assembly["amdgcn"])
        report.append({"kernel": case.name, "registers": registers, "spilled_bytes": spilled})
    print(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1])

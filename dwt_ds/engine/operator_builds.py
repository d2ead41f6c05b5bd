"""Prepares a process for DeepSpeed's compilation of its operators, where DeepSpeed does not do so itself."""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed
from deepspeed.ops.op_builder.builder import OpBuilder

from dwt_ds.base.processes import own_programs_first
from dwt_ds.base.words import one_line
from dwt_ds.engine.build_locks import extensions_folder, is_built, replace_torchs_build_locks

ARCHITECTURES = "TORCH_CUDA_ARCH_LIST"
_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT)
_DEEPSPEEDS_JIT_LOAD = OpBuilder.jit_load


def prepare_operator_builds() -> None:
    """Call it before DeepSpeed compiles or loads an operator in this process; a second call changes nothing.

    This environment's ninja comes first on the PATH. Abandoned locks do not block other processes (build_locks.py).
    DeepSpeed gets a list of GPU architectures that it can read. What is compiled is announced, and what cannot be
    raises a ValueError of one line. The all-reduce in shared memory, which DeepSpeed would build for every run on a
    CPU, is left out.
    """
    # Only inference with tensor parallelism uses it. It takes a file of 66 MiB a rank in /dev/shm, which nothing
    # deletes, and the process crashes where there is no room for that: Docker's /dev/shm has 64 MB.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    os.environ["PATH"] = own_programs_first(os.environ.get("PATH", ""))
    replace_torchs_build_locks()
    OpBuilder.jit_load = _jit_load


def numbered_architectures(listed: str) -> str:
    """TORCH_CUDA_ARCH_LIST as DeepSpeed 0.19.8 can read it: "8.0 9.0a+PTX" is "8.0;9.0+PTX".

    torch also takes a letter after the number (9.0a, 10.0f), for kernels that use what only this architecture has.
    DeepSpeed's use nothing of it. Where the list has names (Hopper, native), the answer is empty: without a list
    DeepSpeed compiles for the devices that it sees.
    """
    entries = listed.replace(";", " ").split()
    if not all(re.fullmatch(r"\d+\.\d+[a-z]?(\+PTX)?", entry) for entry in entries):
        return ""
    return ";".join(re.sub(r"[a-z]", "", entry) for entry in entries)


@contextmanager
def _announced_compilation() -> Iterator[None]:
    """A process that has torch compile an extension prints that it does: torch is silent for minutes."""
    from torch.utils import cpp_extension  # it looks for CUDA when it is imported

    load = cpp_extension.load

    def announced_load(*, name: str, **options: Any) -> Any:
        has_compiler = cpp_extension.CUDA_HOME is not None or not options.get("with_cuda")
        one_of_host = os.environ.get("LOCAL_RANK", "0") == "0"  # its other ranks wait for the one that compiles
        if has_compiler and one_of_host and not is_built(extensions_folder() / name):
            text = f"compiling {name} for this machine, once; it takes a minute or more"
            print(text, file=sys.stderr, flush=True)
        return load(name=name, **options)

    cpp_extension.load = announced_load  # type: ignore[assignment]
    try:
        yield
    finally:
        cpp_extension.load = load


def _jit_load(builder: OpBuilder, verbose: bool = True) -> object:
    given = os.environ.get(ARCHITECTURES)
    if given is not None:
        os.environ[ARCHITECTURES] = numbered_architectures(given)
    try:
        with _announced_compilation():
            return _DEEPSPEEDS_JIT_LOAD(builder, verbose)
    except ValueError:  # of a lock
        raise
    except Exception as error:  # compilers and builders raise all kinds
        # The compiler's own error comes after pages of commands.
        compilers = next((line.strip() for line in str(error).splitlines() if "error:" in line), "")
        fix = "install a C++ compiler, and on a GPU nvcc"
        if isinstance(error, OSError) and error.errno in _NOT_WRITABLE:  # a container's user without a home
            fix = f"set TORCH_EXTENSIONS_DIR to a folder that can be written to, in place of {extensions_folder()}"
        raise ValueError(
            f"DeepSpeed's operator {builder.name} cannot be compiled here ({compilers or one_line(error)}); {fix}"
        ) from error
    finally:
        if given is not None:
            os.environ[ARCHITECTURES] = given

"""Builds the operators that DeepSpeed compiles at first use, and reports for each whether that works.

python -m dwt_ds.engine.ops_check      the last line of stdout is a JSON list
"""

from __future__ import annotations

import contextlib
import json
import sys

from deepspeed.accelerator import get_accelerator

from dwt_ds.engine.operator_builds import prepare_operator_builds

# Names of the folders that DeepSpeed compiles its extensions in.
_BUILDERS = {"cpu_adam": "CPUAdamBuilder"}
_BUILDERS_ON_A_GPU = {"fused_adam": "FusedAdamBuilder"}


def build_operators() -> list[dict[str, str]]:
    """Name, problem and its fix ("" if there is none) of every operator that our DeepSpeed JSONs use.

    cpu_adam is Adam of an offloaded optimizer, fused_adam that of the others on a GPU.
    """
    answers = []
    on_a_gpu = get_accelerator().device_name() == "cuda"
    for name, builder_name in (_BUILDERS | _BUILDERS_ON_A_GPU if on_a_gpu else _BUILDERS).items():
        try:
            get_accelerator().create_op_builder(builder_name).load(verbose=False)
            problem = fix = ""
        except ValueError as error:
            problem, _, fix = str(error).rpartition("; ")
            problem = problem or str(error)
        answers.append({"name": name, "problem": problem, "fix": fix})
    return answers


def main() -> int:
    prepare_operator_builds()
    with contextlib.redirect_stdout(sys.stderr):
        answers = build_operators()
    print(json.dumps(answers), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""`python -m MODULE` for launchers that can only start a file.

python run_module.py MODULE [ARGUMENT ...]
"""

from __future__ import annotations

import os
import runpy
import sys

if __name__ == "__main__":
    # As -m has it; the folder of this file would offer its modules as top-level ones.
    sys.path[0] = os.getcwd()
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)

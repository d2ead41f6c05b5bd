"""`python -m dwt_ds` is the command dwt-ds, where its script is not on the PATH."""

from __future__ import annotations

import sys

from dwt_ds.cli.main import main

if __name__ == "__main__":
    sys.exit(main())

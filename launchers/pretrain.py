"""`python -m dwt_ds.pretrain` as a file, for launchers that take no modules."""

from __future__ import annotations

import sys

from dwt_ds.pretrain import main

if __name__ == "__main__":
    sys.exit(main())

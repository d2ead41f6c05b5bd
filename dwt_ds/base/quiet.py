"""Keeps the commentary of the libraries below from burying our own lines; their errors still show.

To be called before they are imported: some of them talk while being imported.
"""

from __future__ import annotations

import logging
import os
import warnings


def quieten_libraries() -> None:
    """Silence import-time advice, progress bars and deprecations inside torch, torchao, DeepSpeed, transformers."""
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

    import torch

    if not torch.accelerator.is_available():
        # DeepSpeed warns when it finds this out by itself.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")

    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()

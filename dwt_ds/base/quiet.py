"""Silences the libraries' advice and progress bars, so that our own lines can be seen; their errors are still shown.

Call it before they are imported, since some of them print while being imported.
"""

from __future__ import annotations

import logging
import os
import warnings


def quieten_libraries() -> None:
    """Silence import-time advice, progress bars and deprecations inside torch, torchao, DeepSpeed, transformers."""
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.(distributed|_inductor)|transformers")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

    import torch

    if not torch.accelerator.is_available():
        # Otherwise DeepSpeed warns that it found no accelerator.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")

    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()

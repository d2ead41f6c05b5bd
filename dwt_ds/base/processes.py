"""Processes started by this one."""

from __future__ import annotations

import multiprocessing
import os
import threading


def exit_with_parent() -> None:
    """In a process of `multiprocessing`: exit when the parent does, also when it is killed.

    Workers of a pool would otherwise wait for it forever.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()

"""Ports of this machine for ranks to meet at."""

from __future__ import annotations

import socket

_RESERVED: list[socket.socket] = []


def reserve_port() -> int:
    """A free TCP port that nobody else is given until this process ends.

    It is bound and does not listen. torch's store sets SO_REUSEADDR and so can listen on it; other programs that ask
    the kernel for a free port get another one.
    """
    reserved = socket.socket()
    reserved.bind(("", 0))
    # Only now: set before, two processes that reserve could both bind one port.
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    _RESERVED.append(reserved)
    return int(reserved.getsockname()[1])

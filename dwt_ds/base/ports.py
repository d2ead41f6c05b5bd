"""Ports of this machine for ranks to meet at."""

from __future__ import annotations

import socket

_RESERVED: list[socket.socket] = []


def reserve_port() -> int:
    """A free TCP port that nobody else is given until this process ends.

    It stays bound and does not listen. torch's store sets SO_REUSEADDR, too, and so can listen on it; other programs
    that ask the kernel for a free port get another one.
    """
    reserved = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.bind(("", 0))
    _RESERVED.append(reserved)
    return int(reserved.getsockname()[1])

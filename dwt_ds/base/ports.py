"""Ports of this machine for ranks to meet at."""

from __future__ import annotations

import errno
import socket

_RESERVED: list[socket.socket] = []


def reserve_port() -> int:
    """A free TCP port that nobody else is given until this process ends.

    torch finds it and lets it go again; here it is bound at once and does not listen. torch's store sets SO_REUSEADDR
    and so can listen on it; other programs that ask the kernel for a free port get another one.
    """
    from torch.distributed.elastic.utils.distributed import get_free_port  # here: a start on other hosts needs none

    while True:
        port = get_free_port()
        reserved = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            reserved.bind(("", port))
        except OSError as error:
            reserved.close()
            if error.errno != errno.EADDRINUSE:
                raise
            continue  # another program took it in between
        # Only now: set before, two processes that reserve could both bind one port.
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        _RESERVED.append(reserved)
        return port

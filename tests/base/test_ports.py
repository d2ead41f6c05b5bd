"""A reserved port: kept from others, and open to the ranks that meet there."""

from __future__ import annotations

import os
import socket

import pytest
from harness.ranks import Python

from dwt_ds.base.ports import reserve_port
from dwt_ds.launch.local import on_this_machine

# What rank 0 does, in a process of its own, and another rank in the same.
MEET = """
import sys
from datetime import timedelta
from torch.distributed import TCPStore
port = int(sys.argv[1])
server = TCPStore("127.0.0.1", port, 2, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=20))
TCPStore("127.0.0.1", port, 2, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=20)).set("met", "yes")
print(server.get("met").decode())
"""


def test_ranks_meet_at_a_port_that_nobody_else_gets(python: Python) -> None:
    port = reserve_port()
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("", port))
    ended = python("-c", MEET, str(port))
    assert ended.out == "yes\n", ended.err
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("", port))


def test_a_launch_keeps_its_port_until_it_ends() -> None:
    options = on_this_machine({**os.environ, "RANKS": "1"}).options
    port = int(options[options.index("--master_port") + 1])
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("", port))

"""Output that cannot fail the process that prints it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PRINTS = """
import sys
from dwt_ds.base.streams import outlive_lost_output
outlive_lost_output()
for number in range(3):
    print("a line of ünïcode", "x" * 100_000)
    sys.stdout.flush()
print("lived", file=sys.stderr)
"""


def printing(to: str) -> tuple[str, int]:
    """What a process wrote to stderr, and its exit code."""
    done = subprocess.run(
        ["sh", "-c", f'"$0" -c "$1" {to}', sys.executable, PRINTS],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    return done.stderr, done.returncode


@pytest.mark.parametrize("to", [">/dev/full", ">&-"])
def test_a_process_outlives_output_that_is_lost(to: str) -> None:
    assert printing(to) == ("lived\n", 0)


def test_a_process_outlives_the_reader_of_its_output() -> None:
    assert printing("| head -c 10 >/dev/null") == ("lived\n", 0)


def test_a_process_outlives_a_reader_that_is_slower_than_a_non_blocking_pipe() -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    done = subprocess.run([sys.executable, "-c", PRINTS], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.stderr, done.returncode) == ("lived\n", 0)
    assert os.read(reader, 17) == "a line of ünïcode".encode()[:17]
    os.close(reader)


def test_what_the_encoding_lacks_is_escaped() -> None:
    error, _ = printing("| head -c 21 >&2")
    assert r"\xfcn" in error

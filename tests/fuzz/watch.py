"""How a damaged input has to end: a right answer or one sentence, in time and in little memory."""

from __future__ import annotations

import os
import random
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from frugal.kernels.errors import FrugalError

SEED, TIMES = "FRUGAL_FUZZ_SEED", "FRUGAL_FUZZ_TIMES"
MOST_SECONDS, MOST_BYTES = 20.0, 10**9
LONGEST_SENTENCE = 2000


def cases(kind: str, count: int) -> Iterator[random.Random]:
    """`count` sources of chance, times FRUGAL_FUZZ_TIMES, that FRUGAL_FUZZ_SEED chooses."""
    seed = int(os.environ.get(SEED, "1"))
    for number in range(round(count * float(os.environ.get(TIMES, "1")))):
        yield random.Random(zlib.crc32(f"{kind} {seed} {number}".encode()))


class Watch:
    """Counts the inputs of one kind, and what became of them."""

    def __init__(self, kind: str):
        self.kind, self.read, self.refused = kind, 0, 0

    def __enter__(self) -> Watch:
        self._before = _peak()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            # Damage that never shows would prove nothing.
            assert self.refused or self.read < 10, f"{self.kind}: all {self.read} were read"
            grown = _peak() - self._before
            assert grown < MOST_BYTES, f"{self.kind}: {grown} bytes"

    def __call__(self, what: str, work: Callable[[], Any]) -> Any:
        """The result of `work`, or None where it refused with a sentence."""
        began = time.monotonic()
        try:
            found = work()
            self.read += 1
        except FrugalError as error:
            said = str(error)
            assert said.isascii() and said.isprintable(), (what, said)
            assert "; expected " in said and len(said) < LONGEST_SENTENCE, (what, said)
            found = None
            self.refused += 1
        except Exception as error:
            raise AssertionError(f"{self.kind}: {what}: {type(error).__name__}: {error}") from error
        seconds = time.monotonic() - began
        # A bound against hanging, far above what a busy machine needs for a few kilobytes.
        assert seconds < MOST_SECONDS, f"{self.kind}: {what}: {seconds:.1f} s"
        return found


def _peak() -> int:
    """Bytes; 0 where the system does not tell."""
    if sys.platform == "win32":
        return 0
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

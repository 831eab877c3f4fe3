"""The one error people see: what to do, what was found, what was expected, in one sentence."""

from __future__ import annotations

from .log import plain


class FrugalError(ValueError):
    """A refusal that begins with its remedy. ComfyUI shows the first sentence, so the whole message
    is one.

    found, expected: what was there, with file and number, and what should have been. do: what works
    in that very case, as an imperative. All ASCII.
    """

    # ComfyUI puts the module before the name, twice; a pack's module is the path of its folder, and
    # the sentence would start below the visible part of the page's error log.
    __module__ = "frugal"

    def __init__(self, found: str, expected: str, do: str):
        super().__init__(_one_line(f"{do.rstrip('.')}: {found}; expected {expected}."))
        self.found, self.expected, self.do = found, expected, do


def _one_line(text: str) -> str:
    """In ASCII, control characters as escapes: a name from a file may hold any."""
    return "".join(
        each if each.isprintable() else " " if each == "\n" else f"\\x{ord(each):02x}"
        for each in plain(text)
    )

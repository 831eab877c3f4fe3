"""The one error people see: what was found, what was expected, what to do, in one sentence."""

from __future__ import annotations


class FrugalError(ValueError):
    """A refusal with its remedy. ComfyUI shows the first sentence, so the whole message is one
    sentence.
    """

    # ComfyUI puts the module before the name, twice; a pack's module is the path of its folder, and
    # the sentence would start below the visible part of the page's error log.
    __module__ = "frugal"

    def __init__(self, found: str, expected: str, do: str):
        super().__init__(f"{found}; expected {expected}; {do.rstrip('.')}.")
        self.found, self.expected, self.do = found, expected, do

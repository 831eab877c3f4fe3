"""The pack's log lines, which can be written to any console.

Names from files and widgets may hold a lone surrogate, or letters that a console's code page lacks;
writing them raises inside ComfyUI's logger and ends its queue.
"""

from __future__ import annotations

import logging

LOG = logging.getLogger("frugal")


def plain(text: str) -> str:
    """The text in ASCII; other characters as escapes."""
    return text.encode("ascii", "backslashreplace").decode("ascii")


def _in_ascii(record: logging.LogRecord) -> bool:
    record.msg, record.args = plain(record.getMessage()), None
    return True


LOG.addFilter(_in_ascii)

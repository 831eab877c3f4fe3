"""Hands the command line to the fleet."""

from __future__ import annotations

import sys

from ..servers.fleet.command import main

if __name__ == "__main__":
    sys.exit(main())

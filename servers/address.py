"""The address of a server, and when a key may be sent to it.

Widgets are saved into shared workflows and pictures. So a key is never typed in: the name of an
environment variable is. And since a stranger's workflow could name any variable and any address, a
key leaves this machine only to the host that a second variable, <NAME>_HOST, allows.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from ..kernels.errors import FrugalError

VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
ENDINGS = ("_KEY", "_TOKEN")
HOST = "_HOST"


@dataclass(frozen=True)
class Server:
    """`base`: http(s)://host[:port][/path] without a slash at its end. Made by `server`."""

    base: str
    headers: Mapping[str, str]

    @property
    def name(self) -> str:
        """Host and port, for messages."""
        return urlsplit(self.base).netloc


def server(url: str, key_variable: str = "") -> Server:
    """The server at `url`, with the key that the environment variable `key_variable` holds.

    Raises FrugalError for an address that is not plain http or https, and for a key that is absent
    or not meant for this host.
    """
    text = url.strip().rstrip("/")
    try:
        parts = urlsplit(text)
        host, _ = parts.hostname, parts.port
    except ValueError:
        host, parts = None, None
    if parts is None or parts.scheme not in ("http", "https") or not host:
        raise _address(text, "an address that starts with http:// or https:// and names a host")
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise FrugalError(
            "an address with a password, a query or a fragment in it",
            "http(s)://host:port/path alone, since workflows are shared",
            "put a key into an environment variable and type that variable's name",
        )
    key = _key(key_variable.strip(), host)
    return Server(text, {"Authorization": f"Bearer {key}"} if key else {})


def _address(text: str, expected: str) -> FrugalError:
    return FrugalError(
        f"the server address {ascii(text)[:80]}", expected, "type, say, http://127.0.0.1:8000/v1"
    )


def _key(variable: str, host: str) -> str:
    if not variable:
        return ""
    if not VARIABLE.fullmatch(variable) or not variable.upper().endswith(ENDINGS):
        # What was typed may be the key itself: do not show it.
        raise FrugalError(
            "a key variable that is no such name",
            f"the name of an environment variable that ends in {' or '.join(ENDINGS)}, not the key",
            "set, say, MY_SERVER_KEY where ComfyUI is started, and type MY_SERVER_KEY",
        )
    key = os.environ.get(variable, "")
    if not key:
        raise FrugalError(
            f"no environment variable {variable}",
            "the key of the server in it",
            f"set {variable} where ComfyUI is started, or leave the field empty",
        )
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise FrugalError(
            f"{variable} holds characters that no header may have",
            "the key alone",
            "set the variable again, without spaces and line ends",
        )
    allowed = os.environ.get(variable + HOST, "").lower().split(",")
    if not _loopback(host) and host.lower() not in [each.strip() for each in allowed]:
        raise FrugalError(
            f"{host} is not among the hosts that may see {variable}",
            f"its name in {variable}{HOST}, so that no foreign workflow can take the key away",
            f"set {variable}{HOST}={host} where ComfyUI is started",
        )
    return key


def _loopback(host: str) -> bool:
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False

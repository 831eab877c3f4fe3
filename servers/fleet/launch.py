"""Starting a fleet on this machine, or on a Ray cluster that is already there."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...kernels.errors import FrugalError
from . import token
from .app import Fleet, build
from .store import claim

NEEDED = ("ray", "starlette", "multipart", "filelock", "prometheus_client")


@dataclass(frozen=True)
class Place:
    """host, port: of the HTTP side. cluster: address of a Ray cluster; empty: a new one on this
    machine. token_env: variable that holds the clients' token; empty: a file in the store.
    """

    host: str = "127.0.0.1"
    port: int = 8190
    cluster: str = ""
    token_env: str = ""


def require() -> None:
    """Raises FrugalError where a package of the `fleet` extra is missing."""
    from importlib.util import find_spec

    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise FrugalError(
            f"no {', '.join(missing)} here",
            "the packages of the fleet",
            "run pip install 'comfyui-frugal[fleet]'",
        )


def ray_token(store: Path) -> None:
    """Switch on Ray's own token, which guards its ports. Has to come before Ray is imported."""
    mode = os.environ.setdefault("RAY_AUTH_MODE", "token")
    if mode != "token":
        return
    if not os.environ.get("RAY_AUTH_TOKEN") and not os.environ.get("RAY_AUTH_TOKEN_PATH"):
        path = store / "ray-token"
        token.kept(path)
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(path)


@contextlib.contextmanager
def running(fleet: Fleet, place: Place, say: Callable[[str], None]) -> Iterator[str]:
    """The address of the fleet, which is up when this yields and stopped afterwards."""
    require()
    store = Path(fleet.store).resolve()
    claim(store)
    Path(fleet.work).mkdir(parents=True, exist_ok=True)
    if place.token_env:
        secret, where = token.from_environment(place.token_env), f"in {place.token_env}"
    else:
        secret, where = token.kept(store / "token"), f"in {store / 'token'}"
    if not place.cluster:
        ray_token(store)
    import ray
    from ray import serve

    from .http import hashed

    fleet = replace(fleet, store=str(store), token_hash=hashed(secret))
    options: dict[str, Any] = {"namespace": "frugal-fleet", "log_to_driver": False}
    if place.cluster:
        options["address"] = place.cluster
    else:
        # A new cluster, whatever the environment or a file of an earlier one names.
        options |= {"address": "local", "include_dashboard": False}
        options |= {"_node_ip_address": "127.0.0.1"}
    _join(ray, options)
    try:
        for line in open_ports():
            say(line)
        _check_room(fleet, ray.cluster_resources())
        serve.start(http_options={"host": place.host, "port": place.port})
        try:
            serve.run(build(vars(fleet)), name="fleet", route_prefix="/")
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise FrugalError(
                f"the fleet did not come up ({ascii(reason)[1:-1][:600]})",
                "a ComfyUI that starts in each worker",
                f"read the logs in {fleet.work}",
            ) from None
        url = f"http://{place.host}:{place.port}"
        say(f"the fleet answers at {url}; clients need the token {where}")
        if place.host not in ("127.0.0.1", "localhost", "::1"):
            say("ATTENTION: the token and all pictures go over the network in the clear; "
                "put a proxy with TLS before it.")  # fmt: skip
        yield url
    finally:
        with contextlib.suppress(Exception):
            serve.shutdown()
        ray.shutdown()


def _join(ray: Any, options: Mapping[str, Any]) -> None:
    try:
        ray.init(**options)
    except Exception as error:
        # Ray gives its own processes 30 s, which a busy machine may not be able to keep. What it
        # has started ends with this process, so trying again is for a new one.
        reason = ascii(" ".join(str(error).split()))[1:-1][:400]
        raise FrugalError(
            f"Ray did not start ({type(error).__name__}: {reason})",
            "a Ray cluster",
            "start it again when the machine is less busy, or correct --cluster",
        ) from None


def _check_room(fleet: Fleet, there: Mapping[str, float]) -> None:
    # Serve would wait for a card that never comes, silently.
    for name, each in (("GPU", fleet.gpus), ("CPU", fleet.cpus)):
        wanted = fleet.workers * each
        if wanted > there.get(name, 0):
            raise FrugalError(
                f"{fleet.workers} workers with {each:g} {name} each, and Ray has "
                f"{there.get(name, 0):g} {name}",
                "no more than there are",
                f"start fewer workers, or set --{name.lower()}s lower",
            )


def open_ports() -> list[str]:
    """What Ray listens on beside the HTTP side, as lines for a person."""
    auth = os.environ.get("RAY_AUTH_MODE", "")
    guard = (
        "They ask for Ray's token" if auth == "token" else "THEY ASK FOR NO TOKEN (RAY_AUTH_MODE)"
    )
    lines = [
        "ATTENTION: Ray itself opens ports on ALL network interfaces, whatever address it is "
        f"given. {guard}; keep them behind a firewall all the same, since who speaks to them "
        "can run code here."
    ]
    found = listening()
    lines += [f"  open to the network: {name} on port {port}" for name, port in found]
    return lines


def listening() -> list[tuple[str, int]]:
    """(process name, port) of what Ray's processes of this user hold open beyond loopback. Empty
    where the system does not say.
    """
    try:
        import psutil
    except ModuleNotFoundError:
        return []
    found = set()
    for process in psutil.process_iter(["name", "cmdline"]):
        line = " ".join(process.info["cmdline"] or ())
        if "/ray/" not in line and not line.startswith("ray::"):
            continue
        with contextlib.suppress(psutil.Error):
            for each in process.net_connections("tcp"):
                if each.status == psutil.CONN_LISTEN and not each.laddr.ip.startswith("127."):
                    found.add((process.info["name"], each.laddr.port))
    return sorted(found)


def until_stopped() -> None:
    """Wait for Ctrl-C or a request to end."""
    stopped = threading.Event()
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, lambda *_: stopped.set())
    # Waiting in slices lets Windows notice the signal.
    while not stopped.wait(0.5):
        pass

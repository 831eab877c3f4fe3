"""The video node and the INT4 export against the real vLLM-Omni, on a CPU with tiny Wan models.

Random weights: this shows protocol, bytes and loading, never quality. Runs when asked for only, see
docs/engines.md. One set of servers serves every ComfyUI found.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from pathlib import Path

import pytest

from frugal.demo.comfy_server import ComfyServer
from frugal.kernels.quantize.vllm_folder import ServerJob, export
from frugal.tests.helpers import engines as bed
from frugal.tests.helpers.patience import until

pytestmark = pytest.mark.skipif(not bed.PYTHON, reason=bed.NEEDED)
TREES = bed.TREES
GROUP = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("engines")


# Which fixture stands for which server.
SERVERS = {
    "server": "text to video",
    "int4_server": "INT4 text to video",
    "image_server": "INT4 image to video",
    "two_ranks": "two ranks",
}


@pytest.fixture(scope="module")
def engines(request, folder):
    """Every server that the chosen tests name; they start one after the other while the tests
    begin.
    """
    two = ("--usp", "2", "--num-gpus", "2")
    makers = {
        "text to video": lambda: bed.omni(folder, made(folder, "tiny-t2v"), "tiny-t2v"),
        "two ranks": lambda: bed.omni(
            folder, made(folder, "tiny-t2v"), "tiny-t2v-ranks", *two, ranks=2
        ),
        "INT4 text to video": lambda: served_in_int4(folder, made(folder, "tiny-t2v")),
        "INT4 image to video": lambda: served_in_int4(folder, made(folder, "tiny-i2v", "image")),
    }
    named = {name for item in request.session.items for name in getattr(item, "fixturenames", ())}
    wanted = {server for fixture, server in SERVERS.items() if fixture in named}
    servers = {name: make() for name, make in makers.items() if name in wanted}
    with bed.one_by_one(servers) as running:
        yield running


def made(folder: Path, name: str, *kind: str) -> Path:
    place = Path(bed.MODELS or folder) / name
    index = place / "model_index.json"
    if not index.exists():
        bed.inside(folder, str(bed.PLATFORM / "tiny_wan_folder.py"), str(place), *kind)
        kept = json.loads(index.read_text())
        # The I2V loader of 0.30 takes the mere key for a second model.
        kept.pop("transformer_2", None)
        index.write_text(json.dumps(kept))
    return place


@pytest.fixture
def server(engines):
    """vLLM-Omni with a text to video model."""
    return engines["text to video"].ready()


@pytest.fixture
def int4_server(engines):
    return engines["INT4 text to video"].ready()


@pytest.fixture
def image_server(engines):
    """An image to video model, in our INT4 too: one start for both."""
    return engines["INT4 image to video"].ready()


@pytest.fixture
def two_ranks(engines):
    """The text to video model over two processes."""
    return engines["two ranks"].ready()


@pytest.fixture(scope="module", params=TREES, ids=lambda tree: tree.name)
def comfy(request, folder, engines):
    with bed.comfy(request.param, folder) as running:
        yield running


@pytest.fixture
def once(comfy):
    """Skip what costs the start of a server and is the same in all but the newest ComfyUI; to be
    named before the servers, or they are waited for.
    """
    if comfy.tree != TREES[-1]:
        pytest.skip("the same in every ComfyUI, so once is enough")


def film(comfy: ComfyServer, graph: dict) -> tuple[bytes, str, float]:
    """The file that the video node left, its report, and seconds."""
    began = time.monotonic()
    result = comfy.run(graph)
    assert (result.status, result.errors) == ("success", [])
    [name] = {e["filename"] for _, e in result.files() if e["filename"].endswith(".mp4")}
    assert sum(e["filename"].startswith("far") for _, e in result.files()) == 5
    report = result.outputs["3"]["text"][0]
    return (comfy.output / "video" / name).read_bytes(), report, time.monotonic() - began


FILMS: dict[str, bytes] = {}


def test_text_becomes_a_video(comfy, server):
    data, report, seconds = film(comfy, bed.video_graph(server.url))
    assert "5 frames of 64x64" in report and "note:" not in report, report
    # The same wish from another ComfyUI is a job of its own, and the same bytes.
    assert FILMS.setdefault("t2v", data) == data
    other, *_ = film(comfy, bed.video_graph(server.url, seed=8))
    assert other != data
    bed.record(f"text to video, {comfy.tree.name}", seconds=round(seconds, 1), bytes=len(data))


def test_the_same_order_again_is_not_made_twice(comfy, server):
    graph = bed.video_graph(server.url, seed=21)
    film(comfy, graph)
    jobs = server.get("/videos?limit=100")[1]["data"]
    # Another name of the file makes the node run again; for the server it is the same wish.
    _, report, _ = film(comfy, bed.video_graph(server.url, seed=21, filename_prefix="video/again"))
    assert "found the job of an earlier run again" in report
    assert len(server.get("/videos?limit=100")[1]["data"]) == len(jobs)


def test_what_the_server_refuses_or_ignores_is_said(comfy, server):
    result = comfy.run(bed.video_graph(server.url, model="another"))
    assert result.status == "error" and "another" in str(result.errors)
    result = comfy.run(bed.video_graph(server.url, seed=31, key_variable=""))
    assert result.status == "error" and "401" in str(result.errors)
    graph = bed.video_graph(server.url, image=["4", 0])
    graph["4"] = picture()
    result = comfy.run(graph)
    assert result.status == "error" and "take the image off" in str(result.errors)


def picture() -> dict:
    return {
        "class_type": "EmptyImage",
        "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 0x3060C0},
    }


def during(comfy: ComfyServer, server: bed.Engine, graph: dict, act) -> tuple[object, str]:
    """Run a graph and call `act` once its job is under way; the result, and the job."""
    before = {job["id"] for job in server.get("/videos?limit=100")[1]["data"]}
    seen: list[str] = []

    def there() -> list[str]:
        with contextlib.suppress(OSError):
            listed = server.get("/videos?limit=100")[1]["data"]
            seen.extend(job["id"] for job in listed if job["id"] not in before)
        return seen

    def watch() -> None:
        until(there)
        act()

    thread = threading.Thread(target=watch)
    thread.start()
    result = comfy.run(graph)
    thread.join()
    assert seen, "the job never came"
    return result, seen[0]


def test_cancel_takes_the_job_off(comfy, server):
    graph = bed.video_graph(server.url, seed=41, steps=200, frames=17)
    result, job = during(comfy, server, graph, comfy.interrupt)
    assert result.status in ("error", "interrupted"), result
    until(lambda: server.get(f"/videos/{job}")[0] == 404)
    # The server works on the cancelled job to its end; the next one waits for it and is made.
    _, _, seconds = film(comfy, bed.video_graph(server.url, seed=42))
    bed.record(f"after a cancelled job, {comfy.tree.name}", seconds=round(seconds, 1))


def served_in_int4(folder: Path, plain: Path) -> bed.Engine:
    """A server with our INT4 folder of a model."""
    source = plain / "transformer" / "diffusion_pytorch_model.safetensors"
    made = folder / f"{plain.name}-int4"
    report = export(ServerJob(source, made, plain, GROUP))
    bed.record(f"export {made.name}", layers=report.layers, group=GROUP, error=report.error)
    return bed.omni(folder, made, made.name)


def check_int4(running: bed.Engine) -> str:
    """What its log says of the weights; the kernel that multiplies."""
    log = running.text()
    assert "Using CPUWNA16LinearKernel" in log
    # A tensor that it does not know is a warning there, and a layer of noise here.
    assert "Skipping weight" not in log
    return "torch on the loaded weights" if "INT4 products by torch" in log else "vLLM's own"


def test_our_int4_folder_is_served(comfy, once, server, int4_server):
    data, report, _ = film(comfy, bed.video_graph(int4_server.url))
    assert "5 frames of 64x64" in report
    kernel = check_int4(int4_server)
    # 4 bits move pixels, or they were not used.
    assert data != film(comfy, bed.video_graph(server.url))[0]
    bed.record("INT4 text to video", kernel=kernel, bytes=len(data))


def test_a_killed_server_is_left_for_the_next(comfy, once, server, int4_server):
    """The INT4 server stands first, and is gone afterwards."""
    both = f"{int4_server.url}\n{server.url}"
    _, report, _ = film(comfy, bed.video_graph(both, seed=51))
    assert f"made by 127.0.0.1:{int4_server.port}" in report and "was skipped" not in report
    graph = bed.video_graph(both, seed=52, steps=200, frames=17)
    began = time.monotonic()
    result, _ = during(comfy, int4_server, graph, int4_server.kill)
    seconds = time.monotonic() - began
    assert (result.status, result.errors) == ("success", [])
    report = result.outputs["3"]["text"][0]
    assert "was skipped" in report and f"made by 127.0.0.1:{server.port}" in report
    # Down before the order is placed: the same.
    _, again, _ = film(comfy, bed.video_graph(both, seed=53))
    assert "was skipped" in again
    bed.record("failover", seconds=round(seconds, 1), report=report)


def test_a_picture_becomes_a_video(comfy, image_server):
    result = comfy.run(bed.video_graph(image_server.url))
    assert result.status == "error" and "connect an image" in str(result.errors)
    graph = bed.video_graph(image_server.url, image=["4", 0])
    graph["4"] = picture()
    data, report, seconds = film(comfy, graph)
    assert "5 frames of 64x64" in report and "note:" not in report, report
    assert FILMS.setdefault("i2v", data) == data
    graph["4"]["inputs"]["color"] = 0xC06030
    assert film(comfy, graph)[0] != data
    facts = {"kernel": check_int4(image_server), "bytes": len(data)}
    bed.record(f"INT4 image to video, {comfy.tree.name}", seconds=round(seconds, 1), **facts)


def test_two_ranks_give_the_same_bytes(comfy, once, server, two_ranks):
    alone, *_ = film(comfy, bed.video_graph(server.url))
    shared, *_ = film(comfy, bed.video_graph(two_ranks.url))
    # Both work at one video: without this, equal bytes would prove nothing.
    log = two_ranks.text()
    assert "Worker 1: Initialized device" in log and "mode=ulysses, ulysses=2" in log
    assert shared == alone
    bed.record("two ranks (Ulysses)", identical=True, bytes=len(alone))

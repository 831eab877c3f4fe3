"""The graph for servers as it is shipped: words to one server, its answer to the other."""

from __future__ import annotations

import json

import pytest
from aiohttp import web
from PIL import Image

from frugal.demo.layout import WORKFLOWS
from frugal.demo.remote_graph import PROMPT
from frugal.servers.dialects import VLLM
from frugal.tests.helpers.graphs import faults
from frugal.tests.helpers.servers import completion, scripted
from frugal.tests.helpers.video_server import Videos

pytestmark = pytest.mark.comfy
LONGER = "a red fox walks slowly through fresh snow, soft morning light, the camera follows"
SMALL = {"width": 64, "height": 32, "frames": 5, "steps": 2}


async def chat(request: web.Request, body) -> web.Response:
    if request.path.endswith("/models"):
        return web.json_response({"data": [{"id": "words"}]})
    return completion(LONGER)


def opened(server, unmuted: bool) -> dict:
    """The shipped graph as the API takes it, with the muted half in place of the other or not."""
    graph = json.loads((WORKFLOWS / "remote_video.json").read_text(encoding="utf-8"))
    if unmuted:
        for node in graph["nodes"]:
            upper = node["type"] == "FrugalRemoteVideo" and not node["mode"]
            node["mode"] = 2 if upper else 0
    prompt = server.convert(graph)
    assert faults(prompt, server.object_info()) == []
    return prompt


@pytest.mark.parametrize("picture", [False, True], ids=["text", "picture"])
def test_words_become_more_words_and_a_video(server, picture):
    films = Videos(VLLM, "tiny-i2v" if picture else "tiny-t2v")
    Image.new("RGB", (64, 48), "teal").save(server.base / "input" / "remote_first.png")
    prompt = opened(server, picture)
    with scripted(chat) as words, scripted(films) as videos:
        for node in prompt.values():
            match node["class_type"]:
                case "FrugalPromptExtend":
                    assert node["inputs"]["text"] == PROMPT
                    node["inputs"] |= {"server_url": f"{words.url}/v1", "model": "words"}
                case "LoadImage":
                    node["inputs"]["image"] = "remote_first.png"
                case "FrugalRemoteVideo":
                    node["inputs"] |= {"servers": f"{videos.url}/v1", **SMALL}
        result = server.run(prompt)
    assert (result.status, result.errors) == ("success", [])
    assert [request["prompt"] for request in films.asked] == [LONGER]
    assert bool(films.asked[0].get("input_reference")) == picture
    names = [entry["filename"] for _, entry in result.files()]
    assert sum(name.endswith(".mp4") for name in names) == 1

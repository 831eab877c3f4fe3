"""Rewrite a prompt for Wan with a language model: on a server, or in ComfyUI itself."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...kernels.errors import FrugalError
from ...kernels.log import LOG
from ...servers import response_cache
from ...servers.address import server
from ...servers.chat import Question, ask
from ...servers.prompt_rules import cleaned, instructions
from . import glue

KEEP, STOP = "use the original prompt", "stop"
HEAT = 0.7
# Changes when answers kept by older versions must not be used any more.
VERSION = 1


@dataclass(frozen=True)
class PromptRequest:
    """What the widgets say."""

    text: str
    server_url: str
    model: str
    task: str
    language: str
    style: str
    seed: int
    max_tokens: int
    timeout_s: float
    key_variable: str

    def key(self, image: bytes) -> str:
        """Names the answer; the server's key and the patience have no part in it."""
        parts = (self.text, self.server_url, self.model, self.task, self.language, self.style)
        return response_cache.key([VERSION, *parts, self.seed, self.max_tokens], image)


@dataclass(frozen=True)
class Rewritten:
    text: str
    report: str


def rewrite(
    request: PromptRequest, image: Any, clip: Any, if_it_fails: str, typed: Mapping[str, Any]
) -> Rewritten:
    """The rewritten prompt; with KEEP the prompt as it is, and the reason in the report, where no
    answer came. `typed`: the widgets, for `failures`. Raises FrugalError for inputs that contradict
    each other, and with STOP.
    """
    wanted = bool(request.server_url.strip())
    if wanted == (clip is not None):
        raise FrugalError(
            "a server and a CLIP input" if wanted else "neither a server nor a CLIP input",
            "one of them to ask",
            "clear server_url to ask the CLIP input, or type an address and take CLIP off",
        )
    if not request.text.strip():
        raise FrugalError("an empty prompt", "a few words to rewrite", "type a prompt")
    folder = glue.prompts_folder()
    try:
        return _from_server(request, image, folder) if wanted else _from_clip(request, image, clip)
    except FrugalError as error:
        with contextlib.suppress(OSError):
            response_cache.failed(folder, _failure(typed))
        if if_it_fails == STOP:
            raise
        LOG.warning("[Frugal] the prompt was not rewritten: %s", error)
        return Rewritten(request.text, f"the original prompt is used: {error}\n\n{request.text}")


def failures(typed: Mapping[str, Any]) -> int:
    """Grows with each failure, so that ComfyUI asks again the next time, and only then. `typed`:
    the widgets' values; what comes over a wire is None or left out.
    """
    return response_cache.failures(glue.prompts_folder(), _failure(typed))


def _failure(typed: Mapping[str, Any]) -> str:
    return response_cache.key({name: value for name, value in typed.items() if value is not None})


def _from_server(request: PromptRequest, image: Any, folder: Path) -> Rewritten:
    where = server(request.server_url, request.key_variable)
    pixels = glue.png(image)
    name = request.key(pixels)
    found = response_cache.read(folder, name)
    if found is not None and isinstance(found.get("text"), str):
        notes = ("cached answer from the user folder",)
        return _told(found["text"], str(found.get("model")), where.name, notes)
    question = Question(
        instructions(request.task, request.language, request.style),
        request.text,
        request.model.strip(),
        pixels,
        request.seed,
        request.max_tokens,
        HEAT,
    )
    answer = glue.wait_for(ask(where, question, request.timeout_s))
    text, notes = cleaned(answer.text, answer.cut)
    with contextlib.suppress(OSError):
        response_cache.write(folder, name, {"text": text, "model": answer.model})
    return _told(text, answer.model, where.name, (*answer.notes, *notes))


def _from_clip(request: PromptRequest, image: Any, clip: Any) -> Rewritten:
    if not glue.writes_text(clip):
        raise FrugalError(
            "a CLIP input that cannot write",
            "a language model such as Qwen 3.5, in a ComfyUI with Generate Text",
            "load one with Load CLIP, or type the address of a server",
        )
    asked = (
        f"{instructions(request.task, request.language, request.style)}\n\nThe prompt to rewrite:\n"
        f"{request.text}"
    )
    said = glue.write_text(clip, asked, image, request.seed, request.max_tokens, HEAT)
    text, notes = cleaned(said)
    return _told(text, "CLIP input", "this ComfyUI", notes)


def _told(text: str, model: str, place: str, notes: tuple[str, ...]) -> Rewritten:
    lines = [f"rewritten by {model} on {place}", *(f"note: {note}" for note in notes), "", text]
    return Rewritten(text, "\n".join(lines))

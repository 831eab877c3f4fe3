"""One question to an OpenAI-compatible chat endpoint (vLLM, TensorRT-LLM, llama.cpp, transformers).

Fields beyond the common ones are optional: a server that complains about one by name is asked again
without it. Neither a key, nor `/models`, nor `response_format` is needed.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

from ..kernels.errors import FrugalError
from .address import Server
from .transport import exchange, refusal

# Qwen 3 and 3.5 think aloud unless their template is told not to; OpenAI's own API has no such
# field, and its newer models want another name for the limit.
OPTIONAL_FIELDS = ("chat_template_kwargs", "seed", "temperature")
NAMES = {"max_tokens": "max_completion_tokens"}


@dataclass(frozen=True)
class Question:
    """model: empty for the only one that the server has. image: PNG bytes or none."""

    instructions: str
    text: str
    model: str = ""
    image: bytes = b""
    seed: int = 0
    max_tokens: int = 512
    temperature: float = 0.7

    def messages(self) -> list[dict[str, Any]]:
        """System and user message; the image as a data URL."""
        content: Any = self.text
        if self.image:
            url = f"data:image/png;base64,{base64.b64encode(self.image).decode()}"
            picture = {"type": "image_url", "image_url": {"url": url}}
            content = [picture, {"type": "text", "text": self.text}]
        return [
            {"role": "system", "content": self.instructions},
            {"role": "user", "content": content},
        ]


@dataclass(frozen=True)
class Answer:
    """text as the model wrote it, the model's name, whether max_tokens cut it off, notes."""

    text: str
    model: str
    cut: bool
    notes: tuple[str, ...] = ()


async def ask(server: Server, question: Question, timeout: float) -> Answer:
    """Raises FrugalError where no answer came."""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None)) as session:
        model = question.model or await _only_model(session, server, timeout)
        fields: dict[str, Any] = {
            "model": model,
            "messages": question.messages(),
            "max_tokens": question.max_tokens,
            "temperature": question.temperature,
            "seed": question.seed % 2**31,
            "stream": False,
            "chat_template_kwargs": {"enable_thinking": False},
        }
        notes = []
        while True:
            reply = await exchange(
                session,
                server,
                "POST",
                "/chat/completions",
                timeout=timeout,
                body=lambda: {"json": fields},
            )
            if reply.status < 400:
                break
            unwanted = _complaint(reply.status, reply.text(), fields)
            if unwanted is None:
                raise refusal(server, reply)
            value = fields.pop(unwanted)
            if unwanted in NAMES:
                fields[NAMES[unwanted]] = value
            else:
                notes.append(f"the server does not take {unwanted}: asked without it")
    return _answer(server, reply.json(server.name), model, tuple(notes))


def _complaint(status: int, said: str, fields: Mapping[str, Any]) -> str | None:
    if status not in (400, 422):
        return None
    return next(
        (name for name in (*OPTIONAL_FIELDS, *NAMES) if name in fields and name in said), None
    )


async def _only_model(session: aiohttp.ClientSession, server: Server, timeout: float) -> str:
    reply = await exchange(session, server, "GET", "/models", timeout=timeout)
    if reply.status >= 400:
        raise refusal(server, reply)
    listed = reply.json(f"{server.name}/models")
    data = listed.get("data") if isinstance(listed, Mapping) else None
    names = [
        str(each["id"])
        for each in (data if isinstance(data, Sequence) else ())
        if isinstance(each, Mapping) and "id" in each
    ]
    if len(names) != 1:
        raise FrugalError(
            f"{server.name} lists {len(names)} models ({ascii(', '.join(names))[1:-1][:120]})",
            "one model, or the name of the one to ask",
            "type the model's name",
        )
    return names[0]


def _answer(server: Server, said: Any, model: str, notes: tuple[str, ...]) -> Answer:
    try:
        choice = said["choices"][0]
        content = choice["message"]["content"]
        if isinstance(content, list):
            content = "".join(part.get("text", "") for part in content)
        cut = choice.get("finish_reason") == "length"
    except (KeyError, IndexError, TypeError, AttributeError):
        raise FrugalError(
            f"{server.name} answered without choices[0].message.content: {ascii(str(said))[:120]}",
            "a chat completion",
            "check that the address is that of an OpenAI-compatible API",
        ) from None
    return Answer(str(content or ""), model, cut, notes)

"""Servers for the nodes that speak with one: a scripted one for errors, and a real chat server."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from aiohttp import web

from frugal.tests.helpers.patience import HANG, until

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class Scripted:
    """A server whose answers a test gives: `handle` is an aiohttp handler. `seen` holds what came
    as (method, path, headers, JSON or None).
    """

    def __init__(self, handle):
        self.handle, self.seen, self.url = handle, [], ""

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        # A form can be read once only: its handler does.
        body = await request.json() if request.content_type == "application/json" else None
        self.seen.append((request.method, request.path, dict(request.headers), body))
        return await self.handle(request, body)


@contextlib.contextmanager
def scripted(handle) -> Iterator[Scripted]:
    """A Scripted server on loopback, in a thread."""
    server, ready, loop = Scripted(handle), threading.Event(), asyncio.new_event_loop()

    async def serve() -> web.AppRunner:
        app = web.Application()
        app.router.add_route("*", "/{tail:.*}", server._answer)
        runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        server.url = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"
        return runner

    def body() -> None:
        asyncio.set_event_loop(loop)
        runner = loop.run_until_complete(serve())
        ready.set()
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())
        loop.close()

    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    assert ready.wait(HANG)
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(HANG)


def completion(text: str, finish: str = "stop") -> web.Response:
    """A chat completion as OpenAI's API documents it."""
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": finish}
    return web.json_response({"object": "chat.completion", "choices": [choice]})


def write_tiny_qwen(folder: Path) -> None:
    """A random Qwen 3.5 of 0.2 million parameters with a byte tokenizer: it answers noise."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3_5ForCausalLM, Qwen3_5TextConfig

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: place for place, token in enumerate([*special, *letters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=special[2], pad_token=special[0]
    )
    fast.add_special_tokens({"additional_special_tokens": special[1:2]})
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    config = Qwen3_5TextConfig(
        vocab_size=len(fast),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=32,
        linear_value_head_dim=32,
        max_position_embeddings=4096,
        # Untied and wide, or every token would answer with itself.
        tie_word_embeddings=False,
        initializer_range=0.5,
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.pad_token_id,
    )
    torch.manual_seed(0)
    Qwen3_5ForCausalLM(config).save_pretrained(folder)


@contextlib.contextmanager
def transformers_serve(model: Path, log: Path) -> Iterator[str]:
    """The address of a `transformers serve` of the model folder; its model's name is the folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = Path(sys.executable).with_name("transformers")
    command = [str(program), "serve", str(model), "--host", "127.0.0.1", "--port", str(port)]
    quiet = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "DO_NOT_TRACK": "1"}
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, cwd=log.parent, env={**os.environ, **quiet}, stdout=file, stderr=file
        )
        try:

            def answers() -> bool:
                assert process.poll() is None, log.read_text()[-3000:]
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=HANG).read()
                    return True
                return False

            until(answers, lambda: log.read_text()[-3000:])
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()
            process.wait(HANG)

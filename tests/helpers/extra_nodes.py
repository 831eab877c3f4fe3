"""Custom nodes for the tests' servers, copied into their custom_nodes: they wait, end the process,
complain like a card, look around.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

from comfy import utils
from comfy.model_management import (
    processing_interrupted,
    throw_exception_if_processing_interrupted,
)
from comfy_execution.utils import get_executing_context


class Test:
    CATEGORY, FUNCTION, RETURN_TYPES, OUTPUT_NODE = "test", "go", (), True

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {"value": ("STRING", {"default": ""})}}

    @classmethod
    def IS_CHANGED(cls, value):  # noqa: N802
        return float("nan")


class TestWait(Test):
    """Waits for the file `value`; says before, in VALUE.inside, which process does."""

    def go(self, value):
        part = Path(f"{value}.{os.getpid()}.part")
        part.write_text(str(os.getpid()))
        part.replace(value + ".inside")
        while not os.path.exists(value):
            throw_exception_if_processing_interrupted()
            time.sleep(0.02)
        return {"ui": {"text": ["waited"]}}


class TestRest(Test):
    """Waits until the mask kernels that compile in the background are done."""

    def go(self, value):
        for thread in threading.enumerate():
            if thread.name == "frugal-masks-warm-up":
                thread.join()
        return {"ui": {"text": ["at rest"]}}


class TestHold(Test):
    """From now on: when the node with the id `value` first tells that it is under way, it stays
    there until somebody interrupts it.
    """

    def go(self, value):
        tell = utils.PROGRESS_BAR_HOOK

        def hold(done, total, *more, **named):
            tell(done, total, *more, **named)
            context = get_executing_context()
            if context is not None and context.node_id == value and 0 < done < total:
                utils.set_progress_bar_global_hook(tell)
                while not processing_interrupted():
                    time.sleep(0.02)

        utils.set_progress_bar_global_hook(hold)
        return {"ui": {"text": ["holding"]}}


class TestEnd(Test):
    def go(self, value):
        os.kill(os.getpid(), 9)


class TestRaise(Test):
    def go(self, value):
        raise RuntimeError(value)


class TestLook(Test):
    def go(self, value):
        return {"ui": {"text": sorted(os.environ)}}


NODE_CLASS_MAPPINGS = {kind.__name__: kind for kind in Test.__subclasses__()}

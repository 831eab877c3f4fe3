"""The node that rewrites a prompt."""

from __future__ import annotations

from comfy_api.v0_0_2 import io

from ...servers.prompt_rules import LANGUAGES, TASKS
from .._comfy import ADVANCED, CATEGORY, found_by, show_text
from . import glue, prompt_run
from .common_inputs import key_input


class FrugalPromptExtend(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FrugalPromptExtend",
            display_name="Extend Prompt for Wan",
            category=f"{CATEGORY}/servers",
            description=(
                "Rewrites a short prompt into the detailed kind that Wan was trained on, with a "
                "language model on an OpenAI-compatible server (vLLM, TensorRT-LLM, llama.cpp, "
                "transformers serve) or with a Qwen 3.5 loaded in ComfyUI. If no answer arrives, "
                "the original prompt is used and the node says why."
            ),
            inputs=[
                io.String.Input(
                    "text",
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip="Your prompt in plain words. Everything it names is kept.",
                ),
                io.String.Input(
                    "server_url",
                    default="http://127.0.0.1:8000/v1",
                    tooltip=(
                        "Base URL of the server's API, often ending in /v1; the prompt, and the "
                        "image if connected, are sent there. Empty = use the CLIP input."
                    ),
                ),
                io.String.Input(
                    "model",
                    default="",
                    tooltip="Name of the model on the server. Empty = the only one it has.",
                ),
                io.Combo.Input(
                    "task",
                    options=list(TASKS),
                    default=TASKS[0],
                    tooltip=(
                        "What the prompt is for; decides what the language model is told to add."
                    ),
                ),
                io.Combo.Input(
                    "language",
                    options=list(LANGUAGES),
                    default=LANGUAGES[0],
                    tooltip="Language of the answer. Wan reads English and Chinese.",
                ),
                io.String.Input(
                    "style",
                    default="",
                    tooltip="Style to follow, such as: documentary, 16 mm film. May be empty.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=False,
                    tooltip="Another seed gives another wording.",
                ),
                io.Int.Input(
                    "max_tokens",
                    default=512,
                    min=16,
                    max=4096,
                    tooltip="Maximum number of tokens to generate. Wan reads 512 tokens.",
                    **ADVANCED,
                ),
                io.Float.Input(
                    "timeout_s",
                    default=60.0,
                    min=1.0,
                    max=3600.0,
                    step=1.0,
                    tooltip="Seconds to wait for the server, including retries.",
                    **ADVANCED,
                ),
                key_input(),
                io.Combo.Input(
                    "if_it_fails",
                    options=[prompt_run.KEEP, prompt_run.STOP],
                    default=prompt_run.KEEP,
                    tooltip="What to do if no answer arrives. The next run asks again either way.",
                ),
                io.Image.Input(
                    "image",
                    optional=True,
                    tooltip="First frame, for vision models; sent with at most 768 px per side.",
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="A language model (Qwen 3.5) to use instead of a server.",
                ),
            ],
            outputs=[
                io.String.Output(
                    "extended",
                    display_name="text",
                    tooltip="The rewritten prompt, or the original one if no answer arrived.",
                ),
                io.String.Output(
                    "report",
                    display_name="report",
                    tooltip="Which model answered, what was shortened, or why no answer arrived.",
                ),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt],
            **found_by(["prompt enhance", "LLM", "rewrite", "vLLM", "Qwen"]),
        )

    @classmethod
    def fingerprint_inputs(cls, image=None, clip=None, **widgets):
        return prompt_run.failures(widgets)

    @classmethod
    def execute(
        cls, image=None, clip=None, if_it_fails=prompt_run.KEEP, **widgets
    ) -> io.NodeOutput:
        widgets["text"] = widgets["text"] or ""
        typed = glue.typed(cls.hidden, {**widgets, "if_it_fails": if_it_fails})
        result = prompt_run.rewrite(
            prompt_run.PromptRequest(**widgets), image, clip, if_it_fails, typed
        )
        show_text(cls.hidden.unique_id, result.report)
        return io.NodeOutput(result.text, result.report)

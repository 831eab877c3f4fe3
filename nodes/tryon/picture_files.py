"""Picture files below ComfyUI's input folder: found, named and read as a person sees them.

Upright (EXIF), transparency on white, any bit depth; a file that cannot be read says which it is.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import folder_paths
import numpy as np
import torch
from PIL import Image, ImageOps

from ...kernels.errors import FrugalError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


def folders() -> list[str]:
    """Folders below ComfyUI's input folder, to choose from."""
    return folder_paths.get_input_subfolders()


def input_folder(name: str) -> Path:
    """Absolute path of a `folders` entry. Raises FrugalError for one that is not there or leads out
    of the input folder.
    """
    root = Path(folder_paths.get_input_directory()).resolve()
    path = (root / name).resolve()
    if root not in path.parents or not path.is_dir():
        raise FrugalError(
            f"there is no folder input/{ascii(name)[1:-1][:80]}",
            "a folder with pictures below ComfyUI's input folder",
            "put the pictures into a folder of their own there, then press R",
        )
    return path


def named_pictures(name: str, subfolders: bool = False) -> dict[str, Path]:
    """Name -> file of the pictures of an input folder, in the order a person counts: 2 before 10.

    The name is the file's without its ending, that of a subfolder before it; with the ending where
    two files would have the same. Raises FrugalError for a folder without pictures.
    """
    root = input_folder(name)
    found = root.rglob("*") if subfolders else root.iterdir()
    files = [p for p in found if p.suffix.lower() in SUFFIXES and p.is_file()]
    if not files:
        raise FrugalError(
            f"the folder input/{name} has no pictures",
            f"files with {', '.join(SUFFIXES)}",
            "put pictures there" + ("" if subfolders else ", or turn subfolders on"),
        )
    files.sort(key=lambda path: _counted(path.relative_to(root).as_posix()))
    plain = [_name(path.relative_to(root), ending=False) for path in files]
    often = Counter(name.casefold() for name in plain)
    return {
        plain[i] if often[plain[i].casefold()] == 1 else _name(path.relative_to(root), True): path
        for i, path in enumerate(files)
    }


def _name(path: Path, ending: bool) -> str:
    whole = path if ending else path.with_suffix("")
    return re.sub(r'[\\/:*?"<>|]', "-", whole.as_posix())


def _counted(name: str) -> list[tuple[int, int | str]]:
    parts = re.split(r"(\d+)", name.casefold())
    return [(0, int(part)) if part.isdigit() else (1, part) for part in parts]


def read_picture(path: Path) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(colour [1, H, W, 3] in 0..1, alpha [1, H, W] or None) of an upright picture. Raises
    FrugalError, with the file's name, for one that cannot be read.
    """
    try:
        with Image.open(path) as file:
            picture = ImageOps.exif_transpose(file)
            if picture.mode.startswith(("I", "F")):
                return _grey(np.asarray(picture, np.float32), picture.mode), None
            clear = "A" in picture.getbands() or "transparency" in picture.info
            pixels = np.asarray(picture.convert("RGBA" if clear else "RGB"), np.float32)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise FrugalError(
            f"{path.name} cannot be read ({ascii(str(error))[1:-1][:120]})",
            "a picture",
            "replace the file or take it out of the folder",
        ) from error
    whole = torch.from_numpy(pixels / np.float32(255))[None]
    return whole[..., :3], whole[..., 3] if clear else None


def _grey(values: np.ndarray, mode: str) -> torch.Tensor:
    """16-bit grey has 65535 levels; floats are in 0..1 already."""
    values = values if mode == "F" else values / np.float32(65535)
    grey = torch.from_numpy(np.clip(values, 0, 1))[None, ..., None]
    return grey.expand(*grey.shape[:3], 3).contiguous()


def on_white(colour: torch.Tensor, alpha: torch.Tensor | None) -> torch.Tensor:
    """Colour with what is transparent in white."""
    return colour if alpha is None else colour * alpha[..., None] + (1 - alpha[..., None])


def as_mask(colour: torch.Tensor, alpha: torch.Tensor | None) -> torch.Tensor:
    """Mask [1, H, W] of a picture: 1 where it is transparent, if anything is, else brightness."""
    if alpha is not None and bool((alpha < 1).any()):
        return 1 - alpha
    return colour.mean(dim=-1)

"""Compiles device.cpp against this environment's torch and loads it, before torch is imported."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
NAME = "simulated_cuda_device"
# What torch itself loads first, in this order.
LIBRARIES = ("torch_global_deps", "c10", "torch_cpu", "torch", "torch_python")


def torch_folder() -> Path:
    """Where torch lies, without importing it."""
    found = importlib.util.find_spec("torch")
    assert found is not None and found.origin is not None, "no torch in this environment"
    return Path(found.origin).parent


def obstacle() -> str | None:
    """Why the card cannot be simulated here, or None."""
    if sys.platform != "linux":
        return "the simulated card is written for Linux"
    if compiler() is None:
        return "there is no C++ compiler (c++, g++ or clang++)"
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return "Python's own headers are missing (Debian: python3-dev)"
    # Its file, for importing torch would be too early.
    version = runpy.run_path(str(torch_folder() / "version.py"))
    if version["cuda"] is not None:
        return f"torch {version['__version__']} is a CUDA build; the card needs a CPU build"
    return None


def compiler() -> str | None:
    return next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)


def library() -> Path:
    """The compiled device; compiled on the first call for this source, torch and Python."""
    torch = torch_folder()
    digest = hashlib.sha256(f"{sys.version} {(torch / 'version.py').read_text()}".encode())
    for path in sorted([*HERE.glob("*.h"), *HERE.glob("*.cpp")]):
        digest.update(path.read_bytes())
    folder = HERE.parent / "build" / digest.hexdigest()[:16]
    built = folder / f"{NAME}.so"
    if not built.exists():
        folder.mkdir(parents=True, exist_ok=True)
        # Another process may be at it; the name appears only once the file is whole.
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / built.name
            compile_to(made, torch)
            os.replace(made, built)
    return built


def compile_to(path: Path, torch: Path) -> None:
    include = torch / "include"
    command = [str(compiler()), "-std=c++20", "-O1", "-fPIC", "-shared"]
    command += [f"-DTORCH_EXTENSION_NAME={NAME}", "-isystem", str(include)]
    command += ["-isystem", str(include / "torch" / "csrc" / "api" / "include")]
    command += ["-isystem", sysconfig.get_path("include"), str(HERE / "device.cpp")]
    command += ["-o", str(path), f"-L{torch / 'lib'}"]
    command += ["-lc10", "-ltorch_cpu", "-ltorch", "-ltorch_python"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"device.cpp does not compile:\n{done.stderr[:4000]}")


def load() -> ModuleType:
    """The device's Python side; its static registrations run before torch first asks for CUDA."""
    assert "torch" not in sys.modules, "the card has to be started before torch is imported"
    path, folder = library(), torch_folder() / "lib"
    mode = os.RTLD_LAZY | os.RTLD_GLOBAL
    for name in LIBRARIES:
        ctypes.CDLL(str(folder / f"lib{name}.so"), mode=mode)
    ctypes.CDLL(str(path), mode=mode)
    import torch  # noqa: F401

    found = importlib.util.spec_from_file_location(NAME, path)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module

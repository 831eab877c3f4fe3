"""Names and numbers of files in the output folder."""

from __future__ import annotations

import pytest

from frugal.kernels.errors import FrugalError

pytestmark = pytest.mark.comfy


@pytest.fixture
def output(comfy_tree, tmp_path, monkeypatch):
    import folder_paths

    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("prefix", ["a", "b/c", "d/", "e/.", "f//", "g/h\\", "i.", "day/%year%/"])
def test_no_prefix_writes_over_an_earlier_file(output, prefix):
    """ComfyUI counts from 1 again where a prefix ends in a slash."""
    from frugal.nodes._output import free_number, next_path

    made = set()
    for _ in range(3):
        folder, name, number, inside = free_number(prefix)
        path = folder / f"{name}_{number:05}_.mp4"
        assert not path.exists() and name and output in path.parents
        assert folder == output / inside
        path.touch()
        made.add(path)
        other = next_path("kind", prefix, ".safetensors")
        assert not other.exists() and output / "kind" in other.parents
        other.touch()
    assert len(made) == 3


@pytest.mark.parametrize("prefix", ["", " ", "/", ".", "//", "./."])
def test_a_prefix_without_a_name(output, prefix):
    from frugal.nodes._output import free_number, next_path

    with pytest.raises(FrugalError, match="type a file name"):
        free_number(prefix)
    with pytest.raises(FrugalError, match="type a file name"):
        next_path("kind", prefix, ".x")

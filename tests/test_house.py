"""The house rules that a machine can check; each failure names the file and the rule."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from frugal.tests.helpers.tracked import tracked_or_skip

ROOT = Path(__file__).resolve().parent.parent
TOP_LEVEL = {
    ".ci", ".comfyignore", ".github", ".gitignore", ".pre-commit-config.yaml", "AGENTS.md",
    "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "README.md", "SECURITY.md", "__init__.py",
    "bench", "demo", "dev.py", "docs", "kernels", "locales", "nodes", "pyproject.toml",
    "requirements.txt", "servers", "tests", "workflows",
}  # fmt: skip
COMFYUI_MODULES = {
    "comfy", "comfy_api", "comfy_api_nodes", "comfy_config", "comfy_execution", "comfy_extras",
    "execution", "folder_paths", "latent_preview", "node_helpers", "nodes", "server",
}  # fmt: skip
LONGEST_FILE = 500
NEVER_LISTED = {"torch", "torchvision", "torchaudio", "torchsde", "numpy", "pillow", "transformers"}


def tracked() -> list[Path]:
    return [ROOT / name for name in tracked_or_skip()]


def sources(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def last_part(node: ast.expr) -> str:
    return ast.unparse(node).split(".")[-1]


def schemas() -> list[tuple[Path, ast.ClassDef, ast.Call]]:
    """Every class of nodes/ that calls Schema(...), with that call."""
    found = []
    for path in sources("nodes"):
        for cls in ast.walk(tree_of(path)):
            if isinstance(cls, ast.ClassDef):
                for call in ast.walk(cls):
                    if isinstance(call, ast.Call) and last_part(call.func) == "Schema":
                        found.append((path, cls, call))
    return found


def keyword(call: ast.Call, wanted: str) -> ast.expr | None:
    return next((k.value for k in call.keywords if k.arg == wanted), None)


def literal_node_id(call: ast.Call) -> str:
    value = keyword(call, "node_id")
    assert isinstance(value, ast.Constant), f"node_id is not a literal: {ast.unparse(call)[:80]}"
    return value.value


def test_there_are_nodes():
    assert schemas(), "no io.Schema call found under nodes/: the other rules would check nothing"


def test_kernels_know_no_comfyui():
    for path in sources("kernels"):
        for node in ast.walk(tree_of(path)):
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                modules = [node.module or ""]
            elif isinstance(node, ast.ImportFrom):
                depth = len(path.relative_to(ROOT).parts)
                assert node.level < depth, f"{name(path)}:{node.lineno} leaves kernels/"
            for module in modules:
                top = module.split(".")[0]
                assert top not in COMFYUI_MODULES, f"{name(path)}:{node.lineno} imports {module}"


def test_kernels_import_without_comfyui():
    """Every kernel module loads by itself when ComfyUI's names cannot be imported."""
    assert import_kernels(COMFYUI_MODULES) == []


def test_only_numba_files_need_numba():
    """Without numba a package's front door still opens; only the files of jitted kernels do not."""
    failed = import_kernels({"numba"})
    assert all("numba" in reason for _, reason in failed), failed
    doors = [m for m, _ in failed if (ROOT / m.replace(".", "/") / "__init__.py").is_file()]
    assert not doors, f"these packages import numba at once: {doors}"


def import_kernels(blocked: set[str]) -> list[list[str]]:
    """Import every kernel module in a fresh process; returns [module, message] of each failure."""
    modules = [name(path)[:-3].replace("/", ".") for path in sources("kernels")]
    modules = [module.removesuffix(".__init__") for module in modules]
    code = (
        "import importlib, importlib.util, json, sys\n"
        f"for name in {sorted(blocked)}: sys.modules[name] = None\n"
        f"spec = importlib.util.spec_from_file_location('frugal', {str(ROOT / '__init__.py')!r},"
        f" submodule_search_locations=[{str(ROOT)!r}])\n"
        "sys.modules['frugal'] = importlib.util.module_from_spec(spec)\n"
        "failed = []\n"
        f"for name in {modules}:\n"
        "    try: importlib.import_module('frugal.' + name)\n"
        "    except ImportError as error: failed.append([name, str(error)])\n"
        "print(json.dumps(failed))\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_entry_point_loads_nothing():
    """ComfyUI imports the pack's root early; torch, numba and ComfyUI must wait until asked for."""
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('frugal', {str(ROOT / '__init__.py')!r})\n"
        "spec.loader.exec_module(importlib.util.module_from_spec(spec))\n"
        "print(sorted({m.split('.')[0] for m in sys.modules} & {'torch', 'numba', 'comfy'}))\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_top_level_is_fixed():
    found = {path.relative_to(ROOT).parts[0] for path in tracked()}
    assert found <= TOP_LEVEL, f"new at the top level: {sorted(found - TOP_LEVEL)}"
    assert found >= TOP_LEVEL - {"bench", "docs"}, f"missing: {sorted(TOP_LEVEL - found)}"


def test_no_file_is_long():
    for path in tracked():
        if path.suffix == ".py":
            lines = len(path.read_text(encoding="utf-8").splitlines())
            assert lines <= LONGEST_FILE, f"{name(path)} has {lines} lines; split it by idea"


def test_pack_sources_are_ascii():
    """Consoles with another code page show anything else as garbage, or fail on it."""
    for path in [ROOT / "__init__.py", *sources("nodes", "kernels", "servers")]:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            assert line.isascii(), f"{name(path)}:{number} is not ASCII: {line!r}"


def test_relative_imports_only():
    """Inside ComfyUI the pack's folder is not importable by name, and `nodes` is ComfyUI's."""
    ours = {"frugal", "kernels", "servers"}
    for path in sources("nodes", "kernels", "servers"):
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                top = (node.module or "").split(".")[0]
                assert top not in ours, f"{name(path)}:{node.lineno} imports {node.module}"


def test_nodes_are_visible_to_the_manager():
    """A direct base written ComfyNode and a literal id: its scanner reads nothing else."""
    for path, cls, call in schemas():
        where = f"{name(path)}:{cls.lineno} {cls.name}"
        assert [last_part(base) for base in cls.bases] == ["ComfyNode"], where
        assert literal_node_id(call).startswith("Frugal"), where
        assert ast.unparse(call.func) == "io.Schema", where


def test_node_ids_are_unique():
    ids = [literal_node_id(call) for _, _, call in schemas()]
    assert len(ids) == len(set(ids)), sorted(i for i in ids if ids.count(i) > 1)


def test_nodes_say_what_they_are():
    for path, cls, call in schemas():
        where = f"{name(path)}:{cls.lineno} {cls.name}"
        for wanted in ("display_name", "category", "description", "inputs", "outputs"):
            assert keyword(call, wanted) is not None, f"{where}: no {wanted}"
        for part in ast.walk(call):
            if isinstance(part, ast.Call) and last_part(part.func) in ("Input", "Output"):
                assert keyword(part, "tooltip") is not None, f"{where}: {ast.unparse(part)[:60]}"


def test_help_page_per_node():
    pages = {path.stem for path in (ROOT / "nodes" / "web" / "docs").glob("*.md")}
    ids = {literal_node_id(call) for _, _, call in schemas()}
    assert ids <= pages, f"nodes without a help page: {sorted(ids - pages)}"
    assert pages <= ids, f"help pages without a node: {sorted(pages - ids)}"


def test_requirements_pin_nothing_shared():
    import tomllib

    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").split("\n")
    listed = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert listed == project["dependencies"]
    for line in listed:
        package = re.split(r"[^A-Za-z0-9_.-]", line)[0].lower()
        assert package == line.lower(), f"requirements.txt pins {line}"
        assert package not in NEVER_LISTED, f"{package} is ComfyUI's to choose"


def test_packaging_lists_every_package():
    import tomllib

    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    listed = settings["tool"]["setuptools"]["packages"]
    there = {
        path.parent for path in sources("kernels", "nodes", "servers") if path.name == "__init__.py"
    }
    # A folder may be installed under a shorter name, and then only under that one.
    renamed = {
        place: package for package, place in settings["tool"]["setuptools"]["package-dir"].items()
    }
    expected = {"frugal"} | {
        renamed.get(name(folder), "frugal." + name(folder).replace("/", ".")) for folder in there
    }
    assert sorted(listed) == sorted(expected)


def test_the_registry_archive_keeps_the_pack():
    """An unanchored pattern once would have dropped the help pages, which lie in a docs folder."""
    pathspec = pytest.importorskip("pathspec")
    lines = (ROOT / ".comfyignore").read_text(encoding="utf-8").splitlines()
    left_out = pathspec.PathSpec.from_lines("gitignore", lines)
    needed = {
        "nodes",
        "kernels",
        "servers",
        "workflows",
        "__init__.py",
        "requirements.txt",
        "LICENSE",
    }
    for path in tracked():
        if path.relative_to(ROOT).parts[0] in needed:
            assert not left_out.match_file(name(path)), name(path)
    assert left_out.match_file("tests/conftest.py")


def test_workflows_are_saved_graphs_with_pictures():
    """The web page's form, not the API's: that is what a person can open."""
    graphs = sorted((ROOT / "workflows").glob("*.json"))
    pictures = {path.stem for path in (ROOT / "workflows").glob("*.jpg")}
    assert {path.stem for path in graphs} == pictures
    for path in graphs:
        graph = json.loads(path.read_text(encoding="utf-8"))
        assert isinstance(graph.get("nodes"), list) and graph["nodes"], name(path)
        assert isinstance(graph.get("links"), list), name(path)
        for node in graph["nodes"]:
            if node["type"].startswith("Frugal"):
                assert node.get("properties", {}).get("cnr_id"), f"{name(path)}: {node['type']}"


def test_errors_say_what_to_do():
    """ComfyUI shows one sentence: its last part has to lead somewhere, not just to "choose"."""
    seen = 0
    for path in sources("nodes", "kernels", "servers"):
        for call in ast.walk(tree_of(path)):
            if not isinstance(call, ast.Call) or last_part(call.func) != "FrugalError":
                continue
            seen += 1
            where = f"{name(path)}:{call.lineno}"
            assert len(call.args) == 3, f"{where}: found, expected, do"
            do = call.args[2]
            if isinstance(do, ast.Constant):
                assert do.value.isascii() and do.value[0].islower(), f"{where}: {do.value}"
                assert len(do.value.split()) > 1, f"{where}: '{do.value}' is no way out"
                assert do.value not in ("choose one", "choose others", "correct it"), where
    assert seen > 300


def test_tests_are_no_package():
    found = [name(path) for path in (ROOT / "tests").rglob("__init__.py")]
    assert not found, f"these make pytest import the pack's root: {found}"


def test_the_pack_changes_no_environment():
    """No download, no pip, no import-path edits, no fixed device: in nodes/ and kernels/."""
    forbidden = re.compile(
        r"sys\.path\b|hf_hub_download|snapshot_download|from_pretrained\(|subprocess|os\.system"
        r"|urllib\.request|import requests|\.cuda\(\)|logging\.basicConfig"
    )
    for path in [ROOT / "__init__.py", *sources("nodes", "kernels", "servers")]:
        if "servers" in path.parts:
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            assert not forbidden.search(line), f"{name(path)}:{number}: {line.strip()}"


# Phrases that once stood for things with a usual name, which docs/developer/glossary.md has.
PRIVATE_WORDS = (
    "(Frugal)", "beside the weights", "cannot stand", "close ranks", "constant context", "errs",
    "foretell", "foretells", "foretold", "hangs on", "in sight", "lora beside", "loras beside",
    "results given again", "run by run", "side branch", "stands aside", "this step is repeated",
)  # fmt: skip
READ = ("nodes", "kernels", "servers", "tests", "docs", "workflows", "README.md")


def private_words(text: str) -> list[str]:
    """Those of the list in a text, whose lines may break inside a phrase."""
    found = "|".join(rf"(?<!\w){re.escape(words)}(?!\w)" for words in PRIVATE_WORDS)
    return re.findall(found, re.sub(r"\s+#?\s*", " ", text), re.IGNORECASE)


def test_things_have_their_usual_names():
    found = {}
    for path in tracked():
        read = path.suffix in (".py", ".md", ".json") and path.relative_to(ROOT).parts[0] in READ
        if read and path.resolve() != Path(__file__).resolve():
            found[name(path)] = private_words(path.read_text("utf-8"))
    found = {path: words for path, words in found.items() if words}
    assert not found, f"docs/developer/glossary.md has the usual names: {found}"


def test_a_private_word_is_seen():
    assert private_words("what is foretold") == ["foretold"]
    assert private_words("the frames in\n    # sight; it Errs") == ["in sight", "Errs"]
    assert private_words("a node (Frugal)") == ["(Frugal)"]
    assert private_words("in the attention window, recomputed") == []

"""The wheel holds every module of the tree and nothing at its top but the package."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("draftattn", "kernels", "pipelines", "eval")
FILES = ("pyproject.toml", "README.md", "LICENSE")


def modules_of_tree() -> set[str]:
    """Where each module of the tree belongs inside a wheel."""
    found = set()
    for source in SOURCES:
        inside = PurePosixPath("draftattn") if source == "draftattn" else PurePosixPath("draftattn", source)
        for path in (ROOT / source).rglob("*.py"):
            relative = path.relative_to(ROOT / source)
            if source != "draftattn" or relative.parts[0] not in SOURCES[1:]:
                found.add(str(inside / relative.as_posix()))
    return found


@pytest.fixture(scope="module", params=[True, False], ids=["symlinks", "no symlinks"])
def wheel(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """A wheel built from a copy of the tree, with the symlinks or, as in a checkout on Windows, small files instead."""
    tree = tmp_path_factory.mktemp("tree")
    junk = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for source in SOURCES:
        shutil.copytree(ROOT / source, tree / source, symlinks=True, ignore=junk)
    shutil.copytree(ROOT / "assets" / "lpips", tree / "assets" / "lpips")
    for name in FILES:
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, tree)
        else:
            (tree / name).write_text("")
    links = [tree / "draftattn" / link for link in SOURCES[1:]]
    for path in (*links, tree / "eval" / "metrics" / "weights"):
        assert path.is_symlink()
        if not request.param:
            target = str(path.readlink())
            path.unlink()
            path.write_text(target)
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", str(tree), "--no-deps", "--no-build-isolation", "--no-index"]
    result = subprocess.run([*command, "--quiet", "--wheel-dir", str(out)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return zipfile.ZipFile(next(out.glob("*.whl")))


def test_modules_equal_those_of_the_tree(wheel: zipfile.ZipFile) -> None:
    assert {name for name in wheel.namelist() if name.endswith(".py")} == modules_of_tree()


def test_nothing_but_the_package_is_at_the_top(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist()}
    metadata = {top for top in tops if top.endswith(".dist-info")}
    assert len(metadata) == 1
    assert tops - metadata == {"draftattn"}
    top_level = wheel.read(f"{metadata.pop()}/top_level.txt").decode().split()
    assert top_level == ["draftattn"]


def test_types_and_licence_are_in_it(wheel: zipfile.ZipFile) -> None:
    names = wheel.namelist()
    assert "draftattn/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_command_is_declared(wheel: zipfile.ZipFile) -> None:
    entry_points = next(name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    assert "draftattn = draftattn.cli:main" in wheel.read(entry_points).decode()


def test_data_files_are_in_it(wheel: zipfile.ZipFile) -> None:
    pages = {f"draftattn/eval/web/{path.name}" for path in (ROOT / "eval" / "web").iterdir()}
    assert pages | {"draftattn/eval/metrics/weights/lpips-alexnet.safetensors"} <= set(wheel.namelist())

"""Imports run downward only, and light things stay light."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LAYERS = ("kernels", "pipelines", "eval", "cli")


def python_files() -> list[Path]:
    folders = [ROOT / "draftattn" / "cli", *(ROOT / layer for layer in LAYERS[:3])]
    return sorted([*(ROOT / "draftattn").glob("*.py"), *(path for folder in folders for path in folder.rglob("*.py"))])


def layer_of_file(path: Path) -> str:
    parts = path.relative_to(ROOT).parts
    if parts[0] != "draftattn":
        return parts[0]
    return "cli" if parts[1] in ("cli", "__main__.py") else "core"


def layer_of_module(module: str) -> str | None:
    """The layer of an imported module; None for modules that are not ours."""
    parts = module.split(".")
    if parts[0] != "draftattn":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in LAYERS else "core"


def imported_modules(path: Path) -> set[str]:
    """Every module that a file imports anywhere, lazily and for type checking included."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            found.add(node.module or "")
            if node.module == "draftattn":  # `from draftattn import kernels` names a layer
                found.update(f"draftattn.{alias.name}" for alias in node.names if alias.name in LAYERS)
    return found


ALLOWED = {
    "kernels": {"kernels"},
    "core": {"core", "kernels"},
    "pipelines": {"pipelines", "core", "kernels"},
    "eval": {"eval", "pipelines", "core", "kernels"},
    "cli": {"cli", "eval", "pipelines", "core", "kernels"},
}


@pytest.mark.parametrize("path", python_files(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_file_imports_only_its_own_layer_and_those_below(path: Path) -> None:
    allowed = set(ALLOWED[layer_of_file(path)])
    if path == ROOT / "draftattn" / "__init__.py":
        allowed.add("pipelines")  # its lazy __getattr__
    modules = imported_modules(path)
    assert {layer_of_module(module) for module in modules} - {None} <= allowed
    # under its bare name a folder would be loaded a second time
    assert not {module.split(".")[0] for module in modules} & {"kernels", "pipelines"}


def test_all_layers_are_looked_at() -> None:
    assert {layer_of_file(path) for path in python_files()} >= {"kernels", "core", "pipelines"}


def modules_after(statement: str) -> set[str]:
    program = f"import sys; {statement}; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(result.stdout.split())


def test_importing_the_package_loads_neither_diffusers_transformers_nor_triton() -> None:
    modules = modules_after("import draftattn, draftattn.presets, draftattn.policy")
    assert "draftattn.layout" in modules
    assert not {"diffusers", "transformers", "accelerate", "triton", "typer", "torchmetrics"} & modules


def test_public_names_that_need_diffusers_load_it_on_first_use() -> None:
    assert "diffusers" in modules_after("import draftattn; draftattn.enable")


def test_every_public_name_exists() -> None:
    import draftattn

    assert sorted(draftattn.__all__) == draftattn.__all__
    assert all(hasattr(draftattn, name) for name in draftattn.__all__)
    with pytest.raises(AttributeError, match="no_such_name"):
        draftattn.no_such_name  # noqa: B018


@pytest.mark.parametrize("folder", ["kernels", "pipelines", "eval", "tests/kernels"])
def test_top_level_folders_are_no_packages_of_their_own(folder: str) -> None:
    assert (ROOT / folder).is_dir()
    assert not (ROOT / folder / "__init__.py").exists()


@pytest.mark.parametrize("folder", ["kernels", "pipelines", "eval"])
def test_the_package_reaches_its_folders(folder: str) -> None:
    assert (ROOT / "draftattn" / folder).samefile(ROOT / folder)


@pytest.mark.parametrize("name", ["kernels", "pipelines"])
def test_a_bare_name_is_not_ours(name: str) -> None:
    spec = importlib.util.find_spec(name)
    if spec is not None and spec.origin is not None:
        assert not Path(spec.origin).resolve().is_relative_to(ROOT / name)

"""Every notebook runs from top to bottom, is stored with what it shows, and uses nothing that is not public."""

import ast
from pathlib import Path

import pytest

for module in ("skimage", "matplotlib", "ipykernel"):
    pytest.importorskip(module, reason="needs the extras 'demo' and 'test'")
nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
STORED = 500_000
"""Bytes of a notebook that are still pleasant to clone and to open."""


def read(path: Path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def code(path: Path) -> str:
    if path.suffix == ".py":
        return path.read_text()
    return "\n".join(cell.source for cell in read(path).cells if cell.cell_type == "code")


@pytest.mark.parametrize(
    "path",
    # those that train take a minute each
    [pytest.param(p, marks=[] if p.stem == "01_refocusing" else [pytest.mark.slow], id=p.stem) for p in NOTEBOOKS],
)
def test_notebook_runs(path: Path) -> None:
    where = {"metadata": {"path": str(path.parent)}}
    nbclient.NotebookClient(read(path), timeout=1200, kernel_name="python3", resources=where).execute()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_stored_with_its_outputs(path: Path) -> None:
    outputs = [output for cell in read(path).cells for output in cell.get("outputs", [])]
    assert any({"image/png", "image/jpeg"} & set(output.get("data", {})) for output in outputs)
    # nothing of one machine or one run: no errors, warnings, paths
    assert all(output.get("name") != "stderr" and output.output_type != "error" for output in outputs)
    assert not any("/home/" in str(output) or "/tmp/" in str(output) for output in outputs)
    assert path.stat().st_size < STORED


@pytest.mark.parametrize("path", [*NOTEBOOKS, FOLDER / "tiny.py"], ids=lambda path: path.stem)
def test_notebook_uses_public_names(path: Path) -> None:
    tree = ast.parse(code(path))
    names = [name for node in ast.walk(tree) for name in getattr(node, "names", []) if isinstance(name, ast.alias)]
    modules = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    attributes = [node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    assert "fvar_lightning" in modules
    for name in (*(alias.name for alias in names), *modules, *attributes):
        assert not any(part.startswith("_") for part in name.split(".")), name


def test_there_are_notebooks() -> None:
    assert [path.stem[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04"]

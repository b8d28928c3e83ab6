"""The architecture: which room imports which, what comes along with a name, and that every public name is there."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fvar_lightning
import fvar_lightning.metrics

PACKAGE = Path(fvar_lightning.__file__).parent
ROOMS = ("atomic", "checks", "activations", "precision", "schedule", "optics", "data", "tokenizer", "transformer",
         "generation", "weights", "metrics", "tasks", "callbacks", "commands", "cli", "planning", "report",
         "quickstart", "__main__")  # fmt: skip
"""Every room imports itself and those before it."""
LIGHTNING = {"data/modules.py", "data/token_module.py", "data/loaders.py", "tasks", "callbacks", "commands", "cli.py",
             "planning", "quickstart.py"}  # fmt: skip


def modules() -> list[Path]:
    return [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


def imports(path: Path) -> list[str]:
    """Names of all modules a file imports, in functions too."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            found.append(node.module or "")
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_go_one_way(path: Path) -> None:
    own = path.relative_to(PACKAGE).with_suffix("").parts[0]
    for name in imports(path):
        if name == "fvar_lightning" or name.startswith("fvar_lightning."):
            other = name.split(".")[1] if "." in name else "__init__"
            assert ROOMS.index(other) <= ROOMS.index(own), f"{own} imports {name}"


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_lightning_is_imported_where_things_run(path: Path) -> None:
    place = path.relative_to(PACKAGE)
    if not {place.as_posix(), place.parts[0]} & LIGHTNING:
        assert not [name for name in imports(path) if name.split(".")[0] in ("lightning", "pytorch_lightning")]


def test_the_command_line_knows_nothing_of_the_quickstart() -> None:
    assert not [name for name in imports(PACKAGE / "cli.py") if "quickstart" in name]


@pytest.mark.parametrize(
    ("names", "absent"),
    [
        ("Refocus, disk_psf, FocusSchedule", "lightning torchmetrics torch_fidelity torchvision matplotlib PIL"),
        ("VAR, VQVAE, generate, edit", "lightning torchmetrics torch_fidelity torchvision matplotlib PIL"),
        ("load_var_checkpoint, load_tokenizer, from_pretrained", "lightning torchmetrics torch_fidelity matplotlib"),
    ],
)
def test_a_name_costs_what_it_needs(names: str, absent: str) -> None:
    code = f"import sys; from fvar_lightning import {names}; print(*sorted(set(sys.modules) & set({absent.split()})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("package", [fvar_lightning, fvar_lightning.metrics], ids=lambda package: package.__name__)
def test_every_public_name_is_there(package: object) -> None:
    names = package.__all__
    assert len(names) > 20
    for name in names:
        assert getattr(package, name).__name__ == name
    with pytest.raises(AttributeError, match="nothing_of_this_name"):
        _ = package.nothing_of_this_name

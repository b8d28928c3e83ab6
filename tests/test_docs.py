"""The documents: their commands parse, their Python runs, what they name is there."""

import functools
import math
import re
import runpy
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning import Trainer

import fvar_lightning.commands.demo.command
import fvar_lightning.commands.edit
import fvar_lightning.commands.generate
import fvar_lightning.quickstart
import fvar_lightning.weights.export
import small_configs
from fvar_lightning import cli
from fvar_lightning.__main__ import COMMANDS, run
from fvar_lightning.data.batches import ImageBatch
from fvar_lightning.generation.sampling import generate
from fvar_lightning.planning.command import Planner
from fvar_lightning.schedule import FocusSchedule
from fvar_lightning.tasks.fvar import FVARTask
from fvar_lightning.tasks.training import parameter_groups
from fvar_lightning.tokenizer.vqvae import VQVAE
from fvar_lightning.transformer.var import VAR
from fvar_lightning.weights.pretrained import save_pretrained

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
OF_THEIR_OWN = ("data.md", "imagenet.md")
"""Documents whose code other tests run (test_datamodule, test_imagenet)."""
SMALL = FocusSchedule((1, 2, 4), patch_size=4, focus_states=3)


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), flags=re.DOTALL | re.MULTILINE)


def commands(path: Path) -> Iterator[list[str]]:
    """Every `fvar` command of the shell blocks, as words behind the `fvar`."""
    for block in blocks(path, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            if found := re.match(r"(?:srun |.*&& )?fvar (.*)", line):
                yield shlex.split(found[1], comments=True)


def programs(names: tuple[str, ...]) -> dict[str, list[str]]:
    """Of the documents, the Python that is run here."""
    found = {path.name: blocks(path, "python") for path in DOCUMENTS if path.name not in names}
    return {name: code for name, code in found.items() if code}


@pytest.fixture(scope="module")
def parser() -> ArgumentParser:
    """That of LightningCLI, made once."""

    class Made(Exception):
        pass

    def stop(self: cli.FVARCommandLine, parser: ArgumentParser, args: Any) -> None:
        raise Made(parser)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli.FVARCommandLine, "parse_arguments", stop)
        with pytest.raises(Made) as made:
            cli.main(["fit"])
    return made.value.args[0]


@pytest.fixture
def parsed_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """`generate`, `edit`, `export` and `quickstart` take their arguments and do nothing."""

    def idle(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def nothing(*args: Any, **options: Any) -> None: ...

        return nothing

    for module, name in (
        (fvar_lightning.commands.demo.command, "demo"),
        (fvar_lightning.commands.generate, "generate_images"),
        (fvar_lightning.commands.edit, "edit_image"),
        (fvar_lightning.weights.export, "export"),
        (fvar_lightning.quickstart, "quickstart"),
    ):
        monkeypatch.setattr(module, name, idle(getattr(module, name)))


@pytest.mark.usefixtures("parsed_only")
def test_commands_parse(parser: ArgumentParser, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    planner = Planner()
    wrong, kinds = [], set()
    seen = {tuple(words): path for path in DOCUMENTS if path.name != "imagenet.md" for words in commands(path)}
    for words, path in seen.items():
        kinds.add(words[0])
        try:
            if words[0] == "plan":
                planner.parser.parse_args(list(words[1:]))
            elif words[0] in COMMANDS:
                run(list(words))
            else:
                parser.parse_args(list(words))
        except (SystemExit, ValueError) as error:
            wrong.append(f"{path.name}: fvar {shlex.join(words)}: {error}")
    assert not wrong, "\n".join(wrong)
    assert kinds >= {"fit", "validate", "test", "predict", "generate", "edit", "export", "plan", "quickstart", "demo"}


def test_a_wrong_command_does_not_parse(parser: ArgumentParser, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit):
        parser.parse_args(["fit", "-c", "configs/fvar_d12_256.yaml", "--model.dept", "3"])


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The working directory holds a small model in `model`, and two tokenizers."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    vae = VQVAE(SMALL, vocab_size=16, z_channels=4, ch=4, ch_mult=(1, 1, 1), num_res_blocks=1, norm_groups=4)
    vae.codebook.step()
    var = VAR(SMALL.patch_nums, vocab_size=16, z_channels=4, num_classes=2, depth=2, width=16, heads=1)
    torch.nn.init.normal_(var.head.weight)
    save_pretrained("model", var, vae)
    small_configs.write_tokenizers(tmp_path, SMALL, "disk")


@pytest.mark.usefixtures("model")
@pytest.mark.parametrize("name", programs((*OF_THEIR_OWN, "README.md")))
def test_python_runs(name: str) -> None:
    names: dict[str, Any] = {}
    for code in programs(OF_THEIR_OWN)[name]:
        exec(code, names)
    if name == "sampling.md":
        images, mask = names["images"], names["mask"]
        assert torch.equal(names["inpainted"][..., ~mask], images[..., ~mask])
        assert not torch.equal(names["soft"], images)
        assert torch.equal(names["stages"][-1], images)
        assert not torch.equal(names["cheaper"], images)
    if name == "extending.md":
        check_extensions(names)


def check_extensions(names: dict[str, Any]) -> None:
    """The examples do what is said of them."""
    ring = names["ring_psf"](7.3)
    assert float(ring.sum()) == pytest.approx(1)
    assert float(ring[len(ring) // 2, len(ring) // 2]) == pytest.approx(0, abs=1e-7)
    assert float(names["ring_psf"](0.0)) == 1

    task = names["task"]
    labels, inputs = torch.tensor([0, 1]), torch.randn(2, task.student.layout.length - 1, 4)
    task.student(labels, inputs).sum().backward()
    assert all(block.ffn.gate.weight.grad is not None for block in task.student.blocks)
    assert len(parameter_groups([task.teacher])) > 0
    assert type(task.teacher.blocks[0].block.ffn).__name__ == "GatedFFN"
    again = generate(task.student, task.vae, labels, seeds=[0, 1], **task.sampling)
    assert torch.equal(names["images"], again)

    features = names["Thumbnails"]()(torch.full((2, 3, 16, 16), 7, dtype=torch.uint8)).features
    assert torch.equal(features, torch.full((2, 192), 7.0))

    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    contrast = names["Contrast"](num_samples=3, batch_size=2)
    contrast.generate(trainer, task)
    images = task.generate(torch.tensor([0, 0, 1]), seeds=[0, 1, 2])
    expected = images.flatten(1).std(1).mean().item()
    assert contrast.figures(trainer, task)["contrast"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.usefixtures("model")
def test_losses_of_the_first_step() -> None:
    """As training.md and faq.md have them: ln(codes) of both networks, nothing to distil."""
    task = FVARTask("structure.ckpt", "alias.ckpt", num_classes=2, depth=2, width=64)
    images = torch.rand(4, 3, 16, 16) * 2 - 1
    refocus = task.vae.refocus
    batch = ImageBatch(images, torch.tensor([0, 1, 0, 1]), refocus(images), refocus.blur(images))
    with torch.no_grad():
        terms = task.losses(task.tokens(batch), torch.Generator().manual_seed(0))
    for name in ("student", "teacher"):
        assert float(terms[name]) == pytest.approx(math.log(task.vae.vocab_size), abs=0.05)
    for name in ("feature", "logit"):
        assert float(terms[name]) == pytest.approx(0, abs=1e-6)
    text = (ROOT / "docs" / "faq.md").read_text()
    rows = re.findall(r"^\| (\d+) \([^|]*\| ([\d.]+) \| ([\d.]+) % \|$", text, flags=re.MULTILINE)
    assert len(rows) == 4
    for codes, loss, accuracy in rows:
        assert float(loss) == pytest.approx(math.log(int(codes)), abs=0.005)
        assert float(accuracy) == pytest.approx(100 / int(codes), rel=0.03)


def test_examples_of_extending_are_short() -> None:
    path = ROOT / "docs" / "extending.md"
    for code in [*blocks(path, "python"), *blocks(path, "diff")]:
        assert len([line for line in code.splitlines() if line.strip()]) < 30


def test_the_documented_target() -> None:
    """The diff applies, and what it makes is half of each of the two features."""
    (diff,) = blocks(ROOT / "docs" / "extending.md", "diff")
    source = Path(fvar_lightning.tokenizer.vqvae.__file__).read_text()
    for hunk in diff.split("@@\n"):
        lines = hunk.splitlines(keepends=True)
        old, new = ("".join(line[1:] for line in lines if line[0] in kept) for kept in (" -", " +"))
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    patched = ModuleType("patched")
    exec(source, patched.__dict__)
    sizes = {"vocab_size": 16, "z_channels": 4, "ch": 4, "ch_mult": (1, 1, 1), "num_res_blocks": 1, "norm_groups": 4}
    networks = {name: patched.VQVAE(SMALL, targets=name, **sizes) for name in ("view", "feature", "blend")}
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    found = {}
    for name, network in networks.items():
        network.load_state_dict(networks["view"].state_dict())
        found[name] = network.features(network.inputs(images))
    for view, feature, blend in zip(*found.values(), strict=True):
        torch.testing.assert_close(blend, (view + feature) / 2)
    assert networks["blend"](networks["blend"].inputs(images)).stages[-1].shape == (2, 4, 4, 4)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_what_is_named_is_there(path: Path) -> None:
    """Files of the repository, configurations, linked pages, and functions of tests."""
    text = path.read_text()
    named = re.findall(r"\b((?:configs|studies|tests|notebooks|docs)/[\w./*-]*\w)", text)
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in link]
    missing = [name for name in named if "..." not in name and not list(ROOT.glob(name))]
    missing += [link for link in links if not (path.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_within_documents(path: Path) -> None:
    for target, anchor in re.findall(r"\]\(([\w/.-]*\.md)?#([^)]+)\)", path.read_text()):
        page = path.parent / target if target else path
        headings = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)
        slugs = {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}
        assert anchor in slugs


def test_the_layout_names_every_room() -> None:
    """In the README: each folder and file of the package."""
    table = (ROOT / "README.md").read_text().split("## How it is laid out")[1].split("\n## ")[0]
    named = re.findall(
        r"`(\w+)(?:\.py|/)`", "\n".join(line.split("|")[1] for line in table.splitlines() if "`" in line[:4])
    )
    package = ROOT / "src" / "fvar_lightning"
    rooms = {path.stem for path in package.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert sorted(named) == sorted(rooms - {"__init__", "__pycache__"})


@pytest.mark.slow
def test_the_table_of_all_configurations(capsys: pytest.CaptureFixture[str]) -> None:
    """scaling.md holds what its command prints, the others and the configurations' heads say the same."""
    runpy.run_path(str(ROOT / "studies" / "plan_table.py"))["main"]([])
    table = capsys.readouterr().out
    assert table in (ROOT / "docs" / "scaling.md").read_text()
    for name, *_, memory, _, _ in ([cell.strip() for cell in row.split("|")[1:-1]] for row in table.splitlines()[2:]):
        assert f"{memory} a GPU" in (ROOT / "configs" / f"{name}.yaml").read_text(), name
        for page in (ROOT / "README.md", ROOT / "docs" / "imagenet.md"):
            for row in re.findall(rf"^\| `{name}` .*$", page.read_text(), flags=re.MULTILINE):
                assert f"| {memory} |" in row, page.name

"""`fvar export` as a user meets it: what it writes from a checkpoint of `fvar fit`, and what it refuses."""

from pathlib import Path

import pytest
import torch

from evaluation_worker import LAYOUT, write_tokenizers
from fvar_lightning.__main__ import run
from fvar_lightning.cli import main
from fvar_lightning.generation.sampling import generate
from fvar_lightning.tasks.fvar import FVARTask
from fvar_lightning.weights.models import from_pretrained
from fvar_lightning.weights.official import load_var_checkpoint
from fvar_lightning.weights.pretrained import Pretrained

CONF = Path(__file__).parent / "conf" / "fvar.yaml"
LABELS, SEEDS = torch.tensor([1, 0]), [4, 9]


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory, image_folder: Path) -> FVARTask:
    """A student after four steps, with averaged weights at the end; its checkpoint lies beside its tokenizers."""
    root = tmp_path_factory.mktemp("trained")
    structure, alias = write_tokenizers(root)
    cli = main([
        "fit", f"--config={CONF}", f"--data.source={image_folder}",
        f"--data.schedule.max_radius={LAYOUT['max_radius']}",
        f"--model.structure_tokenizer={structure}", f"--model.alias_tokenizer={alias}", "--model.guidance=2.0",
        "--trainer.callbacks=EMAWeightAveraging", "--trainer.callbacks.decay=0.5",
        "--trainer.callbacks.use_buffers=false", "--trainer.callbacks+=ModelCheckpoint",
        f"--trainer.callbacks.dirpath={root}", "--trainer.callbacks.save_last=true",
        "--trainer.callbacks.every_n_train_steps=4", f"--trainer.default_root_dir={root}",
        f"--trainer.logger.save_dir={root}",
    ])  # fmt: skip
    assert cli is not None
    return cli.model


@pytest.fixture(scope="module")
def folder(task: FVARTask) -> Path:
    return Path(task.trainer.default_root_dir)


def export(folder: Path, output: Path, *args: str, ckpt: str = "last.ckpt") -> None:
    run(["export", "--ckpt_path", str(folder / ckpt), "--output", str(output), *args])


def test_a_folder_is_all_a_user_needs(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(["export", "-c", str(CONF), "--ckpt_path", str(folder / "last.ckpt"), "--output", str(tmp_path / "model")])
    written = capsys.readouterr().out
    assert f"wrote {tmp_path / 'model' / 'model.safetensors'} and " in written
    assert "(averaged weights)" in written
    var, vae, info = from_pretrained(tmp_path / "model")
    assert info.class_names == ["blue", "red"]
    assert info.sampling == {"guidance": 2.0, "top_k": 900, "top_p": 0.96}
    loaded = FVARTask.load_from_checkpoint(folder / "last.ckpt", weights_only=True).eval()
    assert torch.equal(generate(var, vae, LABELS, seeds=SEEDS, **info.sampling), loaded.generate(LABELS, seeds=SEEDS))


def test_all_formats_hold_the_same_weights(folder: Path, tmp_path: Path) -> None:
    export(folder, tmp_path / "model")
    export(folder, tmp_path / "one.safetensors", "--format", "safetensors")
    with pytest.warns(UserWarning, match="ch_mult"):
        export(folder, tmp_path / "official", "--format", "var")
    vae, var = load_var_checkpoint(tmp_path / "official" / "vae_ch8v8z4.pth", tmp_path / "official" / "var_d3.pth")
    models = [from_pretrained(tmp_path / "model"), from_pretrained(tmp_path / "one.safetensors")]
    first, *others = (generate(m[0], m[1], LABELS, seeds=SEEDS) for m in (*models, (var, vae)))
    for other in others:
        assert torch.equal(first, other)


def test_raw_and_averaged_weights(
    task: FVARTask, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export(folder, tmp_path / "raw", "--weights", "raw")
    assert "(last step's weights)" in capsys.readouterr().out
    export(folder, tmp_path / "ema", "--weights", "ema")
    state = torch.load(folder / "last.ckpt", weights_only=True)["current_model_state"]
    raw, averaged = (from_pretrained(tmp_path / name).var.state_dict() for name in ("raw", "ema"))
    for name, tensor in task.student.state_dict().items():
        assert torch.equal(averaged[name], tensor)
        assert torch.equal(raw[name], state[f"student.{name}"])
    assert not torch.equal(raw["head.weight"], averaged["head.weight"])


def test_files_are_replaced_only_where_that_is_asked_for(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export(folder, tmp_path, "--weights", "raw")
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(SystemExit, match="2"):
        export(folder, tmp_path)
    assert f"output exists: {tmp_path / 'model.safetensors'}" in capsys.readouterr().err
    assert (tmp_path / "model.safetensors").read_bytes() == before
    export(folder, tmp_path, "--overwrite", "true")
    assert (tmp_path / "model.safetensors").read_bytes() != before


CONFIGS = {
    "missing.yaml": None,
    "wider.yaml": "{model: {class_path: FVARTask, init_args: {depth: 3, width: 64}}}",
    "fragment.yaml": "model: model.yaml",
    "model.yaml": "{class_path: fvar_lightning.tasks.fvar.FVARTask, init_args: {depth: 4}}",
    "tokenizer.yaml": "{model: {class_path: TokenizerTask, init_args: {ch: 8}}}",
    "broken.yaml": "{",
    "list.yaml": "[1]",
    "trainer.yaml": "trainer: {max_steps: 3}",
}


@pytest.mark.parametrize(
    ("message", "args"),
    [
        ("'{folder}/none.ckpt' does not exist", {"ckpt_path": "{folder}/none.ckpt"}),
        ("is not of a FVARTask, but of a TokenizerTask", {"ckpt_path": "{folder}/structure.ckpt"}),
        ("must be a file that ends in .safetensors in this format, got '{out}'", {"format": "safetensors"}),
        ("must be a folder in format 'var', got the name of a file", {"format": "var", "output": "{out}.pth"}),
        ("must be a folder in format 'pretrained'", {"output": "{out}.safetensors"}),
        ("format", {"format": "onnx"}),
        ("weights", {"weights": "mean"}),
        ("unrecognized arguments: --checkpoint=x", {"checkpoint": "x"}),
        ("config '{configs}/missing.yaml' does not exist", {"config": "{configs}/missing.yaml"}),
        ("not of the given configuration: width is 32, not 64", {"config": "{configs}/wider.yaml"}),
        ("not of the given configuration: depth is 3, not 4", {"config": "{configs}/fragment.yaml"}),
        ("must be of a FVARTask, got one of TokenizerTask", {"config": "{configs}/tokenizer.yaml"}),
        ("cannot be read as YAML", {"config": "{configs}/broken.yaml"}),
        ("holds no configuration", {"config": "{configs}/list.yaml"}),
    ],
)  # fmt: skip
def test_misuse_is_named(
    message: str, args: dict[str, str], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in CONFIGS.items():
        if text is not None:
            (tmp_path / name).write_text(text)
    places = {"folder": str(folder), "configs": str(tmp_path), "out": str(tmp_path / "out")}
    given = {"ckpt_path": "{folder}/last.ckpt", "output": "{out}"} | args
    with pytest.raises(SystemExit, match="2"):
        run(["export", *(f"--{name}={value.format(**places)}" for name, value in given.items())])
    assert message.format(**places) in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))


def test_later_configurations_count(folder: Path, tmp_path: Path) -> None:
    for name, text in CONFIGS.items():
        (tmp_path / name).write_text(text or "")
    files = [CONF, tmp_path / "fragment.yaml", tmp_path / "trainer.yaml", CONF]
    export(folder, tmp_path / "out", *(f"--config={file}" for file in files))
    assert isinstance(from_pretrained(tmp_path / "out"), Pretrained)

"""The command line: which of the places that name an option counts."""

import logging
import shutil
from pathlib import Path

import pytest
import torch

from evaluation_worker import LAYOUT, make_task, make_trainer, write_tokenizers
from fvar_lightning.cli import FVARCommandLine, main, options
from fvar_lightning.tasks.fvar import FVARTask

CONF = Path(__file__).parent / "conf"


def run(command: str, source: Path, root: Path, *args: str) -> FVARCommandLine:
    cli = main([
        command, f"--config={CONF / 'fvar.yaml'}", f"--data.source={source}", "--trainer.max_steps=1",
        f"--data.schedule.max_radius={LAYOUT['max_radius']}", "--data.samples_per_class=1",
        f"--trainer.default_root_dir={root}", f"--trainer.logger.save_dir={root}", *args,
    ])  # fmt: skip
    assert cli is not None
    return cli


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, image_folder: Path) -> Path:
    """A folder with tokenizers and a checkpoint whose model was made by options of the command line."""
    root = tmp_path_factory.mktemp("trained")
    write_tokenizers(root)
    cli = run("fit", image_folder, root, *tokenizers(root), "--model.guidance=2.0", "--model.depth=2")
    cli.trainer.save_checkpoint(root / "last.ckpt", weights_only=False)
    return root


def tokenizers(root: Path) -> list[str]:
    return [f"--model.{kind}_tokenizer={root / kind}.ckpt" for kind in ("structure", "alias")]


def replaced(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "of the command line" in record.getMessage()]


def test_options_are_found_with_their_values() -> None:
    args = ["fit", "-c", "x.yaml", "--model.depth", "3", "--models=1", "--model=FVARTask", "--data.model=--model.x",
            "--model.noise", "[1,2]", "--ckpt_path=--model.y=1", "--model", "m.yaml"]  # fmt: skip
    assert options(args, "model") == [
        "--model.depth", "3", "--model=FVARTask", "--model.noise", "[1,2]", "--model", "m.yaml"
    ]  # fmt: skip


@pytest.mark.parametrize("given", [["--model.guidance=3.0"], ["--model.guidance", "3.0"]])
def test_command_line_counts_more_than_the_checkpoint_and_this_more_than_files(
    given: list[str], trained: Path, image_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    (tmp_path / "more.yaml").write_text("model: {init_args: {guidance: 4.0, top_k: 7}}")
    cli = run("predict", image_folder, tmp_path, *given, f"--config={tmp_path / 'more.yaml'}",
              f"--ckpt_path={trained / 'last.ckpt'}")  # fmt: skip
    assert cli.model.sampling == {"guidance": 3.0, "top_k": 900, "top_p": 0.96}
    assert cli.model.student.depth == 2, "not the 3 of the configuration file"
    assert replaced(caplog) == ["model.init_args.guidance: 3.0 of the command line replaces the checkpoint's 2.0"]


def test_equal_options_are_no_conflict(
    trained: Path, image_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    cli = run("fit", image_folder, tmp_path, "--model.guidance=2", "--model.depth=2",
              f"--ckpt_path={trained / 'last.ckpt'}", "--trainer.max_steps=2")  # fmt: skip
    assert cli.trainer.global_step == 2
    assert not replaced(caplog)


def test_moved_tokenizers_are_found_where_the_command_line_says(
    trained: Path, image_folder: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(trained, moved)
    for kind in ("structure", "alias"):
        (moved / f"{kind}.ckpt").rename(moved / f"{kind}_new.ckpt")
    where = [f"--model.{kind}_tokenizer={moved / kind}_new.ckpt" for kind in ("structure", "alias")]
    cli = run("predict", image_folder, tmp_path, *where, f"--ckpt_path={moved / 'last.ckpt'}")
    assert cli.model.alias_tokenizer is not None


@pytest.mark.parametrize("command", ["predict", "validate", "test", "fit"])
def test_a_checkpoint_needs_no_tokenizer_files(command: str, trained: Path, image_folder: Path, tmp_path: Path) -> None:
    """Nor the weights it began with; the configuration names files that do not exist."""
    alone = tmp_path / "last.ckpt"
    shutil.copy(trained / "last.ckpt", alone)
    (tmp_path / "files.yaml").write_text(
        "model: {init_args: {structure_tokenizer: no.ckpt, alias_tokenizer: no.ckpt, initial_weights: no.pth}}"
    )
    cli = run(command, image_folder, tmp_path, f"--config={tmp_path / 'files.yaml'}", f"--ckpt_path={alone}",
              "--trainer.max_steps=2")  # fmt: skip
    stored = torch.load(alone, weights_only=True)["state_dict"]
    frozen = {name: value for name, value in cli.model.state_dict().items() if not name.startswith(("stu", "tea"))}
    assert {name.split(".")[0] for name in frozen} == {"vae", "alias_tokenizer"}
    for name, value in frozen.items():
        assert torch.equal(value, stored[name]), name


def test_a_description_alone_is_not_trained_with(trained: Path, image_folder: Path) -> None:
    arguments = torch.load(trained / "last.ckpt", weights_only=True)["hyper_parameters"]
    task = FVARTask(**{name: x for name, x in arguments.items() if not name.startswith("_")})
    with pytest.raises(ValueError, match="structure_tokenizer is a description without weights"):
        task.token_meta()
    loaded = FVARTask.load_from_checkpoint(trained / "last.ckpt", weights_only=True)
    loaded.token_meta()


def test_checkpoints_of_a_trainer_in_python_are_taken(trained: Path, image_folder: Path, tmp_path: Path) -> None:
    task = make_task([str(trained / f"{kind}.ckpt") for kind in ("structure", "alias")])
    trainer = make_trainer(tmp_path, [], logger=False)
    task.trainer = trainer
    trainer.strategy.connect(task)
    trainer.save_checkpoint(tmp_path / "python.ckpt")
    cli = run("predict", image_folder, tmp_path, *tokenizers(trained), f"--ckpt_path={tmp_path / 'python.ckpt'}")
    assert cli.model.student.depth == 2, "not the 3 of the configuration file"
    assert torch.equal(cli.model.student.head.weight, task.student.head.weight)


@pytest.mark.parametrize("command", ["predict", "fit"])
def test_what_is_no_checkpoint_is_named(
    command: str, trained: Path, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken.ckpt").write_bytes((trained / "last.ckpt").read_bytes()[:1000])
    with pytest.raises(SystemExit):
        run(command, image_folder, tmp_path, *tokenizers(trained), f"--ckpt_path={tmp_path / 'broken.ckpt'}")
    assert f"checkpoint '{tmp_path / 'broken.ckpt'}' cannot be read as weights" in capsys.readouterr().err


def test_a_checkpoint_that_is_not_there_is_named_before_what_it_would_hold(
    image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tokenizers of the configuration are not there either."""
    with pytest.raises(SystemExit, match="2"):
        run("validate", image_folder, tmp_path, *tokenizers(tmp_path), "--ckpt_path=runs/last.ckpt")
    assert "error: ckpt_path 'runs/last.ckpt' does not exist" in capsys.readouterr().err


def test_another_network_than_the_checkpoints_is_not_loaded(trained: Path, image_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the checkpoint is of another student: depth is 2, not 3"):
        run("predict", image_folder, tmp_path, *tokenizers(trained), "--model.depth=3",
            f"--ckpt_path={trained / 'last.ckpt'}")  # fmt: skip


def test_a_checkpoint_of_another_task_is_refused(
    trained: Path, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["fit", f"--config={CONF / 'alias.yaml'}", f"--data.source={image_folder}", "--trainer.logger=false"]
    with pytest.raises(SystemExit, match="2"):
        main([*args, f"--trainer.default_root_dir={tmp_path}", f"--ckpt_path={trained / 'last.ckpt'}"])
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.endswith("is of fvar_lightning.FVARTask, model is fvar_lightning.AliasTokenizerTask")


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_random_weights_are_not_judged(
    command: str, trained: Path, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(command, image_folder, tmp_path, *tokenizers(trained))
    assert f"ckpt_path must be given for {command}, got none" in capsys.readouterr().err.splitlines()[-1]
    initial = f"--model.initial_weights={trained / 'last.ckpt'}"
    run(command, image_folder, tmp_path, *tokenizers(trained), initial, "--model.depth=2")


def test_figures_of_a_test_are_under_its_name(trained: Path, image_folder: Path, tmp_path: Path) -> None:
    cli = run("test", image_folder, tmp_path, f"--ckpt_path={trained / 'last.ckpt'}")
    assert cli.trainer.callback_metrics["test/student"] > 0
    assert not [name for name in cli.trainer.callback_metrics if name.startswith("val/")]


def test_a_folder_of_shards_needs_processes_that_shard(
    trained: Path, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Elsewhere the command line names the way to one file; there it takes the hyper-parameters out of the folder."""
    shards = tmp_path / "last.ckpt"
    shards.mkdir()
    contents = torch.load(trained / "last.ckpt", weights_only=True)
    torch.save({"hyper_parameters": contents["hyper_parameters"]}, shards / "meta.pt")
    with pytest.raises(SystemExit):
        run("fit", image_folder, tmp_path, f"--ckpt_path={shards}")
    assert "consolidate_checkpoint" in capsys.readouterr().err
    sharding = ["--trainer.strategy=lightning.pytorch.strategies.ModelParallelStrategy", "--model.depth=0"]
    with pytest.raises(SystemExit):
        run("fit", image_folder, tmp_path, f"--ckpt_path={shards}", *sharding)
    assert "depth must be at least 1" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU where there is none")
def test_a_missing_gpu_is_an_error_of_one_line(
    trained: Path, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        run("fit", image_folder, tmp_path, *tokenizers(trained), "--trainer.accelerator=gpu", "--trainer.devices=1")
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("error: ")
    assert message.endswith("(trainer.accelerator gpu, devices 1)")

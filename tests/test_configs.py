"""Every configuration in the repository makes an optimiser step through the command line, at a small size."""

import contextlib
import functools
import io
import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning import Trainer
from torch import distributed

import small_configs
from fvar_lightning.cli import FVARCommandLine, main
from fvar_lightning.schedule import FocusSchedule
from fvar_lightning.tokenizer.vqvae import VQVAE
from fvar_lightning.transformer.var import VAR
from fvar_lightning.weights.official import export_var_checkpoint

FOLDER = small_configs.FOLDER
ALL = sorted(str(path.relative_to(FOLDER)) for path in FOLDER.rglob("*.yaml"))
WHOLE = [name for name in ALL if {"data", "model"} <= set(small_configs.read(name))]
STUDENTS = [name for name in WHOLE if name.startswith("fvar_d")]
QUICKSTART = ["quickstart/tokens.yaml", "quickstart/fvar.yaml"]
OFFICIAL = "finetune/official_var.yaml"
CACHED = ["tokens_256.yaml", "data/imagenet256_tokens.yaml"]
"""Run by test_imagenet.py, one after the other."""
PLAIN = [name for name in WHOLE if name not in (*QUICKSTART, OFFICIAL, *CACHED)]
BETWEEN = [f"fvar_d{depth}_256.yaml" for depth in (20, 24, 30)]
"""They differ from d12 and d16 in numbers alone."""
DATA = [name for name in ALL if name.startswith("data/") and name not in CACHED]
EVALUATION = [name for name in ALL if name.startswith("evaluation/")]
OVERRIDES = [name for name in ALL if name.startswith(("ablation/", "trainer/"))]
BASE = "fvar_d12_256.yaml"
OF_TOKENIZERS = ["ablation/sharp_commitment.yaml"]


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a strategy leaves behind: a process group, and where its processes meet."""
    for name in ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "NODE_RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    yield
    if distributed.is_initialized():
        distributed.destroy_process_group()


def arguments(names: list[str], source: Path | str, root: Path) -> list[str]:
    """The configurations with small sizes, and small tokenizers where they name some."""
    schedule = small_configs.small_schedule(small_configs.schedule_of(names))
    model = small_configs.read(names[0])["model"]
    args = [f"--config={FOLDER / name}" for name in names]
    args += small_configs.data_options(schedule, source) + small_configs.trainer_options(names[0], root)
    args += small_configs.model_options(model["class_path"], schedule)
    if model["class_path"] == "FVARTask":
        options: dict[str, Any] = {}
        for name in names:
            options |= small_configs.read(name).get("model", {}).get("init_args", {})
        paths = small_configs.write_tokenizers(root, schedule, small_configs.psf_of(names))
        for kind, path in paths.items():
            # an ablation without an alias tokenizer must stay without
            if options[f"{kind}_tokenizer"] is not None:
                args.append(f"--model.{kind}_tokenizer={path}")
    return args


def step(names: list[str], source: Path | str, root: Path, *more: str) -> FVARCommandLine:
    cli = main(["fit", *arguments(names, source, root), *more])
    stepped(cli)
    return cli


def stepped(cli: FVARCommandLine) -> None:
    assert cli.trainer.global_step == 1
    assert cli.trainer.callback_metrics["train/loss"].isfinite()
    (optimizer,) = cli.trainer.optimizers
    assert any(state["exp_avg"].any() for state in optimizer.state.values())


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in BETWEEN else n for n in PLAIN])
def test_whole_configuration(name: str, image_folder: Path, tmp_path: Path) -> None:
    step([name], image_folder, tmp_path)


def base_of(override: str) -> str:
    return "tokenizer/structure_tiny.yaml" if override in OF_TOKENIZERS else BASE


@pytest.mark.parametrize("name", OVERRIDES)
def test_override(name: str, image_folder: Path, tmp_path: Path) -> None:
    one = ["--trainer.strategy.init_args.data_parallel_size=1"] if name.startswith("trainer/fsdp2") else []
    alone = ["ablation/no_teacher.yaml"] if name == "ablation/no_refocusing.yaml" else []
    cli = step([base_of(name), name, *alone], image_folder, tmp_path, *one)
    options = small_configs.read(name).get("trainer", {})
    assert cli.trainer.precision == options.get("precision", "32-true")
    if strategy := options.get("strategy"):
        wanted = "DDPStrategy" if strategy == "ddp" else strategy["class_path"].split(".")[-1]
        assert type(cli.trainer.strategy).__name__ == wanted
        assert distributed.get_backend() == "gloo"


@pytest.mark.parametrize("name", [name for name in OVERRIDES if name.startswith("ablation/")])
def test_an_ablation_changes_all_that_it_names(name: str) -> None:
    """No value of it is the one that stands without it."""
    before, after = settings(base_of(name)), settings(base_of(name), name)
    for option in leaves(small_configs.read(name)):
        assert after[option] != before[option], option


@functools.cache
def settings(*names: str) -> dict[str, object]:
    """Every value of a run with these configurations."""
    with contextlib.redirect_stdout(io.StringIO()) as printed, pytest.raises(SystemExit, match="0"):
        main(["fit", *(f"--config={FOLDER / name}" for name in names), "--print_config"])
    return leaves(yaml.safe_load(printed.getvalue()))


def leaves(content: dict[str, Any], above: str = "") -> dict[str, object]:
    """Values by their dotted names."""
    found: dict[str, object] = {}
    for name, value in content.items():
        found |= leaves(value, f"{above}{name}.") if isinstance(value, dict) else {above + name: value}
    return found


def test_the_recipe_of_every_depth_is_that_of_the_page() -> None:
    page = (FOLDER.parent / "docs" / "paper.md").read_text()
    row = r"^\| ([\d, ]+)(?: at (\d+) px)? \| (\S+) \| (\S+) \| (.+) \| (\S+)(?: of its peak)? \| (\d+) \|$"
    rows = re.findall(row, page, re.MULTILINE)
    found = {}
    for depths, size, gain, rate, decay, final, batch in rows:
        for depth in depths.split(", "):
            decays = [float(number) for number in decay.removesuffix(" by half a cosine").split(" to ")]
            found[f"fvar_d{depth}_{size or 256}.yaml"] = [float(gain), float(rate), decays, float(final), int(batch)]
    assert sorted(found) == sorted(STUDENTS)
    for name, wanted in found.items():
        content = small_configs.read(name)
        options, data = content["model"]["init_args"], content["data"]["init_args"]
        adam = options["optimizer"]["init_args"]
        batch = 8 * data["batch_size"] * content["trainer"].get("accumulate_grad_batches", 1)
        decays = [adam["weight_decay"], *([options["weight_decay_final"]] if "weight_decay_final" in options else [])]
        rate = adam["lr"] * 256 / batch
        assert [options["initial_gain"], pytest.approx(rate), decays, options["lr_final"], batch] == wanted, name
        assert options["lr_hold"] == 0.05


def test_the_protocols_sample_as_official_var() -> None:
    """50 000 images with the strengths of its README's figures."""
    settings = small_configs.read("evaluation/protocol.yaml"), small_configs.read("evaluation/samples.yaml")
    judged, written = (content["trainer"]["callbacks+"][0]["init_args"] for content in settings)
    assert judged["sampling"] == written["sampling"] == {"guidance": 1.5, "top_k": 900, "top_p": 0.96}
    assert judged["num_samples"] == 1000 * settings[1]["data"]["init_args"]["samples_per_class"] == 50_000


def test_quickstart_writes_a_cache_and_trains_from_it(image_folder: Path, tmp_path: Path) -> None:
    """Its two configurations of stage 2, with the tokenizers of its stage 1."""
    caches = tmp_path / "tokens"
    written = arguments(QUICKSTART[:1], image_folder, tmp_path)
    for part in ("train", "val"):
        options = [f"--data.part={part}", "--data.crops_per_image=1", f"--trainer.callbacks.folder={caches / part}"]
        main(["predict", *written, "--data.predict=tokens", *options])
    given = [option for option in written if option.startswith(("--model.", "--trainer."))]
    given += [f"--data.path={caches / 'train'}", f"--data.val_path={caches / 'val'}", "--data.batch_size=2"]
    cli = main(["fit", f"--config={FOLDER / QUICKSTART[1]}", *given])
    stepped(cli)
    assert cli.model.class_names == ["blue", "red"]


def test_official_weights_are_fine_tuned(image_folder: Path, tmp_path: Path) -> None:
    """At 256 px: the patches of official VAR's tokenizer are what they are."""
    schedule = FocusSchedule(focus_states=1)
    vae = VQVAE(schedule, targets="feature", vocab_size=16, z_channels=4, ch=32, ch_mult=(1, 1, 1, 1, 1))
    var = VAR(schedule.patch_nums, vocab_size=16, z_channels=4, num_classes=5, depth=2)
    with pytest.warns(UserWarning, match="official VAR builds its tokenizer with"):
        export_var_checkpoint(vae, var, tmp_path / "vae.pth", tmp_path / "var.pth")
    options = small_configs.trainer_options(OFFICIAL, tmp_path)
    cli = main(["fit", f"--config={FOLDER / OFFICIAL}", *options, "--model.depth=2",
                f"--data.source={image_folder}", "--data.batch_size=1", f"--model.initial_weights={tmp_path}/var.pth",
                f"--model.structure_tokenizer={tmp_path}/vae.pth"])  # fmt: skip
    stepped(cli)
    assert cli.model.num_classes == 2


@pytest.mark.parametrize("name", DATA)
def test_data_fragment(name: str, image_folder: Path, tmp_path: Path) -> None:
    """As data of the smallest tokenizer."""
    options = small_configs.read(name)["init_args"]
    assert FocusSchedule(**options["schedule"]).image_size == options["image_size"]
    names = ["tokenizer/alias_tiny.yaml", name]
    args = [option for option in arguments(names, options["source"], tmp_path) if "data/" not in option]
    args.insert(1, f"--data={FOLDER / name}")
    if options["source"] not in ("photographs", "FashionMNIST"):
        args.append(f"--data.source={image_folder}")
    if "root" in options:
        write_fashion_mnist(tmp_path)
        args.append(f"--data.root={tmp_path}")
    stepped(main(["fit", *args]))


def write_fashion_mnist(root: Path, count: int = 4) -> None:
    raw = root / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        head = struct.pack(">IIII", 2051, count, 28, 28)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(head + os.urandom(count * 784))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, count) + bytes(range(count)))


@pytest.mark.parametrize("name", EVALUATION)
def test_evaluation_is_built(name: str, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What they do is run by test_imagenet.py."""
    monkeypatch.setattr(Trainer, "fit", functools.wraps(Trainer.fit)(lambda *args, **kwargs: None))
    cli = main(["fit", *arguments([BASE, name], image_folder, tmp_path)])
    added = small_configs.read(name)["trainer"]["callbacks+"]
    built = [type(callback).__name__ for callback in cli.trainer.callbacks]
    assert {callback["class_path"] for callback in added} <= set(built)


@pytest.mark.parametrize("name", STUDENTS)
def test_sizes_are_those_of_the_name(name: str) -> None:
    content = small_configs.read(name)
    depth, size = map(int, name.removeprefix("fvar_d").removesuffix(".yaml").split("_"))
    options = content["model"]["init_args"]
    assert (options["depth"], content["data"]["init_args"]["image_size"]) == (depth, size)
    with torch.device("meta"):
        student = VAR(
            FocusSchedule(**content["data"]["init_args"]["schedule"]).patch_nums,
            vocab_size=8192,
            depth=depth,
            shared_aln=options.get("shared_aln", False),
        )
    assert student.width == options.get("width", 64 * depth) == 64 * depth


def test_no_configuration_is_left_out() -> None:
    fragments = {"quickstart/data.yaml", "quickstart/student.yaml"}
    assert set(ALL) == {*PLAIN, *QUICKSTART, OFFICIAL, *CACHED, *DATA, *OVERRIDES, *EVALUATION} | fragments

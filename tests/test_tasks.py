"""The tasks: losses, gradients, and `fvar` in process on tiny configurations."""

import copy
import dataclasses
import math
import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning import Trainer
from torch._dynamo.utils import counters
from torch.nn import functional as F

from fvar_lightning.cli import main
from fvar_lightning.data.batches import ImageBatch, TokenBatch
from fvar_lightning.data.token_cache import TokenCache
from fvar_lightning.optics.refocus import Refocus
from fvar_lightning.schedule import FocusSchedule
from fvar_lightning.tasks.alias import AliasTokenizerTask
from fvar_lightning.tasks.fvar import FVARTask
from fvar_lightning.tasks.tokenizer import TokenizerTask
from fvar_lightning.tasks.tokens import check_cache
from fvar_lightning.tasks.training import WarmupLinear, batch_generator, parameter_groups
from fvar_lightning.tokenizer.alias import AliasTokenizer
from fvar_lightning.tokenizer.vqvae import VQVAE
from fvar_lightning.weights.checkpoints import load_tokenizer
from fvar_lightning.weights.files import read_checkpoint
from fvar_lightning.weights.identity import tokenizer_sha256
from fvar_lightning.weights.pretrained import save_pretrained

CONF = Path(__file__).parent / "conf"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, image_folder: Path) -> dict[str, Path]:
    """Both tokenizers, trained for a few steps through the command line."""
    root = tmp_path_factory.mktemp("stage1")
    for kind in ("structure", "alias"):
        fit(f"{kind}.yaml", image_folder, root / kind, [])
    return {kind: root / kind / "last.ckpt" for kind in ("structure", "alias")}


def fit(config: str, source: Path, root: Path, args: list[str]) -> None:
    cli = main(
        [
            "fit",
            f"--config={CONF / config}",
            f"--data.source={source}",
            f"--trainer.default_root_dir={root}",
            f"--trainer.logger.save_dir={root}",
            *args,
        ]
    )
    assert cli is not None
    cli.trainer.save_checkpoint(root / "last.ckpt", weights_only=False)


def stage2_args(trained: dict[str, Path]) -> list[str]:
    return [f"--model.{kind}_tokenizer={path}" for kind, path in trained.items()]


@pytest.fixture(scope="module")
def stage2(tmp_path_factory: pytest.TempPathFactory, image_folder: Path, trained: dict[str, Path]) -> Path:
    root = tmp_path_factory.mktemp("stage2")
    fit("fvar.yaml", image_folder, root, stage2_args(trained))
    return root / "last.ckpt"


def test_fit_writes_tokenizers_that_load(trained: dict[str, Path]) -> None:
    assert isinstance(load_tokenizer(trained["structure"]), VQVAE)
    assert isinstance(load_tokenizer(trained["alias"]), AliasTokenizer)
    assert isinstance(AliasTokenizerTask.load_from_checkpoint(trained["alias"]).tokenizer, AliasTokenizer)


def test_fit_of_stage_two_knows_the_classes(stage2: Path) -> None:
    task = FVARTask.load_from_checkpoint(stage2)
    assert task.class_names == ["blue", "red"]
    assert task.student.num_classes == 2
    assert task.generate(torch.tensor([0, 1, 2]), seeds=[1, 2, 3]).shape == (3, 3, 16, 16)


@pytest.mark.parametrize("known", [True, False], ids=["task", "data"])
def test_names_of_another_number_of_classes_are_refused(
    tmp_path: Path, image_folder: Path, trained: dict[str, Path], known: bool
) -> None:
    args = [*stage2_args(trained), "--model.class_names=[blue]", *(["--model.num_classes=2"] if known else [])]
    with pytest.raises((ValueError, SystemExit)) as refused:
        fit("fvar.yaml", image_folder, tmp_path, args)
    assert "class_names must name 2 classes, got 1" in str(refused.getrepr(chain=True))


def test_predict_writes_pictures_of_every_class(
    tmp_path: Path, image_folder: Path, trained: dict[str, Path], stage2: Path
) -> None:
    args = [f"--config={CONF / 'fvar.yaml'}", f"--data.source={image_folder}", *stage2_args(trained)]
    writer = ["--trainer.callbacks=SampleWriter", f"--trainer.callbacks.folder={tmp_path / 'samples'}"]
    main(["predict", *args, *writer, "--data.samples_per_class=3", f"--ckpt_path={stage2}", "--trainer.logger=false",
          f"--trainer.default_root_dir={tmp_path}"])  # fmt: skip
    files = sorted(str(p.relative_to(tmp_path / "samples")) for p in (tmp_path / "samples").rglob("*.png"))
    assert files == [f"{c:04d}_{n}/{3 * c + i:06d}.png" for c, n in enumerate(["blue", "red"]) for i in range(3)]


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory, image_folder: Path, trained: dict[str, Path]) -> list[str]:
    """Training and validation tokens, through the command line; as arguments of it, with a model to train on them."""
    root = tmp_path_factory.mktemp("caches")
    args = [f"--config={CONF / 'fvar.yaml'}", f"--trainer.default_root_dir={root}", "--trainer.logger=false"]
    for part in ("train", "val"):
        main(["predict", *args, f"--data.source={image_folder}", *stage2_args(trained), "--data.predict=tokens",
              f"--data.part={part}", "--data.crops_per_image=2", "--trainer.callbacks=TokenWriter",
              f"--trainer.callbacks.folder={root / part}"])  # fmt: skip
    content = yaml.safe_load((CONF / "fvar.yaml").read_text())
    paths = {"path": str(root / "train"), "val_path": str(root / "val"), "batch_size": 4}
    content["data"] = {"class_path": "TokenDataModule", "init_args": paths}
    (root / "tokens.yaml").write_text(yaml.safe_dump(content))
    return [f"--config={root / 'tokens.yaml'}"]


def test_stage_two_trains_from_a_token_cache(tmp_path: Path, trained: dict[str, Path], caches: list[str]) -> None:
    args = [*caches, f"--trainer.default_root_dir={tmp_path}", "--trainer.logger=false", "--trainer.max_epochs=1"]
    cli = main(["fit", *args, *stage2_args(trained), "--trainer.max_steps=-1"])
    assert cli is not None
    assert cli.trainer.global_step == 8, "two crops of 16 images in batches of 4"
    assert cli.model.class_names == ["blue", "red"]
    assert cli.trainer.callback_metrics["val/loss"] > 0
    # its checkpoint stands alone, and knows that the tokens are its tokenizers'
    cli.trainer.save_checkpoint(tmp_path / "last.ckpt")
    for command in ("validate", "fit"):
        cli = main([command, *args, f"--ckpt_path={tmp_path / 'last.ckpt'}", "--trainer.max_steps=16",
                    "--trainer.max_epochs=-1"])  # fmt: skip
        assert cli.model.token_meta() == cli.datamodule.train.meta
    assert cli.trainer.global_step == 16


@pytest.mark.parametrize(
    ("command", "change", "message"),
    [
        ("fit", "weights", r"structure.sha256 '(\w+)' instead of '(?!\1)\w+'; alias.sha256"),
        ("validate", "weights", r"structure.sha256 '\w+' instead of '\w+'; alias.sha256"),
        ("test", {"psf": "gaussian"}, "structure.psf 'disk' instead of 'gaussian'; alias.psf 'disk' instead of 'gau"),
        ("fit", {"schedule": {"max_radius": 1.0}}, "schedule.max_radius None instead of 1.0"),
    ],
)
def test_a_cache_of_another_tokenizer_is_refused(
    command: str,
    change: object,
    message: str,
    trained: dict[str, Path],
    caches: list[str],
    stage2: Path,
    tmp_path: Path,
) -> None:
    """Of equal sizes."""
    for kind, path in trained.items():
        checkpoint = torch.load(path, weights_only=True)
        if isinstance(change, dict):
            description = checkpoint["tokenizer"]
            for name, value in change.items():
                description[name] = description[name] | value if isinstance(value, dict) else value
        else:
            for name, value in checkpoint["state_dict"].items():
                checkpoint["state_dict"][name] = value + 1e-4 if value.is_floating_point() else value
        torch.save(checkpoint, tmp_path / f"{kind}.ckpt")
    others = {kind: tmp_path / f"{kind}.ckpt" for kind in trained}
    with pytest.raises(ValueError, match=f"the token cache '.*train' was written with {message}"):
        main([command, *caches, *stage2_args(others), f"--model.initial_weights={stage2}",
              f"--trainer.default_root_dir={tmp_path}", "--trainer.logger=false"])  # fmt: skip


def test_a_cache_without_alias_tokens_teaches_nobody(trained: dict[str, Path], caches: list[str]) -> None:
    cache = TokenCache.open(Path(caches[0].removeprefix("--config=")).parent / "train")
    task = make_task(trained)
    check_cache(cache, task.token_meta())
    plain = dataclasses.replace(cache, tokens=dataclasses.replace(cache.tokens, alias=None))
    with pytest.raises(ValueError, match=r"alias.vocab_size None instead of 8"):
        check_cache(plain, task.token_meta())
    alone = make_task(trained, teacher_loss_weight=0.0, feature_weight=0.0, logit_weight=0.0)
    for held in (cache, plain):
        check_cache(held, alone.token_meta())


def test_a_tokenizers_hash_is_of_what_tokens_depend_on(trained: dict[str, Path], stage2: Path, tmp_path: Path) -> None:
    """The same by whatever way its weights came, and in whatever precision they then are."""
    task = make_task(trained)
    known = task.token_meta()
    assert FVARTask.load_from_checkpoint(stage2, weights_only=True).token_meta().structure == known.structure
    assert task.bfloat16().token_meta() == known

    structure = load_tokenizer(trained["structure"])
    sha256 = tokenizer_sha256(structure)
    assert sha256 == known.structure.sha256
    save_pretrained(tmp_path / "model", task.float().student, structure)
    assert tokenizer_sha256(load_tokenizer(tmp_path / "model")) == sha256
    structure.decoder.conv_out.bias.data += 1
    structure.codebook.counts += 1
    assert tokenizer_sha256(structure) == sha256
    for change in (structure.encoder.conv_out.bias, structure.codebook.embedding.weight, structure.quant_conv.weight,
                   next(structure.quantizer.phi.parameters())):  # fmt: skip
        change.data += 1e-3
        assert tokenizer_sha256(structure) != sha256
        change.data -= 1e-3
        sha256 = tokenizer_sha256(structure)


@pytest.mark.slow
def test_scale_dropout_teaches_partial_tokens_to_decode_to_their_focus_state(
    tmp_path: Path, image_folder: Path
) -> None:
    args = [f"--config={CONF / 'structure.yaml'}", f"--data.source={image_folder}", "--seed_everything=0",
            "--data.schedule.max_radius=4", "--data.batch_size=8", "--model.warmup_steps=40", "--trainer.max_steps=120",
            "--model.optimizer=torch.optim.AdamW", "--model.optimizer.lr=3e-3", "--trainer.limit_val_batches=0",
            "--trainer.logger=false", f"--trainer.default_root_dir={tmp_path}"]  # fmt: skip
    errors = {}
    for dropout in (0.0, 0.5):
        cli = main(["fit", *args, f"--model.scale_dropout={dropout}"])
        assert cli is not None
        data = cli.datamodule
        batch = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
        first = cli.model.eval().reconstruct(batch)[0]
        errors[dropout] = F.mse_loss(first, batch.blurred[0]).item()
        to_sharp = F.mse_loss(first, batch.images).item()
    assert errors[0.5] < 0.5 * errors[0.0]
    assert errors[0.5] < to_sharp


@pytest.mark.parametrize(
    ("config", "args"),
    [("structure.yaml", []), ("alias.yaml", []),
     ("structure.yaml", ["--model.adversarial_weight=0.5", "--model.adversarial_start=0.4",
                         "--model.discriminator_ch=8", "--model.vocab_size=48"])],
    ids=["structure", "alias", "adversarial and revival"],
)  # fmt: skip
def test_a_resumed_run_reaches_the_same_weights(
    config: str, args: list[str], tmp_path: Path, image_folder: Path
) -> None:
    checkpoint = [*args, "--trainer.callbacks=lightning.pytorch.callbacks.ModelCheckpoint",
                  f"--trainer.callbacks.dirpath={tmp_path}", "--trainer.callbacks.every_n_train_steps=3",
                  "--trainer.callbacks.filename=half"]  # fmt: skip
    fit(config, image_folder, tmp_path / "whole", checkpoint)
    fit(config, image_folder, tmp_path / "half", [f"--ckpt_path={tmp_path / 'half.ckpt'}"])
    whole, half = (read_checkpoint(tmp_path / name / "last.ckpt")["state_dict"] for name in ("whole", "half"))
    assert whole.keys() == half.keys()
    for name, value in whole.items():
        assert torch.equal(value, half[name]), name


def test_validate_logs_the_figures_of_a_tokenizer(tmp_path: Path, image_folder: Path, trained: dict[str, Path]) -> None:
    metrics = ["--trainer.callbacks=ReconstructionMetrics", "--trainer.callbacks.lpips=null"]
    found = {}
    for kind, more in (("structure", metrics), ("alias", [])):
        cli = main(["validate", f"--config={CONF / f'{kind}.yaml'}", f"--data.source={image_folder}", *more,
                    f"--ckpt_path={trained[kind]}", "--trainer.logger=false",
                    f"--trainer.default_root_dir={tmp_path}"])  # fmt: skip
        assert cli is not None
        found[kind] = {name: float(value) for name, value in cli.trainer.callback_metrics.items()}
        data = cli.datamodule
        batches = [data.on_after_batch_transfer(batch, 0) for batch in data.val_dataloader()]
        tokenizer = load_tokenizer(trained[kind])
        inputs = [b.views.focused if kind == "structure" else b.views.alias for b in batches]
        maps = [torch.cat(tokens) for tokens in zip(*map(tokenizer.encode, inputs), strict=True)]
        for side, tokens in zip((1, 2, 4)[: 3 - (kind == "alias")], maps, strict=False):
            frequencies = torch.bincount(tokens.flatten(), minlength=8).double() / tokens.numel()
            entropy = -(frequencies[frequencies > 0] * frequencies[frequencies > 0].log()).sum()
            used = (entropy.exp() / min(8, tokens.numel())).item()
            assert found[kind][f"val/usage/{side}x{side}"] == pytest.approx(used, rel=1e-5)
    images = torch.cat([b.images for b in batches])
    vae = load_tokenizer(trained["structure"])
    decoded = torch.cat([vae.decode(vae.encode(b.views.focused)) for b in batches])
    psnr = 10 * torch.log10(4 / F.mse_loss(decoded, images)).item()
    assert found["structure"]["val/psnr"] == pytest.approx(psnr, rel=1e-4)
    assert found["structure"]["val/focus_psnr/2"] == pytest.approx(psnr, rel=1e-4)
    assert {"val/ssim", "val/high_band", "val/fd_efficientnet_lite0", "val/focus_psnr/1"} <= found["structure"].keys()
    assert "val/psnr" not in found["alias"]
    assert {"val/snr/1x1", "val/snr/2x2"} <= found["alias"].keys()


def test_noise_is_added_to_the_input_in_training_only() -> None:
    schedule = FocusSchedule((1, 2, 4), patch_size=16, focus_states=2)
    task = TokenizerTask(schedule, vocab_size=8, z_channels=4, ch=8, num_res_blocks=1, noise=(0.5, 0.1))
    images = torch.rand(8, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    refocus = Refocus(schedule)
    blurred = refocus.blur(images)
    batch = ImageBatch(images, torch.zeros(8, dtype=torch.long), refocus.views(images, blurred), blurred)
    clean = task._inputs(batch, None)
    noisy = task._inputs(batch, batch_generator(task.device, 0))
    deviations = [(x - y).std().item() for x, y in zip(noisy, clean, strict=True)]
    assert all(torch.equal(x, y) for x, y in zip(clean, batch.views.focused, strict=True))
    assert deviations == pytest.approx([0.5, 0.3, 0.1], rel=0.1)


def test_a_run_without_an_end_is_refused(tmp_path: Path, image_folder: Path) -> None:
    with pytest.raises(ValueError, match="trainer needs max_steps or max_epochs"):
        fit("structure.yaml", image_folder, tmp_path, ["--trainer.max_steps=-1", "--trainer.max_epochs=-1",
            "--trainer.max_time=00:00:01:00"])  # fmt: skip


def test_a_run_that_ends_before_its_codes_are_set_is_warned_of(tmp_path: Path, image_folder: Path) -> None:
    with pytest.warns(UserWarning, match="warmup_steps 5 leaves no step of the run's 5 to set the codes in"):
        fit("structure.yaml", image_folder, tmp_path, ["--model.warmup_steps=5"])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model.vocabsize=8"], "vocabsize"),
        (["--data.image_size=20"], r"image_size .* 4 \* 4 = 16, got 20"),
        (["--model.ch_mult=[1, 2]"], r"ch_mult \(1, 2\) down-samples by 2, but patch_size is 4"),
        (["--data.source=/nowhere"], "source .*'/nowhere'"),
        (["--model.targets=focus"], "focus"),
    ],
)
def test_bad_arguments_are_named(
    args: list[str], message: str, image_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["fit", f"--config={CONF / 'structure.yaml'}", f"--data.source={image_folder}", *args])
    assert re.search(message, capsys.readouterr().err)


def make_task(trained: dict[str, Path], **kwargs: object) -> FVARTask:
    paths = {f"{kind}_tokenizer": str(path) for kind, path in trained.items()}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return FVARTask(**paths, num_classes=2, depth=3, width=32, heads=2, **({"drop_path_rate": 0.1} | kwargs))


def open_branches(task: FVARTask) -> None:
    """Away from the initialisation, where branches are almost closed; a teacher's copies follow."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in task.student.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
        for own, copied in zip(task.student.blocks[task.teacher.first :], task.teacher.blocks, strict=True):
            copied.block.load_state_dict(own.state_dict())
        if task.teacher.network is not None:
            task.teacher.network.load_state_dict(task.student.state_dict(), strict=False)


def make_tokens(task: FVARTask) -> TokenBatch:
    generator = torch.Generator().manual_seed(1)
    sides = task.vae.schedule.patch_nums
    structure, alias = ([torch.randint(v, (4, n * n), generator=generator) for n in sides] for v in (8, 8))
    return TokenBatch(structure, alias, torch.tensor([0, 1, 1, 0]))


def gradients(task: FVARTask, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    task.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in task.student.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("trunk", ["shared", "separate"])
def test_student_gradients_without_teacher_are_plain_vars(trained: dict[str, Path], trunk: str) -> None:
    """With distillation and teacher weights at zero, also where the teacher's pass is made; compared in float64, since
    the losses sum in chunks."""
    task = make_task(trained, trunk=trunk).train().double()
    batch = make_tokens(task)
    plain = copy.deepcopy(task.student).train()
    generator = batch_generator(torch.device("cpu"), 5)
    dropped = torch.rand(4, generator=generator) < 0.1
    keep = plain.keep_masks(4, generator)
    inputs = task.vae.var_inputs(batch.structure)
    logits = plain(torch.where(dropped, 2, batch.labels), inputs, keep)
    F.cross_entropy(logits.flatten(0, 1), torch.cat(batch.structure, 1).flatten()).backward()
    for name in ("teacher_loss_weight", "feature_weight", "logit_weight"):
        setattr(task, name, 0.0)
    found = gradients(task, task.losses(batch, batch_generator(torch.device("cpu"), 5))["loss"])
    for name, p in plain.named_parameters():
        torch.testing.assert_close(found[name], p.grad, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("trunk", ["shared", "separate"])
def test_a_teacher_that_is_a_copy_teaches_nothing_in_training_either(trained: dict[str, Path], trunk: str) -> None:
    """Student and teacher skip the same branches of the same samples."""
    task = make_task(trained, trunk=trunk, drop_path_rate=0.8).train()
    open_branches(task)
    batch = make_tokens(task)
    still = task.losses(batch)
    terms = task.losses(batch, batch_generator(torch.device("cpu"), 5))
    assert terms["student"] != still["student"]
    assert terms["feature"] == 0
    assert terms["logit"].item() == pytest.approx(0, abs=1e-7)
    assert terms["teacher"] == terms["student"]


@pytest.mark.parametrize(
    ("trunk", "recompute"),
    [
        ("shared", True),
        ("separate", False),
        pytest.param("detached", False, marks=pytest.mark.slow),
        pytest.param("shared", False, marks=pytest.mark.slow),
        pytest.param("separate", True, marks=pytest.mark.slow),
    ],
)
def test_the_losses_compile_without_a_graph_break(trained: dict[str, Path], trunk: str, recompute: bool) -> None:
    task = make_task(trained, trunk=trunk, recompute=recompute).train()
    batch = make_tokens(task)
    inputs = task.step_inputs(batch, batch_generator(torch.device("cpu"), 5))
    expected = gradients(task, task.terms(inputs)["loss"])
    compiled = torch.compile(task.terms, fullgraph=True, backend="eager")
    for name, gradient in gradients(task, compiled(inputs)["loss"]).items():
        torch.testing.assert_close(gradient, expected[name], msg=lambda m, name=name: f"{name}: {m}")


def test_the_switch_compiles_every_block_once(trained: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # needs no C++ compiler
    task = make_task(trained, compile=True).train()
    plain = copy.deepcopy(task)  # as weight averaging copies it: not compiled
    inputs = task.step_inputs(make_tokens(task), batch_generator(torch.device("cpu"), 5))
    torch._dynamo.reset()
    counters.clear()
    expected = gradients(plain, plain.terms(inputs)["loss"])
    assert counters["stats"]["unique_graphs"] == 0
    for name, gradient in gradients(task, task.terms(inputs)["loss"]).items():
        torch.testing.assert_close(
            gradient, expected[name], atol=1e-6, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}"
        )
    assert counters["stats"]["unique_graphs"] == 2  # the student's block and the teacher's
    assert not counters["graph_break"]


def test_teacher_is_not_pulled_by_the_distillation(trained: dict[str, Path]) -> None:
    task = make_task(trained).train()
    torch.nn.init.normal_(task.teacher.blocks[-1].cross.proj.weight)
    terms = task.losses(make_tokens(task))
    own = [p for p in task.teacher.parameters()]
    grads = torch.autograd.grad(terms["feature"] + terms["logit"], own, allow_unused=True)
    assert not any(g.any() for g in grads if g is not None)
    assert terms["feature"] > 0
    assert terms["logit"] > 0


@pytest.mark.parametrize("trunk", ["shared", "detached", "separate"])
@pytest.mark.parametrize("shared_aln", [False, True])
def test_whom_the_teachers_loss_trains(trained: dict[str, Path], trunk: str, shared_aln: bool) -> None:
    """The student too where they share a trunk, unless that is detached; the teacher's own parts always."""
    task = make_task(trained, trunk=trunk, shared_aln=shared_aln).train()
    torch.nn.init.normal_(task.student.head.weight)
    for block in task.teacher.blocks:
        torch.nn.init.normal_(block.cross.proj.weight)
    loss = task.losses(make_tokens(task))["teacher"]
    student, teacher = (
        torch.autograd.grad(loss, list(network.parameters()), retain_graph=True, allow_unused=True)
        for network in (task.student, task.teacher)
    )
    assert any(g is not None and g.any() for g in student) == (trunk == "shared")
    assert all(g is not None and g.any() for g in teacher) or trunk == "separate"
    assert any(g is not None and g.any() for g in teacher)


@pytest.mark.parametrize("targets", ["view", "full", "feature"])
def test_without_an_alias_tokenizer_only_views_can_teach(targets: str) -> None:
    """What encodes images at full size alone encodes no alias residual of a scale."""
    structure = {"kind": "structure", "schedule": FocusSchedule((1, 2), patch_size=4, focus_states=2, max_radius=1.0),
                 "targets": targets, "ch": 8, "ch_mult": (1, 1, 2)}  # fmt: skip
    options: dict[str, Any] = {"num_classes": 2, "depth": 1, "width": 8, "heads": 1, "alias_blocks": 1}
    if targets != "view":
        with pytest.raises(ValueError, match=f"alias_tokenizer must be given: .* targets '{targets}'"):
            FVARTask(structure, **options)
        options |= {"teacher_loss_weight": 0.0, "feature_weight": 0.0, "logit_weight": 0.0}
    assert (FVARTask(structure, **options).teacher is None) == (targets != "view")


def test_alias_tokens_of_the_sharp_scale_are_read_only_on_demand(trained: dict[str, Path]) -> None:
    """Whose residual is zero; the weights are the same either way, so that checkpoints of both load."""
    tasks = [make_task(trained, sharp_alias=on) for on in (False, True)]
    tasks[1].load_state_dict(tasks[0].state_dict())
    batch = make_tokens(tasks[0])
    changed = batch._replace(alias=[*batch.alias[:-1], (batch.alias[-1] + 1) % 8])
    for task, differs in zip(tasks, (False, True), strict=True):
        torch.nn.init.constant_(task.teacher.blocks[-1].cross.proj.weight, 0.1)
        torch.nn.init.normal_(task.student.head.weight, generator=torch.Generator().manual_seed(0))
        assert (task.losses(batch)["teacher"] != task.losses(changed)["teacher"]) == differs


def test_distillation_sets_in_rises_and_ends(
    trained: dict[str, Path], image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the run's steps: nothing of it before, a ramp, nothing after its end, and all of it in validation."""
    given = []
    terms = FVARTask.terms
    monkeypatch.setattr(
        FVARTask, "terms", lambda task, step: (given.append(step.distillation.item()), terms(task, step))[1]
    )
    args = ["--model.distill_start=0.25", "--model.distill_ramp=0.5", "--model.distill_stop=0.75"]
    args += ["--trainer.max_steps=8"]
    fit("fvar.yaml", image_folder, tmp_path, [*stage2_args(trained), *args])
    # two epochs of four batches, and one of validation after each
    assert given == [0, 0, 0, 0.25, 1, 0.5, 0.75, 0, 0, 1]


def test_tokens_go_wrong_in_training_only(trained: dict[str, Path]) -> None:
    """Every image draws its share; what is read and what is to be predicted change together, and come again with the
    same draws."""
    task = make_task(trained, token_corruption=0.8)
    batch, seeds = make_tokens(task), [torch.Generator().manual_seed(n) for n in (3, 3, 4)]
    clean, first, again, other = (task.step_inputs(batch, generator) for generator in (None, *seeds))
    tokens = torch.cat(list(batch.structure), dim=1)
    assert torch.equal(clean.targets, tokens)
    assert torch.equal(clean.inputs, task.vae.var_inputs(batch.structure))
    assert torch.equal(first.targets, again.targets)
    assert torch.equal(first.inputs, again.inputs)
    assert not torch.equal(first.inputs, clean.inputs)
    assert not torch.equal(first.targets, tokens)
    assert not torch.equal(first.inputs, other.inputs)
    assert torch.equal(first.alias, clean.alias)


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_student_and_teacher_are_clipped_apart(trained: dict[str, Path], algorithm: str) -> None:
    task, optimizer = make_task(trained), torch.optim.SGD([torch.zeros(1)])
    task._trainer = Trainer(accelerator="cpu", logger=False, gradient_clip_val=2.0, gradient_clip_algorithm=algorithm)
    optimizer.param_groups[0]["params"] = list(task.parameters())
    for network, size in ((task.student, 100.0), (task.teacher, 1e-3)):
        for parameter in network.parameters():
            parameter.grad = torch.full_like(parameter, size)
    task.configure_gradient_clipping(optimizer, 2.0, algorithm)
    norms = [
        torch.cat([p.grad.flatten() for p in m.parameters()]).double().norm() for m in (task.student, task.teacher)
    ]
    before = 1e-3 * sum(p.numel() for p in task.teacher.parameters()) ** 0.5
    assert norms[1].item() == pytest.approx(min(before, 2) if algorithm == "norm" else before, rel=1e-5)
    count = sum(p.numel() for p in task.student.parameters())
    assert norms[0].item() == pytest.approx(2 if algorithm == "norm" else 2 * count**0.5, rel=1e-5)


def test_terms_are_the_plain_formulas_in_float64(trained: dict[str, Path]) -> None:
    task = make_task(trained).eval()
    torch.nn.init.normal_(task.teacher.blocks[-1].cross.proj.weight)
    torch.nn.init.normal_(task.student.head.weight)
    batch = make_tokens(task)
    terms = task.losses(batch)
    inputs = task.vae.var_inputs(batch.structure)
    trace = task.student.trace(batch.labels, inputs)
    alias = task.alias_tokenizer.codes(torch.cat(batch.alias, 1))
    taught = task.teacher(task.student, trace, batch.labels, inputs, alias)
    p, q = (x.double().softmax(-1) for x in (taught.readout.logits(), task.student(batch.labels, inputs)))
    assert terms["logit"].item() == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), rel=1e-4)
    error = (trace.hidden[-1] - taught.hidden[-1]).double().square().mean()
    assert terms["feature"].item() == pytest.approx(error.item(), rel=1e-4)
    own, distilled = terms["student"] + terms["teacher"], terms["feature"] + 0.5 * terms["logit"]
    for factor in (1.0, 0.25):
        torch.testing.assert_close(task.losses(batch, distillation=factor)["loss"], own + factor * distilled)


def test_without_weights_there_is_no_teacher(trained: dict[str, Path]) -> None:
    task = make_task(trained, teacher_loss_weight=0.0, feature_weight=0.0, logit_weight=0.0)
    assert task.teacher is None
    assert set(task.losses(make_tokens(task))) == {"student", "loss"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"teacher_loss_weight": 0.0}, "teacher_loss_weight 0 leaves the teacher untrained"),
        ({"logit_weight": -1.0}, "logit_weight must not be negative, got -1"),
        ({"feature_blocks": 3}, r"feature_blocks must lie in 1..2 \(alias_blocks\), got 3"),
        ({"label_dropout": 1.0}, "label_dropout must lie in"),
        ({"lr_hold": -0.1}, r"lr_hold must lie in \[0, 1\], got -0.1"),
        ({"weight_decay_final": -0.1}, "weight_decay_final must not be negative, got -0.1"),
        ({"initial_gain": -1.0}, "initial_gain must not be negative, got -1"),
        ({"distill_start": 0.5, "distill_stop": 0.25}, "distill_stop must not be before distill_start 0.5, got 0.25"),
        ({"distill_start": 1.5}, r"distill_start must lie in \[0, 1\], got 1.5"),
        ({"token_corruption": 1.5}, r"token_corruption must lie in \[0, 1\], got 1.5"),
        ({"distill_ramp": -0.1}, r"distill_ramp must lie in \[0, 1\], got -0.1"),
        ({"alias_scales": 1, "alias_context": "own_scale"}, "alias_scales must be more than the 1 sharp scales"),
        ({"alias_blocks": 9}, r"alias_blocks must lie in 1..3"),
    ],
)
def test_task_refuses(trained: dict[str, Path], arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_task(trained, **arguments)


def test_swapped_or_missing_tokenizers_are_named(trained: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"structure_tokenizer .* holds an alias tokenizer"):
        FVARTask(structure_tokenizer=str(trained["alias"]))
    with pytest.raises(ValueError, match=r"alias_tokenizer .* holds a structure tokenizer"):
        FVARTask(structure_tokenizer=str(trained["structure"]), alias_tokenizer=str(trained["structure"]))
    with pytest.raises(ValueError, match="does not exist"):
        FVARTask(structure_tokenizer=str(tmp_path / "none.ckpt"))
    broken = tmp_path / "broken.ckpt"
    broken.write_bytes(trained["structure"].read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"broken.ckpt' cannot be read"):
        FVARTask(structure_tokenizer=str(broken))


def test_a_checkpoint_of_another_width_is_refused(stage2: Path) -> None:
    with pytest.raises(
        ValueError, match="the checkpoint is of another student: heads is 2, not 4, width is 32, not 64"
    ):
        FVARTask.load_from_checkpoint(stage2, width=64, heads=4, weights_only=True)
    assert FVARTask.load_from_checkpoint(stage2, drop_path_rate=0.3, weights_only=True).student.width == 32


def test_parameter_groups_spare_biases_and_positions(trained: dict[str, Path]) -> None:
    task = make_task(trained)
    decayed, free = (set(map(id, group["params"])) for group in parameter_groups([task.student]))
    names = {id(p): n for n, p in task.student.named_parameters()}
    assert {names[i] for i in free} == {
        n for n in names.values() if "bias" in n or "scale_mul" in n or n.startswith(("pos_", "lvl_embed"))
    }
    assert len(decayed) + len(free) == len(names)


def test_learning_rate_rises_then_falls() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    scheduler = WarmupLinear(optimizer, steps=100, warmup=0.1, final=0.01)
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates[0] == pytest.approx(0.2)
    assert max(rates) == rates[9] == pytest.approx(2.0)
    assert rates[-1] == pytest.approx(2 * (0.01 + 0.99 / 90))


def test_rate_and_decay_are_those_of_official_runs() -> None:
    steps, rising = 2000, 40
    weights = [torch.zeros(1, requires_grad=True) for _ in range(2)]
    groups = [{"params": weights[:1]}, {"params": weights[1:], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=3.0, weight_decay=0.05)
    scheduler = WarmupLinear(optimizer, steps, warmup=0.02, final=0.1, hold=0.05, weight_decay_final=0.08)
    for i in range(steps):
        # lr_wd_annealing of official VAR, sche_type lin0
        passed = (i - rising) / (steps - 1 - rising)
        fallen = 1.0 if passed < 0.05 else 0.1 + 0.9 * (1 - passed) / 0.95
        rate = 0.005 + 0.995 * i / rising if i < rising else fallen
        decay = 0.08 + (0.05 - 0.08) * (0.5 + 0.5 * math.cos(math.pi * i / (steps - 1)))
        # the rate of the first step, and where the fall ends
        assert abs(optimizer.param_groups[0]["lr"] / 3 - rate) < (1 / rising if i < rising else 1 / (steps - rising))
        assert optimizer.param_groups[0]["weight_decay"] == pytest.approx(decay, rel=1e-9)
        assert optimizer.param_groups[1]["weight_decay"] == 0
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("own", [0.9, None])
def test_a_resumed_run_decays_as_its_own_arguments_say(own: float | None) -> None:
    """Of the checkpoint it takes how far the run had come."""

    def schedule(steps: int, final: float | None, peak: float, decay: float) -> WarmupLinear:
        optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=peak, weight_decay=decay)
        return WarmupLinear(optimizer, steps, warmup=0.02, final=0.1, weight_decay_final=final)

    first, longer, resumed = (
        schedule(100, 0.2, 1.0, 0.1),
        schedule(1000, own, 3.0, 0.05),
        schedule(1000, own, 3.0, 0.05),
    )
    for scheduler in (first, longer):
        for _ in range(50):
            scheduler.optimizer.step()
            scheduler.step()
    resumed.optimizer.load_state_dict(first.optimizer.state_dict())
    resumed.load_state_dict(first.state_dict())
    group, expected = resumed.optimizer.param_groups[0], longer.optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"]) == (expected["lr"], expected["weight_decay"])
    for scheduler in (longer, resumed):
        scheduler.optimizer.step()
        scheduler.step()
    assert (group["lr"], group["weight_decay"]) == (expected["lr"], expected["weight_decay"])


@pytest.mark.parametrize(
    ("task", "argument", "value"),
    [
        (FVARTask, "lr_warmup", 1000), (FVARTask, "lr_final", -0.1), (FVARTask, "seed", -1), (FVARTask, "top_p", 95),
        (FVARTask, "top_k", -1), (FVARTask, "heads", 0), (TokenizerTask, "lr_warmup", 1000),
        (FVARTask, "guidance", -1.0), (FVARTask, "logit_weight", math.nan), (TokenizerTask, "seed", -1),
        (TokenizerTask, "l1_weight", -1.0), (TokenizerTask, "texture_weight", -1.0), (TokenizerTask, "ch", 0),
        (TokenizerTask, "texture_octaves", -1),
        (TokenizerTask, "noise", (0.1, math.nan)), (TokenizerTask, "lr_final", math.nan),
        (AliasTokenizerTask, "vq_weight", -1.0), (AliasTokenizerTask, "z_channels", 0),
        (AliasTokenizerTask, "schedule", FocusSchedule((16,), focus_states=1)), (AliasTokenizerTask, "psf", "none"),
    ],
)  # fmt: skip
def test_values_that_would_fail_later_are_refused_at_once(task: type, argument: str, value: Any) -> None:
    own = {"num_classes": 2, "depth": 1, "width": 8} if task is FVARTask else {}
    described = [{"kind": kind, "schedule": FocusSchedule((1, 2), focus_states=2)} for kind in ("structure", "alias")]
    named = {"psf": "schedule", "heads": "width"}.get(argument, argument)
    with pytest.raises(ValueError, match=f"{named} must"):
        task(*(described if task is FVARTask else ()), **own | {argument: value})


def test_weights_of_half_precision(tmp_path: Path, image_folder: Path, trained: dict[str, Path]) -> None:
    """Stage 2 trains with them from images too; a codebook's moving averages would stand still in them."""
    half = "--trainer.precision=bf16-true"
    fit("fvar.yaml", image_folder, tmp_path, [*stage2_args(trained), half, "--trainer.max_steps=1"])
    weights = read_checkpoint(tmp_path / "last.ckpt")["state_dict"]
    assert weights["student.head.weight"].dtype == torch.bfloat16
    for kind in ("structure", "alias"):
        with pytest.raises(ValueError, match=r"precision must be 32-true, bf16-mixed or 16-mixed.*got bf16-true"):
            fit(f"{kind}.yaml", image_folder, tmp_path / kind, [half])
    with pytest.raises(ValueError, match="precision must not be 16-true"):
        fit("fvar.yaml", image_folder, tmp_path, [*stage2_args(trained), "--trainer.precision=16-true"])


@pytest.mark.parametrize("kind", ["structure", "alias"])
def test_tokenizers_of_double_precision(kind: str, tmp_path: Path, image_folder: Path) -> None:
    fit(f"{kind}.yaml", image_folder, tmp_path, ["--trainer.precision=64-true", "--trainer.max_steps=1"])
    weights = read_checkpoint(tmp_path / "last.ckpt")["state_dict"]
    assert weights["tokenizer.encoder.conv_out.weight"].dtype == torch.float64


@pytest.mark.parametrize(
    ("command", "change", "message"),
    [
        ("fit", "--data.psf=gaussian", "psf is disk, not gaussian"),
        ("validate", "--data.psf=gaussian", "psf is disk, not gaussian"),
        ("fit", "--data.schedule.max_radius=1.0", "schedule is .*'max_radius': None.* not .*'max_radius': 1.0"),
    ],
)
def test_a_tokenizers_checkpoint_of_other_views_is_not_gone_on_with(
    command: str, change: str, message: str, tmp_path: Path, image_folder: Path, trained: dict[str, Path]
) -> None:
    args = [
        f"--config={CONF / 'alias.yaml'}",
        f"--data.source={image_folder}",
        f"--trainer.default_root_dir={tmp_path}",
    ]
    with (
        pytest.raises(ValueError, match=f"the checkpoint is of a tokenizer of other views: {message}")
        if command == "fit"
        else pytest.warns(UserWarning, match=f"judged by other views than those it was trained on: {message}")
    ):
        main([command, *args, change, f"--ckpt_path={trained['alias']}", "--trainer.logger=false"])


def test_labels_of_other_classes_are_told(
    tmp_path: Path, image_folder: Path, trained: dict[str, Path], recwarn: pytest.WarningsRecorder
) -> None:
    """Where a label means another class than in training; names of one's own are no such thing."""
    for a, b in (("blue", "ape"), ("red", "blue")):
        shutil.copytree(image_folder / a, tmp_path / "images" / b)
    own = [*stage2_args(trained), "--model.num_classes=2", "--model.class_names=[sea,fire]", "--trainer.max_steps=1"]
    fit("fvar.yaml", image_folder, tmp_path, own)
    path = f"--ckpt_path={tmp_path / 'last.ckpt'}"
    again = [*stage2_args(trained), "--trainer.max_steps=2", path]
    fit("fvar.yaml", image_folder, tmp_path, again)
    told = "labels of the data module are of classes of other names"
    assert not [w for w in recwarn if told in str(w.message)]
    others = [
        f"--data.source={tmp_path / 'images'}",
        f"--trainer.default_root_dir={tmp_path}",
        "--trainer.logger=false",
    ]
    with pytest.warns(UserWarning, match=f"2 {told}.* 0 was 'blue', and is 'ape'"):
        main(["validate", f"--config={CONF / 'fvar.yaml'}", *others, *stage2_args(trained), path])


def test_the_data_names_the_classes_whose_number_is_given(
    tmp_path: Path, image_folder: Path, trained: dict[str, Path]
) -> None:
    fit("fvar.yaml", image_folder, tmp_path, [*stage2_args(trained), "--model.num_classes=2", "--trainer.max_steps=1"])
    assert FVARTask.load_from_checkpoint(tmp_path / "last.ckpt").class_names == ["blue", "red"]


def test_accumulated_batches_draw_each_their_own_and_count_as_one_step(
    tmp_path: Path, image_folder: Path, trained: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = []

    def recorded(device: torch.device, *key: int) -> torch.Generator:
        keys.append(key)
        return batch_generator(device, *key)

    monkeypatch.setattr("fvar_lightning.tasks.fvar.batch_generator", recorded)
    # four batches an epoch, so two steps, the second of one batch
    accumulate = ["--trainer.accumulate_grad_batches=3", "--trainer.max_epochs=2", "--trainer.max_steps=-1"]
    fit("fvar.yaml", image_folder, tmp_path, [*stage2_args(trained), *accumulate, "--model.lr_warmup=0.5"])
    assert len(keys) == len(set(keys)) == 8
    checkpoint = read_checkpoint(tmp_path / "last.ckpt")
    assert checkpoint["global_step"] == checkpoint["lr_schedulers"][0]["last_epoch"] == 4
    # of four steps two rise; after the fourth the rate has fallen
    assert checkpoint["optimizer_states"][0]["param_groups"][0]["lr"] == pytest.approx(0.1 * 1e-4)


def test_batch_generator_depends_on_its_key_alone() -> None:
    draws = [torch.rand(3, generator=batch_generator(torch.device("cpu"), *key)) for key in ((0, 1), (0, 1), (1, 0))]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_schedules_must_agree(trained: dict[str, Path]) -> None:
    class Data:
        schedule = FocusSchedule((1, 2, 4), patch_size=4, focus_states=3)

    task = make_task(trained)
    task._trainer = type("Trainer", (), {"datamodule": Data()})()
    with pytest.raises(ValueError, match="schedule of the data module and of the tokenizer differ"):
        task.setup("fit")


def test_a_batch_too_small_for_the_codebook_is_refused_before_the_first_step(
    tmp_path: Path, image_folder: Path
) -> None:
    with pytest.raises(ValueError, match=r"vocab_size 4096 is more than the .* vectors of one batch can initialise"):
        fit("structure.yaml", image_folder, tmp_path, ["--model.vocab_size=4096", "--model.warmup_steps=1000"])
    assert not list(tmp_path.rglob("*.ckpt"))

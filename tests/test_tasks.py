"""The tasks: losses, gradients, and `fvar` in process on tiny configurations."""

import copy
import math
import re
from pathlib import Path

import pytest
import torch
import yaml
from torch.nn import functional as F

from fvar_lightning.cli import main
from fvar_lightning.data.batches import ImageBatch, TokenBatch
from fvar_lightning.optics.refocus import Refocus
from fvar_lightning.schedule import FocusSchedule
from fvar_lightning.tasks.alias import AliasTokenizerTask
from fvar_lightning.tasks.fvar import FVARTask
from fvar_lightning.tasks.tokenizer import TokenizerTask
from fvar_lightning.tasks.training import WarmupLinear, batch_generator, parameter_groups
from fvar_lightning.tokenizer.alias import AliasTokenizer
from fvar_lightning.tokenizer.vqvae import VQVAE
from fvar_lightning.weights.checkpoints import load_tokenizer
from fvar_lightning.weights.files import read_checkpoint

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


def test_predict_writes_pictures_of_every_class(
    tmp_path: Path, image_folder: Path, trained: dict[str, Path], stage2: Path
) -> None:
    args = [f"--config={CONF / 'fvar.yaml'}", f"--data.source={image_folder}", *stage2_args(trained)]
    writer = ["--trainer.callbacks=SampleWriter", f"--trainer.callbacks.folder={tmp_path / 'samples'}"]
    main(["predict", *args, *writer, "--data.samples_per_class=3", f"--ckpt_path={stage2}", "--trainer.logger=false",
          f"--trainer.default_root_dir={tmp_path}"])  # fmt: skip
    files = sorted(str(p.relative_to(tmp_path / "samples")) for p in (tmp_path / "samples").rglob("*.png"))
    assert files == [f"{c:04d}_{n}/{3 * c + i:06d}.png" for c, n in enumerate(["blue", "red"]) for i in range(3)]


def test_stage_two_trains_from_a_token_cache(tmp_path: Path, image_folder: Path, trained: dict[str, Path]) -> None:
    cache = tmp_path / "tokens"
    args = [f"--config={CONF / 'fvar.yaml'}", f"--trainer.default_root_dir={tmp_path}", "--trainer.logger=false"]
    main(["predict", *args, f"--data.source={image_folder}", *stage2_args(trained), "--data.predict=tokens",
          "--data.crops_per_image=2", "--trainer.callbacks=TokenWriter",
          f"--trainer.callbacks.folder={cache}"])  # fmt: skip
    data = yaml.safe_dump(
        {"data": {"class_path": "TokenDataModule", "init_args": {"path": str(cache), "batch_size": 4}}}
    )
    (tmp_path / "tokens.yaml").write_text(data)
    model = yaml.safe_load((CONF / "fvar.yaml").read_text())
    (tmp_path / "model.yaml").write_text(yaml.safe_dump({k: model[k] for k in ("model", "trainer")}))
    cli = main(["fit", f"--config={tmp_path / 'model.yaml'}", f"--config={tmp_path / 'tokens.yaml'}",
                *stage2_args(trained), "--trainer.logger=false", f"--trainer.default_root_dir={tmp_path}"])  # fmt: skip
    assert cli is not None
    assert cli.trainer.global_step == 4
    assert cli.model.class_names == ["blue", "red"]


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


@pytest.mark.parametrize("trunk", ["shared", "separate"])
def test_the_losses_compile_without_a_graph_break(trained: dict[str, Path], trunk: str) -> None:
    task = make_task(trained, trunk=trunk).train()
    batch = make_tokens(task)
    inputs = task.step_inputs(batch, batch_generator(torch.device("cpu"), 5))
    expected = gradients(task, task.terms(inputs)["loss"])
    compiled = torch.compile(task.terms, fullgraph=True, backend="eager")
    for name, gradient in gradients(task, compiled(inputs)["loss"]).items():
        torch.testing.assert_close(gradient, expected[name], msg=lambda m, name=name: f"{name}: {m}")


def test_teacher_is_not_pulled_by_the_distillation(trained: dict[str, Path]) -> None:
    task = make_task(trained).train()
    torch.nn.init.normal_(task.teacher.blocks[-1].cross.proj.weight)
    terms = task.losses(make_tokens(task))
    own = [p for p in task.teacher.parameters()]
    grads = torch.autograd.grad(terms["feature"] + terms["logit"], own, allow_unused=True)
    assert not any(g.any() for g in grads if g is not None)
    assert terms["feature"] > 0
    assert terms["logit"] > 0


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
    total = terms["student"] + terms["teacher"] + terms["feature"] + 0.5 * terms["logit"]
    torch.testing.assert_close(terms["loss"], total)


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

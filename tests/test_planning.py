"""fvar plan: its figures against steps that really run, against CUDA's autocast, and against formulas."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from fvar_lightning.__main__ import run
from fvar_lightning.activations import saved_bytes
from fvar_lightning.cli import configs
from fvar_lightning.data.modules import ImageDataModule
from fvar_lightning.planning.command import Planner
from fvar_lightning.planning.cost import Cost, step_cost
from fvar_lightning.planning.dry_run import LikeCUDA, Meter, backward
from fvar_lightning.planning.layout import Layout, largest_batch, memory
from fvar_lightning.planning.plan import Assumptions, Plan, text
from fvar_lightning.schedule import FocusSchedule
from fvar_lightning.tasks.alias import AliasTokenizerTask
from fvar_lightning.tasks.fvar import FVARTask
from fvar_lightning.tasks.tokenizer import TokenizerTask
from fvar_lightning.transformer.var import VAR

SCHEDULE = FocusSchedule((1, 2, 4), patch_size=8, focus_states=3, max_radius=3.0)
BATCH = 4
NETWORK = {"vocab_size": 256, "ch": 16, "ch_mult": [1, 1, 2, 2], "num_res_blocks": 1, "norm_groups": 4}
STRUCTURE = {"kind": "structure", "schedule": SCHEDULE, **NETWORK}
ALIAS = {"kind": "alias", "schedule": SCHEDULE, "vocab_size": 64, "ch": 32}
VAR_SIZES = {"alias_blocks": 1, "depth": 2, "width": 128, "heads": 2, "num_classes": 10}
TASKS: dict[str, tuple[type, dict[str, Any]]] = {
    "stage 2": (FVARTask, {"structure_tokenizer": STRUCTURE, "alias_tokenizer": ALIAS, **VAR_SIZES}),
    "recomputed": (
        FVARTask,
        {"structure_tokenizer": STRUCTURE, "alias_tokenizer": ALIAS, "recompute": True, "trunk": "separate"}
        | VAR_SIZES,
    ),
    "plain VAR": (
        FVARTask,
        {"structure_tokenizer": STRUCTURE, "teacher_loss_weight": 0.0, "feature_weight": 0.0, "logit_weight": 0.0}
        | {"shared_aln": True, "attn_l2_norm": False}
        | VAR_SIZES,
    ),
    "alias": (AliasTokenizerTask, {"schedule": SCHEDULE, "ch": 32}),
    "structure": (TokenizerTask, {"schedule": SCHEDULE, "texture_weight": 1.0, **NETWORK}),
    "perceptual": (TokenizerTask, {"schedule": SCHEDULE, "perceptual": "efficientnet_lite1", **NETWORK}),
    "adversarial": (
        TokenizerTask,
        {"schedule": SCHEDULE, "targets": "full", "adversarial_weight": 0.5, "discriminator_ch": 16, **NETWORK},
    ),
}


NAMES = [pytest.param(name, marks=pytest.mark.slow) if name == "perceptual" else name for name in TASKS]


def make_task(name: str, device: str = "meta") -> Any:
    kind, arguments = TASKS[name]
    torch.manual_seed(0)
    with torch.device(device):
        return kind(**arguments)


def real_task(name: str) -> Any:
    """On the CPU, its codes taken as set."""
    task = make_task(name, "cpu")
    if isinstance(task, TokenizerTask):
        task.load_perceptual()
        task.adversarial_start = 0.0
    codebook = task.vae.codebook if isinstance(task, FVARTask) else task.tokenizer.codebook
    codebook.updates.fill_(2**40)
    return task


def data() -> ImageDataModule:
    return ImageDataModule(image_size=SCHEDULE.image_size, schedule=SCHEDULE)


def real_batch() -> Any:
    side = SCHEDULE.image_size
    pixels = torch.randint(256, (BATCH, 3, side, side), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return data().on_after_batch_transfer([pixels, torch.arange(BATCH)], 0)


def tokens_of(task: Any, batch: Any) -> Any:
    """What the task's losses take."""
    return task.tokens(batch) if isinstance(task, FVARTask) else batch


def kept_by(task: Any, batch: Any) -> int:
    """Bytes that a forward pass keeps."""
    inputs, generator = tokens_of(task, batch), torch.Generator("cpu").manual_seed(0)
    return saved_bytes(lambda: task.losses(inputs, generator)["loss"], *networks_of(task))


def networks_of(task: Any) -> list[Any]:
    return [task, *getattr(task, "_perceptual", [])]


def flatten(batch: Any) -> list[Tensor]:
    return [batch] if isinstance(batch, Tensor) else [x for part in batch for x in flatten(part)]


@cache
def planned_cost(name: str, dtype: torch.dtype | None) -> Cost:
    return step_cost(make_task(name), data(), BATCH, dtype)


@pytest.mark.parametrize("name", NAMES)
def test_cost_is_that_of_a_real_step(name: str) -> None:
    planned = planned_cost(name, None)
    task, batch = real_task(name), real_batch()
    # torch counts no fused attention on CPUs
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        loss = task.losses(tokens_of(task, batch), torch.Generator().manual_seed(0))["loss"]
        loss.backward()
    assert planned.flops + planned.frozen_flops == pytest.approx(counter.get_total_flops(), rel=0.03)
    assert (planned.frozen_flops > 0) == isinstance(task, FVARTask)
    assert planned.half_weights == 0
    assert planned.kept == pytest.approx(kept_by(task, batch), rel=0.02)

    optimizer = task.optimizer_factory(task.parameters_to_train())
    optimizer.step()
    states = [x for state in optimizer.state.values() for x in state.values() if x.dim()]
    assert planned.states == sum(x.nbytes for x in states)
    views = {x.untyped_storage().data_ptr(): x.nbytes for x in flatten(batch) if x.is_floating_point()}
    # and the transfer functions of the blur
    assert sum(views.values()) < planned.batch < 1.2 * sum(views.values())


@pytest.mark.parametrize("name", ["stage 2", "recomputed"])
def test_half_precision_keeps_what_a_real_step_keeps(name: str) -> None:
    planned = planned_cost(name, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        kept = kept_by(real_task(name), real_batch())
    assert planned.kept + planned.half_weights == pytest.approx(kept, rel=0.02)
    # those of recomputed blocks are not kept
    part = planned.half_weights / (planned.states / 4)
    assert part < 0.1 if name == "recomputed" else part > 0.5


class Fused(TorchFunctionMode):
    """Without a GPU torch chooses unfused attention for tensors that claim to be on one."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return torch.ops.aten._scaled_dot_product_flash_attention(*args, **(kwargs or {}))[0]
        return func(*args, **(kwargs or {}))


@contextmanager
def cuda_autocast() -> Iterator[None]:
    """`torch.autocast("cuda", torch.bfloat16)`, which without a GPU does nothing."""
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.set_autocast_enabled("cuda", True)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        torch.autocast_decrement_nesting()
        torch.clear_autocast_cache()
        torch.set_autocast_enabled("cuda", False)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "adversarial"])
def test_half_precision_keeps_what_cudas_autocast_keeps(name: str) -> None:
    planned = planned_cost(name, torch.bfloat16)
    task = make_task(name)
    task.eval()
    if isinstance(task, TokenizerTask):
        task.load_perceptual()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
        for network in networks_of(task):
            network.to_empty(device="cuda")
        if not isinstance(task, FVARTask):
            task.tokenizer.codebook.updates = torch.tensor(2**40, device="cpu")
        side = SCHEDULE.image_size
        pixels, labels = torch.empty(BATCH, 3, side, side, dtype=torch.uint8), torch.zeros(BATCH, dtype=torch.long)
        batch = data().on_after_batch_transfer([pixels, labels], 0)
        with cuda_autocast(), Fused():
            kept = kept_by(task, batch)
    assert planned.kept + planned.half_weights == pytest.approx(kept, rel=0.01)


def test_a_meter_counts_what_lives() -> None:
    x, weight = torch.empty(3, 5, device="meta"), torch.empty(7, 5, device="meta", requires_grad=True)
    with Meter([weight]) as meter:
        hidden = F.linear(x, weight)  # 3 x 7, of which exp keeps the result
        assert (meter.live, meter.found, meter.flops) == (4 * 21, 4 * 15, 2 * 105)
        result = hidden.exp()
        assert meter.live == 2 * 4 * 21
        del hidden
        assert meter.live == 4 * 21
        assert result.t()[:2].view(2, 3).numel() == 6
        assert meter.live == 4 * 21
        backward(result.sum())
        assert meter.flops == 2 * 2 * 105
    # the result, its gradient and that of hidden; then the weight's
    assert meter.peak >= 3 * 4 * 21
    del result
    assert meter.live == 4 * 35


def test_a_transformers_work_is_that_of_its_formula() -> None:
    with torch.device("meta"):
        var = VAR(vocab_size=4096, depth=16)
    width, length, images = var.width, var.layout.length, 2
    with Meter([*var.parameters(), *var.buffers()]) as meter, LikeCUDA(), torch.device("meta"):
        logits = var(torch.zeros(images, dtype=torch.long), torch.empty(images, length - 1, 32))
        forward = meter.flops
        backward(logits.sum())
    read = sum(n * n * sum(m * m for m in var.layout.patch_nums[: s + 1]) for s, n in enumerate(var.layout.patch_nums))
    a_block = 2 * 12 * width**2 * length + 4 * width * read + 2 * 6 * width**2
    expected = images * (16 * a_block + 2 * length * width * 4096)
    assert forward == pytest.approx(expected, rel=0.01)
    assert meter.flops == pytest.approx(3 * expected, rel=0.1)


def plan(*args: str) -> Plan:
    planner = Planner()
    return planner.plan(planner.parser.parse_args([*args]))


SMALL = [
    f"--config={configs() / 'fvar_d12_256.yaml'}", "--model.depth=2", "--model.width=64", "--data.batch_size=4",
    "--data.schedule.patch_nums=[1,2,4]", "--data.schedule.patch_size=8", "--data.image_size=32",
    "--data.schedule.max_radius=3.0", "--data.schedule.focus_states=3",
    f"--structure={configs() / 'quickstart/structure.yaml'}",
    f"--alias={configs() / 'quickstart/alias.yaml'}",
]  # fmt: skip


@pytest.fixture(scope="module")
def small() -> Plan:
    return plan(*SMALL, f"--config={configs() / 'trainer/ddp_bf16.yaml'}", "--trainer.accumulate_grad_batches=2")


def test_a_plan_tells_the_run(small: Plan) -> None:
    assert (small.gpus, small.strategy, small.precision, small.tokens) == (8, "ddp", "bf16-mixed", 21)
    assert small.global_batch == 64
    assert small.steps == 80 * -(-(1_281_167 // 32) // 2)
    work = 4 * (small.flops + 2 * small.frozen_flops) * small.steps * 2
    assert small.seconds == pytest.approx(work / (0.4 * 312e12))
    assert small.fits
    assert small.notes == [
        "checkpoints/structure.ckpt is not there: as quickstart/structure.yaml makes it",
        "checkpoints/alias.ckpt is not there: as quickstart/alias.yaml makes it",
    ]
    with torch.device("meta"):
        student = VAR((1, 2, 4), vocab_size=512, z_channels=16, depth=2, width=64)
    assert small.parameters["student"] == sum(p.numel() for p in student.parameters())
    trained = 4 * (small.parameters["student"] + small.parameters["teacher"])
    for part in ("weights", "gradients", "gradient buckets"):
        assert small.memory[part] == trained
    assert small.memory["optimiser"] == 2 * trained
    frozen = 4 * sum(count for name, count in small.parameters.items() if name.endswith(", frozen"))
    # and the statistics of the codebooks
    assert frozen < small.memory["frozen networks"] < 1.1 * frozen


def test_shards_and_averages_count(small: Plan) -> None:
    shared = plan(*SMALL, f"--config={configs() / 'trainer/fsdp2_bf16.yaml'}")
    assert shared.strategy == "fsdp2"
    assert "half-precision weights" not in shared.memory
    assert "gradient buckets" not in shared.memory
    for part in ("weights", "gradients", "optimiser"):
        assert shared.memory[part] == small.memory[part] // 8
    averaged = plan(*SMALL, f"--config={configs() / 'trainer/ema.yaml'}", "--gpus=1")
    assert averaged.strategy == "single"
    whole = averaged.memory["weights"] + averaged.memory["frozen networks"]
    assert averaged.memory["averaged weights"] == pytest.approx(whole, rel=1e-4)


def test_the_largest_batch_is_the_largest() -> None:
    task = make_task("alias")
    layout = Layout(1, "single", half=True)

    def total(images: int) -> int:
        return sum(memory(task, step_cost(task, data(), images, torch.bfloat16), layout).values())

    available = 2**28
    most = largest_batch(total, 0, 4, available)
    assert total(most) <= available * 1.01
    assert total(round(1.03 * most)) > available
    assert largest_batch(total, 0, 4, 2**20) == 0


def test_command(small: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    shown = text(small, Assumptions())
    assert "21 tokens an image" in shown
    assert "72.00   80 less 10% in reserve" in shown
    assert f"fits; the largest batch that does: {small.largest_batch}" in shown
    run(["plan", *SMALL, "--memory=0.01", "--gpus=4", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["gpus"] == 4
    assert found["largest_batch"] < found["batch_size"]
    assert "does not fit" in text(Plan(**found), Assumptions(memory=0.01))


def test_what_cannot_be_planned_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(["plan", *SMALL, "--trainer.precision=bf16-true"])
    assert "trainer.precision must be one of" in capsys.readouterr().err


def whole_configurations() -> list[str]:
    names = sorted(path.relative_to(configs()).as_posix() for path in configs().rglob("*.yaml"))
    contents = {name: yaml.safe_load((configs() / name).read_text()) for name in names}
    # the last writes tokens and trains nothing
    return [name for name in names if {"data", "model", "trainer"} <= set(contents[name]) and "tokens" not in name]


@pytest.mark.slow
@pytest.mark.parametrize("name", whole_configurations())
def test_every_configuration_is_planned(name: str) -> None:
    stand_ins = ["quickstart/structure.yaml", "quickstart/alias.yaml"] if "quickstart" in name else []
    if "official" in name:
        stand_ins = ["tokenizer/structure_var.yaml"]
    options = [f"--{kind}={configs() / x}" for kind, x in zip(("structure", "alias"), stand_ins, strict=False)]
    made = plan(f"--config={configs() / name}", f"--config={configs() / 'trainer/ddp_bf16.yaml'}", *options)
    assert made.flops > 0
    assert made.seconds > 0
    assert made.largest_batch > 0
    depth = name.removeprefix("fvar_d").split("_")[0]
    if depth.isdigit():
        # blocks of VAR: 18 C^2 parameters, 12 C^2 with shared AdaLN
        assert made.parameters["student"] == pytest.approx(
            (12 if depth == "36" else 18) * 4096 * int(depth) ** 3, rel=0.2
        )

"""Sharding and compiling, in one process: the same networks, the same gradients. Two processes: test_distributed.py."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, distributed, nn
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from fvar_lightning.tasks.sharding import Networks, blocks, build_sharded, gathered, mixed_precision
from fvar_lightning.tasks.training import compile_each
from fvar_lightning.transformer.losses import feature_loss, token_losses
from fvar_lightning.transformer.teacher import HighFrequencyTeacher
from fvar_lightning.transformer.var import VAR

BATCH = 3


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    distributed.init_process_group("gloo", rank=0, world_size=1, store=distributed.HashStore())
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def build(trunk: str = "shared", compiled: bool = False, **options: object) -> Networks:
    torch.manual_seed(0)
    student = VAR((1, 2, 3), vocab_size=12, z_channels=4, num_classes=5, depth=4, width=32, heads=2, **options)
    teacher = HighFrequencyTeacher(student, alias_channels=6, alias_blocks=2, trunk=trunk)
    for parameter in (*student.parameters(), *teacher.parameters()):  # branches and cross-attention start closed
        nn.init.normal_(parameter, std=0.2)
    if compiled:
        for block in blocks(student, teacher):
            block.compile(backend="aot_eager")
    return student, teacher


def step(student: VAR, teacher: HighFrequencyTeacher) -> list[Tensor]:
    """Gradients of a step as `FVARTask` makes it."""
    generator = torch.Generator().manual_seed(1)
    labels, targets = torch.arange(BATCH), torch.randint(12, (BATCH, 14), generator=generator)
    inputs = torch.randn(BATCH, 13, 4, generator=generator)
    alias = torch.randn(BATCH, 14, 6, generator=generator)
    keep = student.keep_masks(BATCH, generator)
    trace = student.trace(labels, inputs, keep)
    taught = teacher(student, trace, labels, inputs, alias, keep)
    losses = token_losses(targets, student.readout(trace.hidden[-1], trace.condition), taught.readout)
    (losses.sum() + feature_loss(trace.hidden[-1:], taught.hidden[-1:])).backward()
    found = [p.grad for network in (student, teacher) for p in network.parameters() if p.grad is not None]
    return [g.full_tensor() if isinstance(g, DTensor) else g for g in found]


@pytest.mark.parametrize(
    ("trunk", "compiled", "recompute"),
    [
        ("shared", False, False),
        ("detached", False, False),
        ("separate", False, True),
        ("shared", True, True),
        ("separate", True, False),
    ],
)
def test_shards_have_the_gradients_of_the_whole(trunk: str, compiled: bool, recompute: bool, mesh: DeviceMesh) -> None:
    """Recomputed blocks gather their weights for the backward pass; compiled ones make two graphs, at any depth."""
    options = {"trunk": trunk, "drop_path_rate": 0.3, "shared_aln": True}
    expected = step(*build(**options))
    torch._dynamo.reset()
    counters.clear()
    networks = build_sharded(
        lambda: build(**options, compiled=compiled, recompute=recompute), mesh, mixed_precision("32-true")
    )
    found = step(*networks)
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    assert counters["stats"]["unique_graphs"] == (2 if compiled else 0)
    assert not counters["graph_break"]


def test_networks_of_the_meta_device_get_everything_from_the_first_process(mesh: DeviceMesh) -> None:
    whole, shards = build("separate"), build_sharded(lambda: build("separate"), mesh, mixed_precision("bf16-mixed"))
    for expected, found in zip(whole, shards, strict=True):
        assert all(isinstance(p, DTensor) and p.dtype == torch.float32 for p in found.parameters())
        state = found.state_dict()
        assert state.keys() == expected.state_dict().keys()
        for name, tensor in expected.state_dict().items():
            own = state[name]
            assert torch.equal(own.full_tensor() if isinstance(own, DTensor) else own, tensor), name
        assert torch.equal(found.level_ids, expected.level_ids)
    assert torch.equal(shards[1].network.level_ids, whole[1].network.level_ids)
    for _ in range(2):
        with gathered(shards[0]):
            assert shards[0].head.weight.dtype == torch.bfloat16
            assert torch.is_autocast_enabled("cpu")
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            shards[0].trace(torch.arange(BATCH), torch.randn(BATCH, 13, 4), None)  # as a validation leaves it


def test_compiling_leaves_the_names_of_weights_alone() -> None:
    for network, compiled in zip(build("separate"), build("separate", compiled=True), strict=True):
        assert network.state_dict().keys() == compiled.state_dict().keys()


def test_half_precision_with_a_scaler_is_refused() -> None:
    with pytest.raises(ValueError, match="precision must be one of 32-true, bf16-mixed, bf16-true"):
        mixed_precision("16-mixed")


def test_one_graph_serves_all_sizes_under_ddp(mesh: DeviceMesh) -> None:
    """Ten views would exceed dynamo's limit of eight graphs, after which nothing is compiled."""
    torch.compiler.reset()
    encoder = nn.Sequential(nn.Conv2d(3, 600, 1), nn.SiLU(), nn.Conv2d(600, 600, 1), nn.SiLU(), nn.Conv2d(600, 600, 1))
    graphs = []

    def remember(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    compile_each([encoder], dynamic=True, backend=remember)
    shared = nn.parallel.DistributedDataParallel(encoder)
    for side in range(4, 14):
        shared(torch.randn(2, 3, side, side)).sum().backward()
    assert len(graphs) == 1

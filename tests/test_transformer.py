"""VAR, its cache, the teacher, and sampling."""

import copy

import pytest
import torch
from torch import Tensor

from fvar_lightning.generation.sampling import Noise, generate, generate_stages, guidance_scales, sample, truncate
from fvar_lightning.schedule import FocusSchedule
from fvar_lightning.tokenizer.vqvae import VQVAE
from fvar_lightning.transformer.layers import KVCache, block_causal_attention
from fvar_lightning.transformer.teacher import HighFrequencyTeacher
from fvar_lightning.transformer.var import VAR

LAYOUT = FocusSchedule((1, 2, 3), patch_size=4, focus_states=2)
KINDS = [{}, {"shared_aln": True}, {"attn_l2_norm": False}]


def make_var(**kwargs: object) -> VAR:
    var = VAR(LAYOUT.patch_nums, vocab_size=12, z_channels=4, num_classes=5, depth=3, width=32, heads=2, **kwargs)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # open the branches, which start almost closed
        for parameter in var.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return var.eval()


@pytest.fixture
def vae() -> VQVAE:
    return VQVAE(LAYOUT, vocab_size=12, z_channels=4, ch=16, ch_mult=(1, 1, 2), num_res_blocks=1).eval()


def make_batch(requires_grad: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(2, 13, 4, generator=generator, requires_grad=requires_grad)
    alias = torch.randn(2, 14, 6, generator=generator, requires_grad=requires_grad)
    return torch.tensor([0, 3]), inputs, alias


def test_attention_per_scale_equals_one_masked_call() -> None:
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(3, 2, 2, 14, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    wanted = torch.randn(2, 2, 14, 8, generator=generator, dtype=torch.float64)
    mask = LAYOUT.block_causal_mask()
    expected = torch.nn.functional.scaled_dot_product_attention(*qkv, attn_mask=mask, scale=0.3)
    found = torch.cat(block_causal_attention(*qkv, LAYOUT.slices, 0.3), dim=2)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(x, qkv, wanted)[0] for x in (found, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("kind", KINDS)
def test_later_scales_never_change_earlier_logits(kind: dict[str, bool]) -> None:
    labels, inputs, _ = make_batch(requires_grad=True)
    logits = make_var(**kind)(labels, inputs)
    for s, rows in enumerate(LAYOUT.slices):
        (gradient,) = torch.autograd.grad(logits[:, rows].square().sum(), inputs, retain_graph=True, allow_unused=True)
        # the inputs begin with the second scale's
        own, later = rows.stop - 1, gradient[:, rows.stop - 1 :]
        assert not later.any()
        if s > 0:
            assert gradient[:, :own].abs().sum(dim=(0, 2)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_cached_equals_uncached(kind: dict[str, bool]) -> None:
    var = make_var(**kind).double()
    labels, inputs, _ = make_batch()
    expected = var(labels, inputs.double())
    condition = var.condition(labels)
    tokens = var.embed(condition, inputs.double())
    cache = KVCache(var.depth, LAYOUT.length)
    modulations = var.modulations(condition)
    for rows in LAYOUT.slices:
        logits = var.logits(var.step(tokens[:, rows], modulations, cache), condition)
        torch.testing.assert_close(logits, expected[:, rows])


@pytest.mark.parametrize("shared_aln", [False, True])
def test_branches_start_open_by_the_initial_gain(shared_aln: bool) -> None:
    var = VAR((1,), vocab_size=4, num_classes=2, depth=1, width=64, shared_aln=shared_aln, initial_gain=1e-3)
    block = var.blocks[0]
    weight = block.ada_gss[0, 0] if shared_aln else block.ada_lin[1].weight.unflatten(0, (6, 64))
    drawn = 1 / 64**0.5 if shared_aln else 1 / (3 * 64) ** 0.5
    found = weight.flatten(1).std(1) / drawn
    torch.testing.assert_close(found.detach(), torch.tensor([1e-3] * 2 + [0.5] * 4), rtol=0.35, atol=0)


def test_masks_of_stochastic_depth_keep_the_mean() -> None:
    var = make_var(drop_path_rate=0.6)
    keep = var.keep_masks(20000, torch.Generator().manual_seed(0))
    assert keep.shape == (3, 20000, 2)
    for rate, mask in zip((0.0, 0.3, 0.6), keep, strict=True):
        assert set(mask.unique().tolist()) <= {0.0, torch.tensor(1 / (1 - rate)).item()}
        torch.testing.assert_close(mask.mean(0), torch.ones(2), atol=0.03, rtol=0)
    together = (keep[2] == 0).all(dim=1).float().mean().item()
    assert together == pytest.approx(0.36, abs=0.02)  # branches are dropped independently


def test_a_sample_skips_the_branches_its_mask_says() -> None:
    """Against a network in which these branches are closed by hand."""
    var = make_var().double()
    labels, inputs, _ = make_batch()
    keep = torch.tensor([[[1, 0], [1, 1]], [[0, 2], [1, 1]], [[1, 1], [1, 1]]], dtype=torch.float64)
    closed = copy.deepcopy(var)
    with torch.no_grad():
        for i, branch, factor in ((0, 1, 0), (1, 0, 0), (1, 1, 2)):
            width = slice(branch * 32, branch * 32 + 32)
            closed.blocks[i].ada_lin[1].weight[width] *= factor
            closed.blocks[i].ada_lin[1].bias[width] *= factor
    found = var(labels, inputs.double(), keep)
    torch.testing.assert_close(found[:1], closed(labels[:1], inputs[:1].double()))
    torch.testing.assert_close(found[1:], var(labels[1:], inputs[1:].double()))


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_var_refuses_drop_rates(rate: float) -> None:
    with pytest.raises(ValueError, match=rf"drop_path_rate must lie in \[0, 1\), got {rate}"):
        make_var(drop_path_rate=rate)


@pytest.mark.parametrize("trunk", ["shared", "detached", "separate"])
@pytest.mark.parametrize("kind", KINDS)
def test_teacher_starts_as_the_student(kind: dict[str, bool], trunk: str) -> None:
    var = make_var(**kind)
    labels, inputs, alias = make_batch()
    trace = var.trace(labels, inputs)
    teacher = HighFrequencyTeacher(var, alias_channels=6, trunk=trunk).eval()
    taught = teacher(var, trace, labels, inputs, alias)
    assert torch.equal(taught.readout.logits(), var(labels, inputs))
    assert torch.equal(taught.hidden[-1], trace.hidden[-1])
    assert len(taught.hidden) == 2


@pytest.mark.parametrize("context", ["causal", "own_scale", "next", "all"])
@pytest.mark.parametrize(("scales", "sharp"), [(1, 0), (3, 0), (2, 1), (3, 2)])
def test_which_alias_tokens_a_scale_reads(context: str, scales: int, sharp: int) -> None:
    """None of sharp scales, whose residual is zero; own scale only, these scales read nothing at all."""
    var = make_var()
    labels, inputs, alias = make_batch(requires_grad=True)
    teacher = HighFrequencyTeacher(
        var,
        alias_channels=6,
        alias_blocks=1,
        alias_context=context,
        alias_scales=scales,
        trunk="separate",
        sharp_scales=sharp,
    )
    for block in teacher.blocks:
        torch.nn.init.normal_(block.cross.proj.weight)
    logits = teacher(var, var.trace(labels, inputs), labels, inputs, alias).readout.logits()
    for s, rows in enumerate(LAYOUT.slices):
        (gradient,) = torch.autograd.grad(logits[:, rows].square().sum(), alias, retain_graph=True, allow_unused=True)
        read = gradient.abs().sum(dim=(0, 2)) > 0
        expected = torch.zeros(LAYOUT.length, dtype=torch.bool)
        if s >= LAYOUT.num_scales - scales:
            stop = {"next": LAYOUT.slices[min(s + 1, 2)].stop, "all": LAYOUT.length}.get(context, rows.stop)
            expected[rows.start if context == "own_scale" else 0 : stop] = True
            expected[LAYOUT.slices[LAYOUT.num_scales - sharp].start if sharp else LAYOUT.length :] = False
        assert torch.equal(read, expected)


def test_shared_trunk_doubles_only_the_last_blocks() -> None:
    var = make_var()
    shared = HighFrequencyTeacher(var, alias_channels=6, alias_blocks=2)
    own = sum(p.numel() for block in shared.blocks for p in block.block.parameters())
    assert own == sum(p.numel() for block in var.blocks[-2:] for p in block.parameters())
    assert not any(name.startswith("network") for name, _ in shared.named_parameters())


@pytest.mark.parametrize(
    ("argument", "value"),
    [("alias_blocks", 4), ("alias_scales", 0), ("alias_context", "window"), ("trunk", "double"), ("sharp_scales", 3)],
)
def test_teacher_refuses(argument: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{argument} must .*{value}"):
        HighFrequencyTeacher(make_var(), alias_channels=6, **{argument: value})


def test_var_initialisation_is_nearly_the_identity() -> None:
    """VAR's table of initial values: branches almost closed, small classifier."""
    var = VAR(LAYOUT.patch_nums, vocab_size=12, z_channels=4, num_classes=5, depth=4, width=64, heads=1)
    std = (1 / (3 * 64)) ** 0.5
    var.requires_grad_(False)
    assert var.word_embed.weight.std() == pytest.approx(std, rel=0.15)
    assert var.blocks[0].ffn.fc1.weight.std() == pytest.approx(std, rel=0.05)
    assert var.blocks[0].ffn.fc2.weight.std() == pytest.approx(std / 8**0.5, rel=0.05)
    gains, rest = var.blocks[0].ada_lin[1].weight.split([128, 256])
    assert gains.std() == pytest.approx(std * 1e-5, rel=0.05)
    assert rest.std() == pytest.approx(std * 0.5, rel=0.05)
    assert var.head.weight.std() == pytest.approx(std * 0.02, rel=0.1)
    assert not var.head.bias.any()


@pytest.mark.parametrize("options", [{}, {"guidance": 0.0}, {"top_k": 3}, {"top_p": 0.5}, {"more_smooth": True}])
def test_seeded_images_do_not_depend_on_the_batch(options: dict[str, float], vae: VQVAE) -> None:
    var, vae = make_var().double(), vae.double()
    labels = torch.tensor([0, 1, 4, 5])
    together = generate(var, vae, labels, seeds=[3, 4, 5, 6], **options)
    for i in range(4):
        alone = generate(var, vae, labels[i : i + 1], seeds=[3 + i], **options)
        torch.testing.assert_close(alone[0], together[i], atol=1e-9, rtol=0)
    assert together.shape == (4, 3, 12, 12)
    assert not torch.equal(together, generate(var, vae, labels, seeds=[7, 8, 9, 10], **options))


def test_draws_follow_the_probabilities() -> None:
    p = torch.tensor([0.5, 0.3, 0.15, 0.05]).expand(1, 20000, 4)
    noise = Noise(1, p.device, [0], None).like(p)
    frequencies = (p / noise).argmax(-1)[0].bincount(minlength=4) / 20000
    torch.testing.assert_close(frequencies, p[0, 0], atol=0.015, rtol=0)


def test_one_generator_draws_as_multinomial() -> None:
    p = torch.rand(3, 5, 12, generator=torch.Generator().manual_seed(0)).softmax(-1)
    ours = (p / Noise(3, p.device, None, torch.Generator().manual_seed(9)).like(p)).argmax(-1)
    theirs = torch.multinomial(p.view(-1, 12), 1, generator=torch.Generator().manual_seed(9)).view(3, 5)
    assert torch.equal(ours, theirs)


def test_truncation_by_hand() -> None:
    logits = torch.tensor([[[0.5, 0.3, 0.15, 0.05]]]).log()
    assert torch.isfinite(truncate(logits, 2, 0.0))[0, 0].tolist() == [True, True, False, False]
    assert torch.isfinite(truncate(logits, 0, 0.6))[0, 0].tolist() == [True, True, False, False]
    assert torch.isfinite(truncate(logits, 0, 0.4))[0, 0].tolist() == [True, False, False, False]
    # of the best three, renormalised, 0.95 / 0.95: all are needed for 0.9
    assert torch.isfinite(truncate(logits, 3, 0.9))[0, 0].tolist() == [True, True, True, False]
    assert torch.equal(truncate(logits, 0, 0.0), logits)


def test_guidance_mixes_logits(vae: VQVAE) -> None:
    """Greedy tokens of a guided run are those of (1 + t) cond - t uncond computed from two plain passes."""
    var = make_var().double()
    vae = copy.deepcopy(vae).double()
    strengths = [0.7, 0.2, 1.1]
    chosen: list[Tensor] = []
    label = torch.tensor([2])

    def remember(s: int, f_hat: Tensor, indices: Tensor) -> Tensor:
        chosen.append(indices)
        return indices

    generate(var, vae, label, guidance=strengths, top_k=1, seeds=[0], revise=remember)
    inputs = vae.var_inputs(chosen)
    conditional, free = var(label, inputs), var(torch.tensor([5]), inputs)
    for t, rows, tokens in zip(strengths, LAYOUT.slices, chosen, strict=True):
        mixed = (1 + t) * conditional[:, rows] - t * free[:, rows]
        assert torch.equal(mixed.argmax(-1), tokens)


@pytest.mark.parametrize("kind", KINDS)
def test_guidance_that_stops_drops_the_unconditional_half(kind: dict[str, bool], vae: VQVAE) -> None:
    """Against a strength too small to change a number, which computes both halves to the end."""
    var, vae = make_var(**kind).double(), copy.deepcopy(vae).double()
    labels, tokens, rows = torch.tensor([0, 3, 5]), [], []
    var.blocks[-1].ffn.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))

    def remember(s: int, f_hat: Tensor, indices: Tensor) -> Tensor:
        tokens.append(indices)
        return torch.full_like(indices, -1)

    def made(strengths: list[float]) -> tuple[Tensor, Tensor, list[int]]:
        tokens.clear()
        rows.clear()
        images = generate(var, vae, labels, guidance=strengths, seeds=[1, 2, 3], revise=remember)
        return images, torch.cat(tokens, dim=1), list(rows)

    for strengths, counts in (
        ([2.0, 0.0, 0.0], [6, 3, 3]),
        ([0.0, 2.0, 0.0], [6, 6, 3]),
        ([2.0, 0.0, 2.0], [6, 6, 6]),
        ([0.0, 0.0, 0.0], [3, 3, 3]),
    ):
        images, drawn, seen = made(strengths)
        assert seen == counts
        expected, expected_drawn, both = made([t or 1e-300 for t in strengths])
        assert both == [6, 6, 6]
        assert torch.equal(drawn, expected_drawn)
        torch.testing.assert_close(images, expected, rtol=0, atol=1e-10)


def test_a_cache_keeps_the_first_samples_and_frees_the_others() -> None:
    cache = KVCache(depth=2, length=5)
    k, v = torch.randn(2, 4, 2, 5, 3, generator=torch.Generator().manual_seed(0))
    cache.append(0, k[:, :, :3], v[:, :, :3])
    cache.keep(1)
    for found, expected in zip(cache.append(0, k[:1, :, 3:], v[:1, :, 3:]), (k, v), strict=True):
        assert torch.equal(found, expected[:1])
        assert found.untyped_storage().nbytes() == expected[:1].nbytes


def test_stages_end_in_the_image(vae: VQVAE) -> None:
    var, labels = make_var(), torch.tensor([0, 1])
    stages = generate_stages(var, vae, labels, seeds=[1, 2])
    assert len(stages) == 3
    assert torch.equal(stages[-1], generate(var, vae, labels, seeds=[1, 2]))


def test_no_labels_are_sampled_to_nothing(vae: VQVAE) -> None:
    nobody = torch.zeros(0, dtype=torch.long)
    assert generate(make_var(), vae, nobody).shape == (0, 3, vae.schedule.image_size, vae.schedule.image_size)
    stages = sample(make_var(), vae, nobody, seeds=[])
    assert [f_hat.shape for f_hat in stages] == [(0, 4, 3, 3)] * 3


@pytest.mark.parametrize("weights", [torch.float64, torch.float32, torch.bfloat16])
def test_f_hat_has_one_dtype_at_every_scale(weights: torch.dtype, vae: VQVAE) -> None:
    read = []

    def remember(s: int, f_hat: Tensor, indices: Tensor) -> Tensor:
        read.append(f_hat.dtype)
        return indices

    var, vae = make_var().to(weights), copy.deepcopy(vae).to(weights)
    made = [f.dtype for f in sample(var, vae, torch.tensor([0]), seeds=[0], revise=remember)]
    wanted = torch.float64 if weights == torch.float64 else torch.float32
    assert set(read + made) == {wanted}


def test_guidance_ramp_is_vars() -> None:
    assert guidance_scales(1.5, 4) == [0.0, 0.5, 1.0, 1.5]
    assert guidance_scales([1, 2], 2) == [1.0, 2.0]
    assert guidance_scales(1.5, 1) == [1.5], "the last scale of one"


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("labels must lie in 0..5 .* got 6", {"labels": torch.tensor([6])}),
        ("labels must be a 1-d int64", {"labels": torch.tensor([[0]])}),
        ("guidance must be .* got -1", {"guidance": -1}),
        ("guidance must hold one strength for each of the 3 scales, got", {"guidance": [1.0]}),
        ("guidance must be .* got nan", {"guidance": float("nan")}),
        ("guidance must be .* got inf", {"guidance": float("inf")}),
        ("guidance must be .* got 'strong'", {"guidance": "strong"}),
        ("guidance must be .* got None", {"guidance": None}),
        ("top_k must be .* got -2", {"top_k": -2}),
        ("top_p must lie in .* got 1.5", {"top_p": 1.5}),
        ("top_p must lie in .* got nan", {"top_p": float("nan")}),
        ("seeds must hold one per image", {"seeds": [1, 2]}),
        ("seeds or a generator, not both", {"seeds": [1], "generator": torch.Generator()}),
    ],
)
def test_generate_refuses(message: str, options: dict[str, object], vae: VQVAE) -> None:
    arguments = {"labels": torch.tensor([0])} | options
    with pytest.raises(ValueError, match=message):
        generate(make_var(), vae, **arguments)


def test_generate_refuses_a_foreign_tokenizer(vae: VQVAE) -> None:
    other = VAR(LAYOUT.patch_nums, vocab_size=13, z_channels=4, num_classes=5, depth=1, width=32, heads=2)
    with pytest.raises(ValueError, match=r"vocab_size .* 13 and 12"):
        generate(other, vae, torch.tensor([0]))

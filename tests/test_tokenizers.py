"""Autoencoder, codebook, quantiser, VQVAE and alias tokenizer."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from fvar_lightning.metrics.tokenizer import CodebookUsage, SignalToNoise, perplexity
from fvar_lightning.schedule import FocusSchedule
from fvar_lightning.tokenizer.alias import AliasTokenizer
from fvar_lightning.tokenizer.codebook import Codebook
from fvar_lightning.tokenizer.quantizer import MultiScaleQuantizer
from fvar_lightning.tokenizer.vqvae import VQVAE

SCHEDULE = FocusSchedule((1, 2, 4), patch_size=4, focus_states=2)
SMALL = {"vocab_size": 16, "z_channels": 8, "ch": 16, "ch_mult": (1, 1, 2), "num_res_blocks": 1}


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def images(n: int, generator: torch.Generator) -> Tensor:
    return torch.rand(n, 3, 16, 16, generator=generator) * 2 - 1


def inputs(targets: str, x: Tensor) -> Tensor | list[Tensor]:
    if targets == "feature":
        return x
    if targets == "full":
        return [F.avg_pool2d(x, 3, 1, 1), x]
    return [F.interpolate(x, size=n) for n in SCHEDULE.view_sizes]


@pytest.mark.parametrize("targets", ["view", "full", "feature"])
def test_encode_decode_shapes_and_training_agrees_with_encoding(targets: str, generator: torch.Generator) -> None:
    vae = VQVAE(SCHEDULE, targets=targets, **SMALL).eval()
    vae.codebook.step()  # or its codes would count as not set yet
    x = inputs(targets, images(3, generator))
    indices = vae.encode(x)
    assert [i.shape for i in indices] == [(3, 1), (3, 4), (3, 16)]
    quantized = vae(x)
    for a, b in zip(indices, quantized.indices, strict=True):
        assert torch.equal(a, b)
    stages = vae.quantizer.stages(indices)
    for a, b in zip(stages, quantized.stages, strict=True):
        torch.testing.assert_close(a, b)
    image = vae.decode(indices)
    assert image.shape == (3, 3, 16, 16)
    assert image.abs().max() <= 1
    torch.testing.assert_close(vae.decode_stages(indices)[-1], image)
    assert vae.var_inputs(indices).shape == (3, 4 + 16, 8)


def test_wrong_inputs_are_named(generator: torch.Generator) -> None:
    x = images(2, generator)
    with pytest.raises(ValueError, match="'view' takes a list of 3 tensors, got one tensor"):
        VQVAE(SCHEDULE, **SMALL).encode(x)
    with pytest.raises(ValueError, match="'full' takes a list of 2 tensors, got 1"):
        VQVAE(SCHEDULE, targets="full", **SMALL).encode([x])
    with pytest.raises(ValueError, match="targets must be one of"):
        VQVAE(SCHEDULE, targets="focus", **SMALL)
    for targets, weight in (("full", 0.25), ("feature", 0.25), ("view", -1.0)):
        with pytest.raises(ValueError, match=f"sharp_commitment must not be negative.* got {weight} for '{targets}'"):
            VQVAE(SCHEDULE, targets=targets, sharp_commitment=weight, **SMALL)
    with pytest.raises(ValueError, match=r"ch_mult .* down-samples by 2, but patch_size is 4"):
        VQVAE(SCHEDULE, **(SMALL | {"ch_mult": (1, 1)}))


def test_quantiser_against_plain_recursion_in_float64(generator: torch.Generator) -> None:
    """Eq. of VAR section 3.2 written out with explicit distances, one scale at a time."""
    quantizer = MultiScaleQuantizer((1, 2, 4), Codebook(16, 8)).double().eval()
    features = [torch.randn(2, 8, n, n, generator=generator, dtype=torch.float64) for n in (1, 2, 4)]
    codes = quantizer.codebook.embedding.weight
    f_hat = torch.zeros(2, 8, 4, 4, dtype=torch.float64)
    found = quantizer.encode(features)
    for s, z in enumerate(features):
        n = z.shape[-1]
        residual = z - F.adaptive_avg_pool2d(f_hat, n)
        distance = torch.cdist(residual.permute(0, 2, 3, 1).reshape(-1, 8), codes)
        expected = distance.argmin(1).view(2, -1)
        assert torch.equal(found[s], expected)
        code = codes[expected].view(2, n, n, 8).permute(0, 3, 1, 2)
        code = F.interpolate(code, size=(4, 4), mode="bicubic")
        phi = quantizer.phi_of(s)
        f_hat = f_hat + 0.5 * code + 0.5 * F.conv2d(code, phi.weight, phi.bias, padding=1)
    torch.testing.assert_close(quantizer.stages(found)[-1], f_hat, atol=1e-6, rtol=0)


def test_sharp_features_commit_to_every_stage(generator: torch.Generator) -> None:
    """Gradients of the loss by hand: those of the sharp features alone are other than without."""
    quantizer = MultiScaleQuantizer((1, 2, 4), Codebook(16, 8, warmup_steps=0)).double()
    quantizer.codebook.step()
    features = [torch.randn(2, 8, n, n, generator=generator, dtype=torch.float64).requires_grad_() for n in (1, 2, 4)]
    plain = torch.autograd.grad(quantizer(features).loss, features)
    quantizer.sharp_commitment = 0.25
    tied = torch.autograd.grad(quantizer(features).loss, features)
    for before, after in zip(plain[:-1], tied[:-1], strict=True):
        torch.testing.assert_close(after, before)
    sharp, stages = features[-1].detach(), quantizer.stages(quantizer.encode(features))
    added = sum(0.25 * 2 * (sharp - f_hat) / sharp.numel() for f_hat in stages[:-1]) / 3
    torch.testing.assert_close(tied[-1] - plain[-1], added)


@pytest.mark.parametrize(
    ("scales", "count"), [(10, 4), (10, 1), (10, 10), (6, 4), (4, 4), (3, 4), (2, 4), (1, 4), (1, 1)]
)
def test_phi_is_shared_as_in_var(scales: int, count: int) -> None:
    quantizer = MultiScaleQuantizer(range(1, scales + 1), Codebook(4, 2), num_phi=count)
    margin = 1 / 3 / count if count == 4 else 1 / 2 / count
    ticks = np.linspace(margin, 1 - margin, count)
    for s in range(scales):
        expected = int(np.argmin(np.abs(ticks - s / max(scales - 1, 1))))
        assert quantizer.phi_of(s) is quantizer.phi[expected]
    if count <= scales:  # DistributedDataParallel refuses parameters that no scale uses
        assert {id(quantizer.phi_of(s)) for s in range(scales)} == {id(phi) for phi in quantizer.phi}


def test_phi_has_a_default_and_a_least_number() -> None:
    assert [len(MultiScaleQuantizer(range(1, n + 1), Codebook(4, 2)).phi) for n in (1, 3, 4, 10)] == [1, 3, 4, 4]
    with pytest.raises(ValueError, match="num_phi must be at least 1, got 0"):
        MultiScaleQuantizer((1, 2, 4), Codebook(4, 2), num_phi=0)


@pytest.mark.parametrize("targets", ["full", "feature"])
def test_features_of_an_autocast_encoder_are_averaged_in_float32(targets: str, generator: torch.Generator) -> None:
    vae = VQVAE(SCHEDULE, targets=targets, **SMALL).eval().requires_grad_(False)
    x = inputs(targets, images(2, generator))
    with torch.autocast("cpu", torch.bfloat16):
        last = vae.quant_conv(vae.encoder(x if targets == "feature" else x[-1]))
        found = vae.features(x)
    assert last.dtype == torch.bfloat16
    state = slice(0, 3) if targets == "feature" else slice(2, 3)  # scales of the last map
    for z, n in zip(found[state], SCHEDULE.patch_nums[state], strict=True):
        assert z.dtype == torch.float32
        averages = last.double().unfold(2, 4 // n, 4 // n).unfold(3, 4 // n, 4 // n).mean((-1, -2))
        torch.testing.assert_close(z.double(), averages, rtol=0, atol=1e-6)


def test_the_quantiser_adds_up_half_precision_in_float32(generator: torch.Generator) -> None:
    quantizer = MultiScaleQuantizer(SCHEDULE.patch_nums, Codebook(4, 2)).requires_grad_(False)
    f_hat, code = (torch.randn(2, 2, n, n, generator=generator).bfloat16() for n in (4, 2))
    for ours, exact in (
        (quantizer.add(f_hat, code, 1), quantizer.add(f_hat.float(), code.float(), 1)),
        (quantizer.next_input(f_hat, 0), quantizer.next_input(f_hat.float(), 0)),
    ):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, exact)


def test_gradient_passes_straight_through(generator: torch.Generator) -> None:
    quantizer = MultiScaleQuantizer((1, 2, 4), Codebook(16, 8)).eval()
    features = [torch.randn(2, 8, n, n, generator=generator, requires_grad=True) for n in (1, 2, 4)]
    weight = torch.randn(2, 8, 4, 4, generator=generator)
    (quantizer(features).stages[-1] * weight).sum().backward()
    torch.testing.assert_close(features[-1].grad, weight)
    assert features[0].grad is None or not features[0].grad.any()


def test_codebook_follows_clusters(generator: torch.Generator) -> None:
    """Vectors around four far-apart centres: the codes must find the centres' means."""
    centres = torch.tensor([[9.0, 0], [0, 9], [-9, 0], [0, -9]])
    vectors = centres.repeat(64, 1) + 0.1 * torch.randn(256, 2, generator=generator)
    codebook = Codebook(4, 2, decay=0.5)
    codebook.initialise([vectors])
    for _ in range(20):
        codebook.update([vectors], [codebook.nearest(vectors)])
    means = torch.stack([vectors[i::4].mean(0) for i in range(4)])
    order = torch.cdist(means, codebook.embedding.weight).argmin(1)
    assert sorted(order.tolist()) == [0, 1, 2, 3]
    torch.testing.assert_close(codebook.embedding.weight[order], means, atol=1e-4, rtol=0)


def test_idle_codes_are_revived(generator: torch.Generator) -> None:
    vectors = torch.randn(64, 2, generator=generator)
    codebook = Codebook(8, 2, revive_after=3)
    with torch.no_grad():
        codebook.embedding.weight[:4] = vectors[:4]
        codebook.embedding.weight[4:] = 100.0
        codebook.sums.copy_(codebook.embedding.weight)
    for step in range(3):
        assert (codebook.embedding.weight[4:] > 50).all(), step
        codebook.update([vectors], [codebook.nearest(vectors)])
    assert (codebook.embedding.weight.abs() < 10).all()
    assert not codebook.idle[4:].any()


def test_a_code_that_fades_before_it_is_revived_stays_where_it_was(generator: torch.Generator) -> None:
    vectors = torch.randn(64, 2, generator=generator)
    codebook = Codebook(3, 2, decay=0.5, revive_after=1000)
    with torch.no_grad():
        codebook.embedding.weight.copy_(torch.tensor([[1.0, 0], [-1, 0], [100, 50]]))
        codebook.sums.copy_(codebook.embedding.weight)
    for _ in range(200):
        codebook.update([vectors], [codebook.nearest(vectors)])
    torch.testing.assert_close(codebook.embedding.weight[2], torch.tensor([100.0, 50.0]))
    with torch.no_grad():
        codebook.update([vectors + 100], [torch.full((64,), 2)])
    torch.testing.assert_close(codebook.embedding.weight[2], vectors.mean(0) + 100)


def test_equal_vectors_take_no_second_code() -> None:
    """Four points, each many times: whatever the draw, every point gets a code."""
    points = torch.tensor([[9.0, 0], [0, 9], [-9, 0], [0, -9]], dtype=torch.float64)
    noise = 1e-12 * torch.randn(128, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    vectors = points.repeat_interleave(torch.tensor([98, 10, 10, 10]), dim=0) + noise
    for draw in range(10):
        codebook = Codebook(4, 2).double()
        codebook.updates.fill_(draw)
        codebook.initialise([vectors])
        assert torch.cdist(points, codebook.embedding.weight).amin(1).max() < 1e-9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"warmup_steps": -1}, "warmup_steps must be at least 0, got -1"),
        ({"revive_after": 0}, "revive_after must be at least 1, got 0"),
        ({"decay": 1.0}, "decay must lie in"),
    ],
)
def test_codebook_refuses(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Codebook(4, 2, **arguments)


@pytest.mark.parametrize("cosine", [False, True])
def test_codes_are_looked_up_in_full_precision_under_autocast(cosine: bool, generator: torch.Generator) -> None:
    codebook = Codebook(512, 8, cosine=cosine)
    vectors = torch.randn(500, 8, generator=generator)
    quantizer = MultiScaleQuantizer((1, 2, 4), codebook).eval()
    features = [torch.randn(4, 8, n, n, generator=generator) for n in (1, 2, 4)]
    expected, maps = codebook.nearest(vectors), quantizer.encode(features)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(codebook.nearest(vectors), expected)
        assert all(torch.equal(a, b) for a, b in zip(quantizer.encode(features), maps, strict=True))


def test_codebook_larger_than_the_data_is_refused() -> None:
    with pytest.raises(ValueError, match="vocab_size 64 is more than the 12 vectors"):
        Codebook(64, 2).initialise([torch.zeros(4, 2), torch.zeros(8, 2)])


def test_warm_up_is_unquantised_then_initialises(generator: torch.Generator) -> None:
    vae = VQVAE(SCHEDULE, **SMALL, warmup_steps=2)
    x = inputs("view", images(8, generator))
    codebook, drawn = vae.codebook, vae.codebook.embedding.weight.clone()
    for step in range(3):
        assert torch.equal(codebook.embedding.weight, drawn)
        assert codebook.needs_init == (step == 2)
        quantized = vae(x)
        assert quantized.indices == []
        torch.testing.assert_close(quantized.stages[-1], vae.features(x)[-1])
        vae.eval()
        assert vae(x).indices == []
        vae.train()
        codebook.step()
    assert not codebook.warming_up
    assert not torch.equal(codebook.embedding.weight, drawn)
    set_codes = codebook.embedding.weight.clone()
    assert len(vae(x).indices) == 3
    assert torch.equal(codebook.embedding.weight, set_codes)
    codebook.step()
    assert not torch.equal(codebook.embedding.weight, set_codes)


def test_the_clock_is_that_of_a_loaded_checkpoint() -> None:
    trained, codebook = Codebook(4, 2, warmup_steps=5), Codebook(4, 2, warmup_steps=5)
    for _ in range(6):
        trained.step()
    assert codebook.warming_up
    codebook.load_state_dict(trained.state_dict())
    assert not codebook.warming_up
    codebook.step()
    assert codebook.updates == codebook.clock == 7


def test_phi_begins_as_the_identity(generator: torch.Generator) -> None:
    quantizer = MultiScaleQuantizer((1, 2, 4), Codebook(8, 3))
    code, f_hat = torch.randn(2, 3, 2, 2, generator=generator), torch.randn(2, 3, 4, 4, generator=generator)
    torch.testing.assert_close(quantizer.add(f_hat, code, 1), f_hat + quantizer.up(code))


def test_cosine_look_up_takes_the_smallest_angle(generator: torch.Generator) -> None:
    codebook = Codebook(16, 3, cosine=True)
    vectors = torch.randn(50, 3, generator=generator)
    angles = torch.nn.functional.cosine_similarity(vectors[:, None].double(), codebook.embedding.weight.double(), dim=2)
    assert torch.equal(codebook.nearest(vectors), angles.argmax(1))
    assert torch.equal(codebook.nearest(vectors), codebook.nearest(7.0 * vectors))
    assert not torch.equal(codebook.nearest(vectors), Codebook(16, 3).nearest(vectors))


def test_alias_tokenizer_learns_residuals_of_few_patterns(generator: torch.Generator) -> None:
    """Every patch is one of 12 patterns times a gain: what a code cannot tell is the gain alone."""
    patterns = torch.randn(12, 3, 4, 4, generator=generator)

    def residual(side: int) -> torch.Tensor:
        which = torch.randint(12, (16, side, side), generator=generator)
        gain = 1 + 0.1 * torch.randn(16, side, side, 1, 1, 1, generator=generator)
        return rearrange(gain * patterns[which], "b h w c p q -> b c (h p) (w q)")

    tokenizer = AliasTokenizer(SCHEDULE, vocab_size=32, z_channels=16, ch=32, warmup_steps=50, revive_after=20)
    optimizer = torch.optim.Adam(tokenizer.parameters(), lr=3e-3)
    for _ in range(150):
        passed = tokenizer([residual(1), residual(2), residual(4)])
        errors = [(x - y).square().mean() for x, y in zip(passed.decoded, passed.targets, strict=True)]
        optimizer.zero_grad()
        (sum(errors) + passed.loss).backward()
        optimizer.step()
        tokenizer.codebook.step()
    tokenizer.eval()
    a = [residual(1), residual(2), residual(4)]
    found = tokenizer.decode(tokenizer.encode(a))
    for x, y in zip(found, a, strict=True):
        assert (x - y).square().sum() < 0.05 * y.square().sum()


def test_alias_tokenizer_round_trip(generator: torch.Generator) -> None:
    tokenizer = AliasTokenizer(SCHEDULE, vocab_size=16, z_channels=8, ch=16)
    residuals = [a * scale for a, scale in zip(inputs("view", images(4, generator)), (0.1, 0.01, 0.0), strict=True)]
    passed = tokenizer(residuals[:2])
    for target in passed.targets:
        assert target.std() == pytest.approx(1, abs=0.05)
    tokenizer.codebook.step()
    tokenizer.eval()
    indices = tokenizer.encode(residuals)
    assert [i.shape for i in indices] == [(4, 1), (4, 4), (4, 16)]
    decoded = tokenizer.decode(indices)
    assert [d.shape for d in decoded] == [a.shape for a in residuals]
    for s, (target, reconstruction) in enumerate(zip(passed.targets, tokenizer(residuals[:2]).decoded, strict=True)):
        torch.testing.assert_close(reconstruction * tokenizer.std(s), decoded[s])
        torch.testing.assert_close(target * tokenizer.std(s), residuals[s])


def test_usage_and_signal_to_noise_against_numpy(generator: torch.Generator) -> None:
    assert perplexity(torch.tensor([5, 5, 5, 5])) == pytest.approx(4)
    assert perplexity(torch.tensor([7, 0, 0, 0])) == pytest.approx(1)
    usage = CodebookUsage(2, 8)
    maps = [torch.randint(3, (4, 1), generator=generator), torch.randint(8, (4, 4), generator=generator)]
    usage.update(maps)
    counts = np.stack([np.bincount(m.flatten().numpy(), minlength=8) for m in maps])
    counts = np.concatenate([counts, counts.sum(0, keepdims=True)])
    p = counts / counts.sum(1, keepdims=True)
    logs = np.log(p, out=np.zeros_like(p), where=p > 0)
    expected = np.exp(-(p * logs).sum(1)) / np.minimum(8, counts.sum(1))
    np.testing.assert_allclose(usage.compute().numpy(), expected)
    snr = SignalToNoise(1)
    target = torch.randn(50, generator=generator)
    snr.update([target * 0.9], [target])
    assert snr.compute().item() == pytest.approx(20, abs=1e-4)


def test_a_single_scale_reads_nothing() -> None:
    """There is no token map before it."""
    sizes = {"vocab_size": 8, "z_channels": 4, "ch": 4, "ch_mult": (1, 1, 1), "num_res_blocks": 1, "norm_groups": 4}
    vae = VQVAE(FocusSchedule((4,), patch_size=4, focus_states=1), targets="feature", **sizes)
    assert vae.var_inputs([torch.zeros(2, 16, dtype=torch.long)]).shape == (2, 0, 4)

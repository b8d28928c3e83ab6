"""Wrong tokens and their requantised followers, against the definition worked out again in float64."""

import pytest
import torch
from torch import Tensor

from fvar_lightning.schedule import FocusSchedule
from fvar_lightning.tokenizer.corruption import NEIGHBOURS, Corrupted, corrupted
from fvar_lightning.tokenizer.vqvae import VQVAE

SCHEDULE = FocusSchedule((1, 2, 3, 5), patch_size=4, focus_states=3, max_radius=2.0)
VOCABULARY = 60


@pytest.fixture(scope="module")
def vae() -> VQVAE:
    torch.manual_seed(0)
    vae = VQVAE(SCHEDULE, vocab_size=VOCABULARY, z_channels=6, ch=8, ch_mult=(1, 1, 2), num_res_blocks=1).eval()
    for phi in vae.quantizer.phi:
        torch.nn.init.normal_(phi.weight, std=0.1)
        torch.nn.init.normal_(phi.bias)
    return vae.double()


def tokens(images: int = 40) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(VOCABULARY, (images, n * n), generator=generator) for n in SCHEDULE.patch_nums]


def make(vae: VQVAE, shares: Tensor, seed: int = 2) -> Corrupted:
    return corrupted(vae.quantizer, tokens(len(shares)), shares, torch.Generator().manual_seed(seed))


def test_images_without_wrong_tokens_are_what_they_were(vae: VQVAE) -> None:
    shares = torch.tensor([0.0, 1.0] * 20)
    found = make(vae, shares)
    clean = shares == 0
    for target, token in zip(found.targets, tokens(), strict=True):
        assert torch.equal(target[clean], token[clean])
    assert torch.equal(found.inputs[clean], vae.var_inputs(tokens())[clean])
    assert torch.equal(found.targets[0], tokens()[0])
    assert (found.inputs[~clean] != vae.var_inputs(tokens())[~clean]).any()


def test_equal_codes_keep_their_tokens(vae: VQVAE) -> None:
    """Where nothing has gone wrong the nearest code is not looked up: of equal ones it might be another."""
    vae = VQVAE(SCHEDULE, vocab_size=VOCABULARY, z_channels=6, ch=8, ch_mult=(1, 1, 2), num_res_blocks=1).eval()
    vae.codebook.embedding.weight.fill_(1)
    for target, token in zip(make(vae, torch.zeros(40)).targets, tokens(), strict=True):
        assert torch.equal(target, token)


def test_targets_requantise_what_is_missing(vae: VQVAE) -> None:
    """Of features whose residuals are the very codes: the code nearest to what the inputs still lack of them."""
    found, true = make(vae, torch.full((40,), 0.5)), tokens()
    right = [torch.zeros(40, 6, 5, 5, dtype=torch.float64), *vae.quantizer.stages(true)]
    codes = vae.codebook.embedding.weight
    inputs = found.inputs.split([n * n for n in SCHEDULE.patch_nums[1:]], dim=1)
    changed = 0
    for s in range(1, 4):
        features = codes[true[s]] + vae.quantizer.down(right[s], s).flatten(2).transpose(1, 2)
        expected = torch.cdist(features - inputs[s - 1], codes.expand(40, -1, -1)).argmin(-1)
        assert torch.equal(found.targets[s], expected)
        changed += (expected != true[s]).sum().item()
    assert changed > 100


def test_how_many_tokens_are_replaced_and_by_what(vae: VQVAE) -> None:
    """Seen in the 1x1 map's contribution to the first inputs, of 4000 images."""
    images, share = 4000, 0.3
    found, true = make(vae, torch.full((images,), share)), tokens(images)[0][:, 0]
    codes = vae.codebook.embedding.weight
    every = torch.arange(VOCABULARY)[:, None]
    first = vae.quantizer.stages([every, *(t.expand(VOCABULARY, -1) for t in tokens(1)[1:])])[0]
    means = vae.quantizer.next_input(first, 0)
    read = torch.cdist(found.inputs[:, :4].flatten(1), means.flatten(1)).argmin(1)
    replaced = read != true
    assert replaced.double().mean().item() == pytest.approx(share, abs=4 * (share * (1 - share) / images) ** 0.5)
    ranks = torch.cdist(codes[true], codes).argsort(1).argsort(1).gather(1, read[:, None])[replaced, 0]
    assert set(ranks.tolist()) == set(range(1, NEIGHBOURS + 1))


def test_the_new_targets_mend_the_map(vae: VQVAE) -> None:
    """The last scale's bring it nearer to the right one than the old ones would."""
    found, true = make(vae, torch.full((40,), 0.5)), tokens()
    quantizer = vae.quantizer
    missing = quantizer.stages(true)[-2].flatten(2).transpose(1, 2) - found.inputs[:, -25:]
    codes = vae.codebook.embedding.weight

    def error(last: Tensor) -> float:
        return (missing + codes[true[-1]] - codes[last]).square().mean().item()

    assert error(found.targets[-1]) < error(true[-1])


def test_a_single_scale_reads_nothing() -> None:
    vae = VQVAE(FocusSchedule((3,), patch_size=4, focus_states=1), vocab_size=5, z_channels=6, ch=8, ch_mult=(1, 1, 2))
    indices = [torch.randint(5, (2, 9))]
    found = corrupted(vae.quantizer, indices, torch.ones(2), torch.Generator())
    assert found.inputs.shape == (2, 0, 6)
    assert torch.equal(found.targets[0], indices[0])

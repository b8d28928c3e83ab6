"""Ours against official VAR: the same weights, what the official code answered (tests/golden), and what ours does."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fvar_lightning.generation.sampling import generate
from fvar_lightning.schedule import FocusSchedule
from fvar_lightning.tokenizer.vqvae import VQVAE
from fvar_lightning.transformer.var import VAR
from fvar_lightning.weights.official import export_var_checkpoint, load_var_checkpoint
from golden.make_golden import names_digest
from golden.recipe import (
    CONFIGS,
    DERIVED,
    RUNS,
    SEEDS,
    Config,
    digest,
    images,
    labels,
    noise_digest,
    probe,
    runs,
    weights,
)

GOLDEN = Path(__file__).parent / "golden"
VAR_REPO = os.environ.get("VAR_REPO")
needs_official = pytest.mark.skipif(VAR_REPO is None, reason="VAR_REPO names no checkout of the official code")


def fresh(config: Config) -> tuple[VQVAE, VAR]:
    """Networks of these sizes, initialised at random."""
    phis = config.share_quant_resi or len(config.patch_nums)
    vae = VQVAE(
        FocusSchedule(config.patch_nums, focus_states=1),
        targets="feature",
        vocab_size=config.vocab_size,
        z_channels=config.z_channels,
        ch=config.ch,
        num_phi=phis,
    )
    var = VAR(
        config.patch_nums,
        vocab_size=config.vocab_size,
        z_channels=config.z_channels,
        num_classes=config.num_classes,
        depth=config.depth,
        width=config.width,
        heads=config.heads,
        shared_aln=config.shared_aln,
        attn_l2_norm=config.attn_l2_norm,
    )
    return vae, var


class Case:
    """A configuration: official files with the recipe's weights, the networks read from them, the golden answers."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.config = name, CONFIGS[name]
        self.golden = np.load(GOLDEN / f"{name}.npz")
        self.files = folder / "vae.pth", folder / "var.pth"
        export_var_checkpoint(*fresh(self.config), *self.files)
        self.shapes = {}
        for network, file in zip(("vae", "var"), self.files, strict=True):
            state = torch.load(file, weights_only=True)
            if name == "four_own_phis":  # written in the form of the official default, four shared by four scales
                state = {key.replace("qresi_ls.", ""): x for key, x in state.items()}
            self.shapes[network] = {key: tuple(x.shape) for key, x in state.items()}
            ours = {key: shape for key, shape in self.shapes[network].items() if not key.endswith(DERIVED)}
            torch.save(state | weights(name, ours), file)
        self.vae, self.var = load_var_checkpoint(*self.files)

    def expect(self, key: str, found: Tensor, tolerance: float = 1e-4) -> None:
        np.testing.assert_allclose(probe(found), self.golden[key], rtol=0, atol=tolerance)


@pytest.fixture(scope="module", params=CONFIGS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(request.param, tmp_path_factory.mktemp("official"))


def test_sizes_are_recognised(case: Case) -> None:
    fresh_vae, fresh_var = fresh(case.config)
    assert str(case.vae) == str(fresh_vae)
    assert str(case.var) == str(fresh_var)
    assert case.vae.schedule == FocusSchedule(case.config.patch_nums, focus_states=1)
    assert case.vae.targets == "feature"
    assert (case.var.heads, case.var.num_classes) == (case.config.heads, case.config.num_classes)


def test_exported_files_have_the_official_names_and_shapes(case: Case) -> None:
    for network in ("vae", "var"):
        assert names_digest(case.shapes[network]) == case.golden[f"{network}/names"]


def test_tokens_and_reconstructions(case: Case) -> None:
    tokens = case.vae.encode(images(case.name))
    np.testing.assert_array_equal(torch.cat(tokens, dim=1), case.golden["tokens"])
    case.expect("reconstruction", case.vae.decode(tokens))


@torch.no_grad()
def test_inputs_and_logits(case: Case) -> None:
    tokens = list(torch.from_numpy(case.golden["tokens"]).long().split([n * n for n in case.config.patch_nums], dim=1))
    inputs = case.vae.var_inputs(tokens)
    case.expect("var_inputs", inputs)
    logits = case.var(labels(case.config), inputs)
    case.expect("logits", logits, 1e-4 * float(logits.abs().max()))


@pytest.mark.parametrize("run", RUNS)
def test_generation(case: Case, run: str) -> None:
    if run not in runs(case.name):
        pytest.skip("not asked at this size")
    if case.golden["noise"] != noise_digest():
        pytest.skip("torch draws other numbers on this machine than on the one the golden files were made on")
    drawn = []

    def record(scale: int, f_hat: Tensor, tokens: Tensor) -> Tensor:
        drawn.append(tokens)
        return torch.full_like(tokens, -1)

    chosen = RUNS[run]
    noise: dict[str, Any] = {"generator": torch.Generator().manual_seed(SEEDS[0])}
    made = generate(
        case.var,
        case.vae,
        labels(case.config),
        guidance=chosen.guidance,
        top_k=chosen.top_k,
        top_p=chosen.top_p,
        more_smooth=chosen.more_smooth,
        revise=record,
        **({"seeds": SEEDS} if chosen.seeds_per_image else noise),
    )
    assert [digest(tokens) for tokens in torch.cat(drawn, dim=1)] == case.golden[f"{run}/tokens"].tolist()
    for image, expected in zip(made, case.golden[f"{run}/images"], strict=True):
        np.testing.assert_allclose(probe(image), expected, rtol=0, atol=1e-4)


@needs_official
@torch.no_grad()
def test_official_code_answers_the_same_in_every_number(case: Case) -> None:
    """What the golden files hold probes of."""
    from golden.official import official_by_recipe

    vae, var = official_by_recipe(str(VAR_REPO), case.name)
    tokens = vae.img_to_idxBl(images(case.name))
    for ours, theirs in zip(case.vae.encode(images(case.name)), tokens, strict=True):
        assert torch.equal(ours, theirs)
    made = vae.idxBl_to_img(tokens, same_shape=True, last_one=True)
    torch.testing.assert_close(case.vae.decode(tokens), made, rtol=0, atol=1e-4)
    inputs = vae.quantize.idxBl_to_var_input(tokens)
    torch.testing.assert_close(case.vae.var_inputs(tokens), inputs, rtol=0, atol=1e-5)
    logits = var(labels(case.config), inputs)
    relative = (case.var(labels(case.config), inputs) - logits).abs().amax(-1) / logits.abs().amax(-1)
    assert relative.max() < 1e-4


@needs_official
@torch.no_grad()
def test_official_code_runs_exported_files(case: Case, tmp_path: Path) -> None:
    from golden.official import build_official

    files = tmp_path / "vae.pth", tmp_path / "var.pth"
    export_var_checkpoint(case.vae, case.var, *files)
    four_of_four = case.name == "four_own_phis"
    config = case.config._replace(share_quant_resi=4) if four_of_four else case.config
    vae, var = build_official(str(VAR_REPO), config)
    for network, file in zip((vae, var), files, strict=True):
        network.load_state_dict(torch.load(file, weights_only=True), strict=True)
    wanted = labels(case.config)
    theirs = var.autoregressive_infer_cfg(2, wanted, g_seed=5, cfg=2.0, top_k=30, top_p=0.9) * 2 - 1
    noise = torch.Generator().manual_seed(5)
    ours = generate(case.var, case.vae, wanted, guidance=2.0, top_k=30, top_p=0.9, generator=noise)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)

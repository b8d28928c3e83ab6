"""Editing: what is kept is kept, what is forced is forced, what is new is the student's."""

import importlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fvar_lightning.generation.editing import composite, edit, fill_hole, outpaint_canvas, replaced, requantised
from fvar_lightning.generation.sampling import generate, sample
from fvar_lightning.metrics.extractors import ModuleExtractor
from fvar_lightning.optics.refocus import Refocus
from fvar_lightning.schedule import FocusSchedule
from fvar_lightning.tokenizer.vqvae import VQVAE
from fvar_lightning.transformer.var import VAR
from fvar_lightning.weights.describe import describe

SCHEDULE = FocusSchedule((1, 2, 3, 4, 8), patch_size=4, focus_states=3)
SIZE = SCHEDULE.image_size
TARGETS = ["feature", "view", "full"]
METHODS = ["requantise", "var"]


def make_vae(targets: str = "feature") -> VQVAE:
    vae = VQVAE(SCHEDULE, targets=targets, vocab_size=24, z_channels=4, ch=16, ch_mult=(1, 2, 4), num_res_blocks=1)
    return redraw(vae, 1)


def make_var() -> VAR:
    return redraw(VAR(SCHEDULE.patch_nums, vocab_size=24, z_channels=4, num_classes=5, depth=2, width=32, heads=2), 2)


def redraw(network, seed: int):
    """Weights that do not depend on the global random state, of a size that keeps activations of order one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            fan = parameter[0].numel() if parameter.dim() > 1 and "embed" not in name else 1
            noise = torch.randn(parameter.shape, generator=generator)
            # gains stay one, and biases do not keep what the global random state gave them
            parameter.copy_(0.5 * noise / fan**0.5 + (parameter.dim() == 1 and name.endswith("weight")))
    return network.eval()


def make_images(batch: int = 3) -> Tensor:
    x = torch.randn(batch, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(3))
    smooth = F.avg_pool2d(F.pad(x, (2,) * 4, mode="reflect"), 5, stride=1)
    return (3 * smooth).clamp(-1, 1)


def disc(batch: int | None = None) -> Tensor:
    """A hole that no cell's border coincides with."""
    y, x = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    mask = (y - 13.0) ** 2 + (x - 18.0) ** 2 < 81
    return mask if batch is None else mask.expand(batch, 1, SIZE, SIZE)


def encodable(vae: VQVAE, images: Tensor):
    if vae.targets == "feature":
        return images
    refocus = Refocus(SCHEDULE)
    return refocus(images).focused if vae.targets == "view" else refocus.blur(images)


def shares(mask: Tensor, side: int) -> Tensor:
    """Share of hole in every cell, in double precision, by sums over an eight times finer grid."""
    fine = F.interpolate(mask[None, None].double(), scale_factor=3)[0, 0].numpy()  # 96 divides by all sides
    block = 3 * SIZE // side
    return torch.from_numpy(fine.reshape(side, block, side, block).mean((1, 3))).flatten()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("feather", [None, 0])
def test_kept_pixels_are_the_very_same(method: str, targets: str, feather: int | None) -> None:
    images, mask = make_images(), disc()
    edited = edit(make_var(), make_vae(targets), images, mask, method=method, feather=feather, seeds=[1, 2, 3])
    assert torch.equal(edited[:, :, ~mask], images[:, :, ~mask])
    assert (edited[:, :, mask] != images[:, :, mask]).float().mean() > 0.9
    assert edited.abs().max() <= 1


@pytest.mark.parametrize("method", METHODS)
def test_no_hole_gives_the_image_itself(method: str) -> None:
    images = make_images()
    edited = edit(make_var(), make_vae(), images, torch.zeros(SIZE, SIZE, dtype=torch.bool), method=method)
    assert torch.equal(edited, images)


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("labels", [None, torch.tensor([0, 4, 2])])
def test_all_hole_is_generation(targets: str, labels: Tensor | None) -> None:
    var, vae, seeds = make_var(), make_vae(targets), [4, 5, 6]
    options = {"seeds": seeds, "guidance": 3.0, "top_k": 10, "top_p": 0.9, "more_smooth": True}
    edited = edit(var, vae, make_images(), torch.ones(SIZE, SIZE, dtype=torch.bool), labels, **options)
    expected = generate(var, vae, torch.full((3,), 5) if labels is None else labels, **options)
    assert torch.equal(edited, expected)


@pytest.mark.parametrize("targets", TARGETS)
def test_nothing_of_the_old_content_enters(targets: str) -> None:
    """Requantise: whatever lies in the hole, the result is the same. VAR's way reads it."""
    var, vae, images, mask = make_var(), make_vae(targets), make_images(), disc()
    other = images.masked_fill(mask, 0.9)
    made = [edit(var, vae, x, mask, seeds=[1, 2, 3]) for x in (images, other)]
    assert torch.equal(*made)
    theirs = [edit(var, vae, x, mask, method="var", seeds=[1, 2, 3]) for x in (images, other)]
    assert not torch.equal(*theirs)


def test_labels_matter() -> None:
    var, vae, images = make_var(), make_vae(), make_images()
    with torch.no_grad():  # the draws of so small a network would often be the same for two classes
        var.class_emb.weight.mul_(20)
    made = [edit(var, vae, images, disc(), torch.full((3,), c), seeds=[1, 2, 3]) for c in (0, 1, 5)]
    free = edit(var, vae, images, disc(), seeds=[1, 2, 3])
    assert not torch.equal(made[0], made[1])
    assert torch.equal(made[2], free)


@pytest.mark.parametrize("method", METHODS)
def test_images_do_not_depend_on_the_batch(method: str) -> None:
    var, vae, images = make_var().double(), make_vae("full").double(), make_images().double()
    masks = torch.stack([disc(), disc().T, torch.ones(SIZE, SIZE, dtype=torch.bool)])
    labels, seeds = torch.tensor([1, 5, 3]), [7, 8, 9]
    together = edit(var, vae, images, masks, labels, method=method, seeds=seeds)
    for i in range(3):
        part = slice(i, i + 1)
        alone = edit(var, vae, images[part], masks[i], labels[part], method=method, seeds=seeds[part])
        torch.testing.assert_close(alone, together[part], atol=1e-9, rtol=0)


def test_masks_of_all_shapes() -> None:
    var, vae, images = make_var(), make_vae(), make_images()
    made = [edit(var, vae, images, mask, seeds=[1, 2, 3]) for mask in (disc(), disc(3), disc(3)[:, 0])]
    assert torch.equal(made[0], made[1])
    assert torch.equal(made[0], made[2])


@pytest.mark.parametrize("smooth", [False, True])
def test_tokens_at_kept_cells_are_the_nearest_to_what_is_missing(smooth: bool) -> None:
    """Against a search in double precision at every cell by itself, f_hat being the one that sampling made."""
    var, vae, images, mask = make_var(), make_vae("view"), make_images(2), disc()
    wanted = [z.double() for z in vae.features(encodable(vae, fill_hole(images, disc(2))))]
    codes = vae.quantizer.codebook.embedding.weight.double()
    force = requantised(vae, images, disc(2))
    seen: list[tuple[Tensor, Tensor]] = []

    def spy(s: int, f_hat: Tensor, sampled: Tensor) -> Tensor:
        seen.append((f_hat, force(s, f_hat, sampled)))
        return seen[-1][1]

    labels = torch.tensor([0, 5])
    stages = list(sample(var, vae, labels, seeds=[1, 2], revise=spy, more_smooth=smooth))
    for s, (side, (f_hat, tokens)) in enumerate(zip(SCHEDULE.patch_nums, seen, strict=True)):
        missing = (wanted[s] - F.adaptive_avg_pool2d(f_hat.double(), side)).flatten(2).transpose(1, 2)
        nearest = torch.cdist(missing, codes.expand(2, -1, -1)).argmin(-1)
        free = (shares(mask, side) > 0.5).expand(2, -1)
        assert torch.equal(tokens, torch.where(free, -1, nearest))
        # and they are what f_hat got there, even where codes are mixed
        added = vae.quantizer.add(f_hat, vae.quantizer.code_map(tokens.clamp_min(0)), s)
        if not free.any():
            assert torch.equal(stages[s], added)
    assert not (seen[0][1] < 0).any()
    assert (seen[-1][1] < 0).any()


def test_vars_way_forces_its_tokens() -> None:
    """Tokens of the image as it is; the mask of the last scale resized as the notebook resizes it; the 1x1 always."""
    var, vae, images = make_var(), make_vae(), make_images(2)
    mask = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    mask[4:28, 4:28] = True
    force = replaced(vae, images, mask.expand(2, 1, SIZE, SIZE))
    tokens = vae.encode(images)
    cells = torch.ones(8, 8)
    cells[1:7, 1:7] = 0
    drawn: list[Tensor] = []

    def spy(s: int, f_hat: Tensor, sampled: Tensor) -> Tensor:
        forced = force(s, f_hat, sampled)
        drawn.append(torch.where(forced < 0, sampled, forced))
        kept = F.interpolate(cells[None, None], (SCHEDULE.patch_nums[s],) * 2, mode="bilinear").flatten() > 0.5
        assert torch.equal(forced >= 0, (kept | (s == 0)).expand(2, -1))
        assert torch.equal(forced[forced >= 0], tokens[s][forced >= 0])
        return forced

    *_, f_hat = sample(var, vae, torch.tensor([0, 5]), seeds=[1, 2], revise=spy)
    torch.testing.assert_close(f_hat, vae.quantizer.stages(drawn)[-1])


def test_requantised_features_are_nearer_to_the_true_ones() -> None:
    """The features of the image as it was, at the cells without any hole; with codes that fit the features."""
    var, vae, images = make_var(), make_vae(), make_images(8)
    vae.train()(images)  # sets the codes by k-means
    true = vae.eval().features(images)[-1].detach()
    kept = (shares(disc(), 8) == 0).view(8, 8)
    errors = []
    for way in (requantised, replaced):
        *_, f_hat = sample(var, vae, torch.full((8,), 5), seeds=range(8), revise=way(vae, images, disc(8)))
        errors.append(float((f_hat - true)[..., kept].square().mean()))
    assert errors[0] < 0.9 * errors[1]  # measured 0.83


def test_hole_is_filled_by_a_membrane() -> None:
    """A plane is continued exactly enough; no value leaves the range of the border; nothing known changes."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, SIZE), torch.linspace(-1, 1, SIZE), indexing="ij")
    plane = (0.6 * x + 0.3 * y).expand(2, 3, SIZE, SIZE)
    hole = disc(2)
    filled = fill_hole(plane.masked_fill(hole, 100.0), hole)
    assert torch.equal(filled.masked_select(~hole), plane.masked_select(~hole))
    assert (filled - plane).abs().max() < 0.05
    noisy = make_images(2)
    filled = fill_hole(noisy, hole).masked_select(hole)
    assert noisy.masked_select(~hole).min() <= filled.min() <= filled.max() <= noisy.masked_select(~hole).max()
    assert not fill_hole(noisy, torch.ones_like(hole)).any()


def test_feather_hides_the_seam_and_keeps_the_detail() -> None:
    """Content that is off by a constant: next to the border the error is gone, beyond the feather nothing changes."""
    images, hole = 0.3 * make_images(2), disc(2)
    generated = images + 0.4
    made = composite(images, generated, hole, 3)
    error = (made - images).masked_fill(~hole, 0)
    assert torch.equal(composite(images, generated, hole, 0), generated.where(hole, images))
    rings, reached = [], ~hole
    for _ in range(5):
        grown = F.max_pool2d(reached.float(), 3, stride=1, padding=1) > 0
        rings.append(error[(grown & ~reached).expand_as(error)])
        reached = grown
    expected = [0.1, 0.2, 0.3, 0.4, 0.4]
    for ring, value in zip(rings, expected, strict=True):
        torch.testing.assert_close(ring, torch.full_like(ring, value), atol=1e-5, rtol=0)


def test_outpainting_canvas() -> None:
    small = make_images(2)[..., :20, :24]
    canvas, mask = outpaint_canvas(small, (3, 5, 8, 4))
    assert canvas.shape == (2, 3, SIZE, SIZE)
    assert torch.equal(canvas[:, :, ~mask].view(2, 3, 20, 24), small)
    assert not mask[8:28, 3:27].any()
    assert mask.sum() == SIZE * SIZE - 20 * 24
    edited = edit(make_var(), make_vae("view"), canvas, mask, seeds=[1, 2])
    assert torch.equal(edited[..., 8:28, 3:27], small)
    assert outpaint_canvas(small, 2)[0].shape == (2, 3, 24, 28)


@pytest.mark.parametrize("padding", [-1, 0, (0, 0, 0, 0), (1, 2, 3)])
def test_outpainting_refuses(padding: int | tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="padding must be"):
        outpaint_canvas(make_images(1), padding)


def test_half_precision_images_stay_as_they_are() -> None:
    images = make_images().bfloat16()
    edited = edit(make_var(), make_vae("view"), images, disc(), seeds=[1, 2, 3])
    assert edited.dtype == torch.bfloat16
    assert torch.equal(edited[:, :, ~disc()], images[:, :, ~disc()])


@pytest.mark.parametrize(
    ("message", "options"),
    [
        (
            r"images must be .* \(B, 3, 32, 32\), got torch.float32 \(3, 3, 16, 16\)",
            {"images": torch.zeros(3, 3, 16, 16)},
        ),
        (r"images must be .* got torch.float32 \(3, 32, 32\)", {"images": torch.zeros(3, 32, 32)}),
        (r"images must be .* got torch.uint8", {"images": torch.zeros(3, 3, 32, 32, dtype=torch.uint8)}),
        (
            r"images must lie in \[-1, 1\], got 0\.\.255",
            {"images": torch.zeros(3, 3, 32, 32).index_fill(0, torch.tensor(1), 255.0)},
        ),
        (r"mask must be bool .* got torch.float32", {"mask": disc().float()}),
        (r"mask must be bool .* got torch.bool \(16, 16\)", {"mask": disc()[:16, :16]}),
        (r"mask must be bool .* got torch.bool \(2, 32, 32\)", {"mask": disc(2)[:, 0]}),
        (r"mask must be bool .* got torch.bool \(3, 3, 32, 32\)", {"mask": disc(3).expand(3, 3, 32, 32)}),
        (r"labels must lie in 0\.\.5 .* got 0\.\.6", {"labels": torch.tensor([0, 1, 6])}),
        (r"labels must hold one per image \(3\), got 2", {"labels": torch.tensor([0, 1])}),
        ("method must be one of .* got 'inpaint'", {"method": "inpaint"}),
        ("feather must be .* got -1", {"feather": -1}),
        ("guidance must be .* got -2", {"guidance": -2}),
        (r"top_p must lie in .* got 1\.5", {"top_p": 1.5}),
        (r"seeds must hold one per image \(3\)", {"seeds": [1]}),
    ],
)
def test_refusals(message: str, options: dict[str, object]) -> None:
    arguments = {"images": make_images(), "mask": disc()} | options
    with pytest.raises(ValueError, match=message):
        edit(make_var(), make_vae("view"), **arguments)


def test_foreign_tokenizer_is_refused() -> None:
    var = VAR((1, 2), vocab_size=24, z_channels=4, num_classes=5, depth=1, width=32, heads=2)
    with pytest.raises(ValueError, match="patch_nums of the student"):
        edit(var, make_vae(), make_images(), disc())


class Colours(torch.nn.Module):
    """Mean colour of uint8 images."""

    def forward(self, images: Tensor) -> Tensor:
        return images.float().mean((2, 3))


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "studies")
    return importlib.import_module("editing")


def test_study_runs_and_goes_on(
    study: ModuleType,
    tmp_path: Path,
    image_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    var, vae, editing = make_var(), make_vae("view"), study
    networks = {"student": var, "vae": vae}
    state = {
        f"{name}.{key}": value for name, network in networks.items() for key, value in network.state_dict().items()
    }
    checkpoint = tmp_path / "last.ckpt"
    described = {name: describe(network) for name, network in networks.items()}
    torch.save({"networks": described, "state_dict": state, "hyper_parameters": {}}, checkpoint)
    output = tmp_path / "out"
    args = [f"--checkpoint={checkpoint}", f"--images={image_folder}", f"--output={output}", "--limit=4"]
    monkeypatch.setattr(editing, "MASKS", {"half": editing.half, "blobs": editing.blobs})
    colours = ModuleExtractor(Colours(), "colours", 3)  # the real one takes long, and is tested elsewhere
    monkeypatch.setattr(editing, "EfficientNetLite0", lambda: colours)
    table = editing.main(args)
    assert table.count("\n") == 1 + 2 * len(editing.ways(var, vae))
    assert {path.name for path in output.iterdir()} == {"results.json", "half.png", "blobs.png"}

    monkeypatch.setattr(editing, "measure", None)  # a second run has nothing to do
    assert editing.main(args) == table
    with pytest.raises(SystemExit):
        editing.main([*args[:-1], "--limit=1"])
    assert "holds results of" in capsys.readouterr().err


def test_seam_of_the_study_by_hand(study: ModuleType) -> None:
    image = torch.zeros(1, 1, 3, 3)
    image[..., 1, 1] = 5
    image[..., 0, 0] = 2
    hole = torch.zeros(1, 1, 3, 3, dtype=torch.bool)
    hole[..., 1, 1] = True
    assert sorted(study.border_steps(image, hole).tolist()) == [-5, -5, 5, 5]
    np.testing.assert_allclose(float(study.blobs(32, 0).float().mean()), 0.4, atol=0.01)

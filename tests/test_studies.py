"""The tables of the studies by hand, and the controls and levers of the ablation against what they stand beside."""

import copy
import math
import re
import shutil
from pathlib import Path
from pydoc import locate

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

from evaluation_worker import LAYOUT as DESCRIPTION
from evaluation_worker import make_taught_task, write_tokenizers
from fvar_lightning.cli import main
from fvar_lightning.data.batches import ImageBatch
from fvar_lightning.data.fingerprint import fingerprint
from fvar_lightning.data.modules import ImageDataModule
from fvar_lightning.optics.refocus import Refocus
from fvar_lightning.schedule import FocusSchedule
from fvar_lightning.tasks.fvar import FVARTask
from fvar_lightning.tasks.tokenizer import TokenizerTask
from fvar_lightning.tasks.training import batch_generator
from fvar_lightning.tokenizer.autoencoder import Upsample2x
from fvar_lightning.tokenizer.reconstruction import Reconstruction
from test_teacher_gap import SIDES, make_tokens
from token_caches import write_cache

STUDIES = Path(__file__).parents[1] / "studies"
LAYOUT = FocusSchedule(**DESCRIPTION)
SMALL = {"vocab_size": 8, "z_channels": 4, "ch": 8, "ch_mult": (1, 1, 2), "num_res_blocks": 1, "norm_groups": 2}
ALONE = {"teacher_loss_weight": 0.0, "feature_weight": 0.0, "logit_weight": 0.0}


@pytest.fixture(autouse=True)
def studies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(STUDIES))


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return write_tokenizers(tmp_path_factory.mktemp("tokenizers"))


def make_control(name: str, tokenizers: list[str], **options: object) -> FVARTask:
    """With the weights of `make_taught_task`, as far as it has them."""
    import controls
    import levers

    plain = make_taught_task(tokenizers)
    options = {"num_classes": 2, "depth": 2, "width": 32, "heads": 2} | options
    control = getattr(controls, name, None) or getattr(levers, name)
    control = control(*tokenizers, **options)
    control.load_state_dict(plain.state_dict(), strict=False)
    return control


def test_differences_are_paired_by_seed() -> None:
    from tables import differences, p_value, paired, spread, values

    found = {0: {"fd": 10.0}, 1: {"fd": 13.0}, 2: {"fd": 13.0}, 3: {}}
    baseline = {0: {"fd": 12.0}, 1: {"fd": 15.5}, 2: {"fd": 14.5}, 3: {"fd": 1.0}, 4: {"fd": 1.0}}
    assert values(found, "fd") == [10, 13, 13]
    assert spread(values(found, "fd")) == "12 ± 1.7"
    assert differences(found, baseline, "fd") == [-2, -2.5, -1.5]
    # standard deviation 0.5, over the root of 3 seeds
    assert paired(differences(found, baseline, "fd")) == "**-2 ± 0.29**"
    assert (paired([2.0]), paired([-1.0, 1.0])) == ("+2", "+0 ± 1")
    assert paired([1.0, 2.0, 3.0]) == "+2 ± 0.58", "3.5 errors: of two degrees of freedom t must exceed 4.303"
    assert paired([1.0, 2.0, 3.0, 3.0]) == "**+2.25 ± 0.48**", "4.7 errors: of three 3.182"
    # of one degree of freedom t is a Cauchy variable: beyond 1 a quarter of it lies on either side
    assert p_value([0.0, 2.0]) == pytest.approx(0.5)
    assert (paired([]), spread([])) == ("-", "-")


def test_tables_are_made_anew_from_the_figures(tmp_path: Path) -> None:
    from report import read_figures, write_figures
    from results import renewed

    tokenizers = {"feature": {0: {"fd/real": 80.0}, 1: {"fd/real": 82.0}}, "view": {0: {"fd/real": 83.0}}}
    var = {0: {"fd/real": 110.0, "settled": 0.012}, 1: {"fd/real": 114.0, "settled": 0.016}}
    next_focus = {0: {"fd/real": 106.5, "settled": 0.01}, 1: {"fd/real": 109.5, "settled": 0.02}}
    kinds = {"tokenizers": tokenizers, "steps": {"var": var, "next_focus": next_focus}}
    (tmp_path / "study").mkdir()
    write_figures(tmp_path / "study" / "figures.csv", kinds)
    assert read_figures(tmp_path / "study" / "figures.csv") == kinds
    (tmp_path / "study" / "inputs.json").write_text('{"inputs": {"tokenizer_effort": 2.5, "effort": 3.0}}')
    comments = "<!-- table: arms study --columns fd/real -->", "<!-- table: race study:0-1 -->"
    text = f"Before.\n\n{comments[0]}\n\n| old |\n\n{comments[1]}\n\nAfter.\n"
    made = renewed(text, tmp_path)
    assert renewed(made, tmp_path) == made
    before, arms, race, after = re.split(r"<!-- .* -->\n\n|After", made)
    assert (before, after) == ("Before.\n\n", ".\n")
    assert arms.splitlines()[2:] == [
        "| `var` | 2 | 112 ± 2.8 |", "| `next_focus` | 2 | 108 ± 2.1 |", "| to `var` | 2 | -4 ± 0.5 |", "",
    ]  # fmt: skip
    # t = 8 with one degree of freedom: a Cauchy variable beyond 8
    p = 1 - 2 / math.pi * math.atan(8)
    assert race.splitlines()[2].startswith(f"| 1250 / 1200 | 0 to 1 | 112 ± 2.8 | 108 ± 2.1 | -4 ± 0.5 | {p:.2g} |")
    assert race.splitlines()[2].endswith("| +3 | 1.4% / 1.5% |")
    (tmp_path / "longer").mkdir()
    write_figures(tmp_path / "longer" / "figures.csv", {"tokenizers": {"feature": {1: {"fd/real": 70.0}}}, "steps": {
        "var": {1: {"fd/real": 100.0, "settled": 0.01}}}})  # fmt: skip
    (tmp_path / "longer" / "inputs.json").write_text('{"inputs": {"tokenizer_effort": 4.0, "effort": 3.0}}')
    longer = renewed("<!-- table: race study:0-1:longer -->\n\n", tmp_path).splitlines()[4]
    assert longer.startswith("| 2000 / 1200 against 1250 / 1200 | 0 to 1 | 100 | 108 ± 2.1 | +9.5 | - |")
    for wrong in ("arms nowhere", "arms study --arms fvar", "arms study --columns width"):
        with pytest.raises(ValueError, match=f"no table can be made of '{wrong}'"):
            renewed(f"<!-- table: {wrong} -->\n\n", tmp_path)


@pytest.mark.parametrize("name", ["results.md", "tokenizers.md"])
def test_documents_show_the_figures_beside_them(name: str) -> None:
    from results import TABLE, renewed

    docs = STUDIES.parent / "docs"
    text = (docs / name).read_text()
    assert "<!-- table: " in text
    assert renewed(text, docs / "results") == text, f"python studies/results.py docs/{name}"
    without_comment = re.findall(r"^\|  \| seeds .*|^\| steps of .*", TABLE.sub("", text), re.MULTILINE)
    assert not without_comment


def test_codes_in_use_are_the_exponential_of_their_entropy(tmp_path: Path) -> None:
    from judging import codes_in_use
    from scipy.stats import entropy

    structure, _, _ = write_cache(tmp_path, rows=40)
    found = codes_in_use(60000, (1, 2), tmp_path, limit=30)
    for name, part in {"1x1": structure[:30, :1], "2x2": structure[:30, 1:], "all": structure[:30]}.items():
        counts = part.flatten().unique(return_counts=True)[1]
        assert found[f"codes/{name}"] == pytest.approx(math.exp(entropy(counts)))


def test_shuffled_alias_is_that_of_another_image(tokenizers: list[str]) -> None:
    control, plain = make_control("ShuffledAlias", tokenizers).eval(), make_taught_task(tokenizers).eval()
    batch = make_tokens(4)
    other = batch._replace(alias=[maps[[3, 0, 1, 2]] for maps in batch.alias])
    assert control.losses(batch)["teacher"] != plain.losses(batch)["teacher"]
    torch.testing.assert_close(control.losses(batch), plain.losses(other))


def test_self_distillation_is_from_the_average_of_the_student(tokenizers: list[str]) -> None:
    """Which gets no gradient, moves with it, and is in no student's way."""
    control, batch = make_control("SelfDistilled", tokenizers).train(), make_tokens(4)
    assert control.teacher is None
    control.average.load_state_dict(control.student.state_dict())
    before = copy.deepcopy(control.average)
    same = control.losses(batch)
    assert same["feature"] == 0
    assert same["logit"].item() == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        for parameter in control.student.parameters():
            parameter.add_(0.1)
    terms = control.losses(batch, batch_generator(torch.device("cpu"), 1))
    assert terms["feature"] > 0
    terms["loss"].backward()
    assert all(p.grad is None for p in control.average.parameters())
    trained = {id(p) for group in control.parameters_to_train() for p in group["params"]}
    assert trained == {id(p) for p in control.student.parameters()}
    control.follow(0.75)
    for new, old, own in zip(
        control.average.parameters(), before.parameters(), control.student.parameters(), strict=True
    ):
        torch.testing.assert_close(new, 0.75 * old + 0.25 * own)


def gradients_of(term: Tensor, module: nn.Module) -> bool:
    """Whether a term of the loss moves a module."""
    found = torch.autograd.grad(term, list(module.parameters()), retain_graph=True, allow_unused=True)
    return any(g is not None and g.any() for g in found)


def test_the_inner_copy_moves_what_lies_before_it(tokenizers: list[str]) -> None:
    """1 - cosine between the projected middle of the student and the last features of the teacher."""
    lever, batch = make_control("InnerCopy", tokenizers).train(), make_tokens(4)
    step = lever.step_inputs(batch)
    terms = lever.terms(step)
    trace = lever.student.trace(step.labels, step.inputs)
    taught = lever.teacher(lever.student, trace, step.labels, step.inputs, step.alias).hidden[-1]
    own = lever.projector(trace.hidden[1]).double()
    cosine = (own * taught).sum(-1) / own.norm(dim=-1) / taught.norm(dim=-1)
    assert terms["feature"].item() == pytest.approx(1 - cosine.mean().item(), rel=1e-5)
    moved = [lever.projector, lever.student.blocks[0], lever.student.blocks[1], lever.teacher]
    assert [gradients_of(terms["feature"], module) for module in moved] == [True, True, False, False]
    torch.testing.assert_close(terms["loss"], terms["student"] + terms["teacher"] + terms["feature"])
    trained = {id(p) for group in lever.parameters_to_train() for p in group["params"]}
    assert {id(p) for p in lever.projector.parameters()} < trained


def test_the_sharper_input_holds_the_answer(tokenizers: list[str]) -> None:
    """What the average reads at a scale is f_hat with that scale's own tokens in it."""
    lever, batch = make_control("SharperInput", tokenizers).train(), make_tokens(4)
    quantizer, read = lever.vae.quantizer, lever.sharper(torch.cat(batch.structure, 1))
    stages = quantizer.stages(batch.structure)
    averaged = [F.adaptive_avg_pool2d(f, n).flatten(2).transpose(1, 2) for f, n in zip(stages, SIDES, strict=True)]
    torch.testing.assert_close(read, torch.cat(averaged[1:], 1))
    terms = lever.losses(batch, batch_generator(torch.device("cpu"), 1))
    moved = [lever.projector, lever.student.blocks[0], lever.student.blocks[1]]
    assert [gradients_of(terms["feature"], module) for module in moved] == [True, True, False]
    assert not any(p.requires_grad for p in lever.average.parameters())


def test_soft_targets_are_a_gaussian_over_the_codes(tokenizers: list[str]) -> None:
    lever, batch = make_control("SoftTargets", tokenizers, **ALONE).eval(), make_tokens(4)
    codes = lever.vae.codebook.embedding.weight.double()
    squares = (codes[:, None] - codes).square().sum(-1)
    apart = (squares + 1e9 * torch.eye(8)).min(1).values.mean()
    weights = (-squares / apart).exp()
    weights = weights / weights.sum(1, keepdim=True)
    torch.testing.assert_close(lever.neighbourhood().double(), weights, atol=1e-6, rtol=1e-5)
    targets = torch.cat(batch.structure, 1)
    log_probs = lever.student(batch.labels, lever.vae.var_inputs(batch.structure)).double().log_softmax(-1)
    soft = -(weights[targets] * log_probs).sum(-1).mean()
    hard = make_control("FVARTask", tokenizers, **ALONE).eval().losses(batch)["student"]
    assert lever.losses(batch)["loss"].item() == pytest.approx(0.7 * hard.item() + 0.3 * soft.item(), rel=1e-5)


def test_continuous_alias_is_what_the_codes_stand_for(tokenizers: list[str]) -> None:
    lever = make_control("ContinuousAlias", tokenizers).eval()
    batch = make_batch()
    step = lever.step_inputs(lever.tokens(batch))
    plain = make_taught_task(tokenizers).eval()
    known = plain.step_inputs(plain.tokens(batch))
    codebook = lever.alias_tokenizer.codebook
    nearest = codebook(codebook.nearest(step.alias.flatten(0, 1))).view_as(step.alias)
    torch.testing.assert_close(nearest, known.alias)
    assert not torch.equal(step.alias, known.alias)
    assert torch.equal(step.targets, known.targets)
    assert torch.equal(step.inputs, known.inputs)


def test_an_aligned_teacher_begins_as_the_student_and_looks_at_its_own_place(tokenizers: list[str]) -> None:
    lever, batch = make_control("AlignedAlias", tokenizers).eval(), make_tokens(4)
    for block in lever.teacher.blocks:
        torch.nn.init.zeros_(block.cross.proj.weight)
    torch.testing.assert_close(lever.losses(batch)["teacher"], lever.losses(batch)["student"])
    step = lever.step_inputs(batch)
    alias = step.alias.requires_grad_()
    for block in lever.teacher.blocks[:1]:
        torch.nn.init.normal_(block.cross.proj.weight)
        block.cross.log_bias.data.fill_(5)
    trace = lever.student.trace(step.labels, step.inputs)
    gates = lever.teacher.blocks[0].cross(trace.hidden[0], lever.teacher.alias_embed(alias), lever.teacher.reads)
    corner = LAYOUT.slices[-2].start  # of the last scale that has alias tokens of its own
    (read,) = torch.autograd.grad(gates[:, corner].square().sum(), alias)
    strength = read.abs().sum((0, 2))
    assert strength[corner] > 0.99 * strength.sum()


def test_every_arm_names_what_there_is() -> None:
    from arms import ARMS, OPTICS, TOKENS

    for arm in ARMS.values():
        assert TOKENS[arm.tokens][0] in OPTICS
        assert issubclass(locate(arm.task if "." in arm.task else f"fvar_lightning.{arm.task}"), FVARTask), arm
        for argument in arm.arguments:
            assert Path(argument.removeprefix("--config=")).is_file()
    for _, arguments in TOKENS.values():
        for argument in arguments:
            if argument.startswith("--model="):
                assert issubclass(locate(argument.removeprefix("--model=")), TokenizerTask), argument


def make_batch() -> ImageBatch:
    images = torch.rand(4, 3, LAYOUT.image_size, LAYOUT.image_size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    refocus = Refocus(LAYOUT)
    blurred = refocus.blur(images)
    return ImageBatch(images, torch.tensor([0, 1, 1, 0]), refocus.views(images, blurred), blurred)


@pytest.mark.parametrize("name", ["Committed", "Drawn", "Passing", "TokenizerTask"])
def test_ties_between_features_by_their_formulas(name: str) -> None:
    """Beside `TokenizerTask` of the same weights; the blurred views of one get no gradients."""
    import token_levers

    options = {"schedule": LAYOUT, "warmup_steps": 0, "noise": (0.0, 0.0), **SMALL}
    plain = TokenizerTask(**options)
    sharp = {"sharp_commitment": 0.25} if name in ("Passing", "TokenizerTask") else {}
    lever = getattr(token_levers, name)(**options, **sharp)
    for task in (plain, lever):
        task.tokenizer.codebook.step()
        task.load_state_dict(plain.state_dict())
    batch = make_batch()
    views = [view.requires_grad_() for view in batch.views.focused]
    added = lever.run(batch, None).loss - plain.run(batch, None).loss
    vae = lever.tokenizer
    z, f_hats = vae.features(views), vae.quantizer.stages(vae.encode(views))

    def apart(a: Tensor, b: Tensor) -> Tensor:
        return (F.adaptive_avg_pool2d(a, b.shape[-1]) - b).square().mean()

    expected = {
        "Committed": 0.75 * sum(apart(f, own) for f, own in zip(f_hats, z, strict=True)),
        "Drawn": 0.1 * sum(apart(z[-1], own) for own in z[:-1]),
    }
    sharp_commitment = 0.25 * sum(apart(z[-1], f) for f in f_hats[:-1])
    torch.testing.assert_close(added, expected.get(name, sharp_commitment) / len(z))
    gradients = torch.autograd.grad(lever.run(batch, None).loss, views, materialize_grads=True)
    assert [bool(g.any()) for g in gradients] == [name != "Passing"] * (len(views) - 1) + [True]


def test_a_smooth_decoder_begins_with_bilinear_interpolation() -> None:
    import token_levers

    task = token_levers.Smooth(schedule=LAYOUT, **SMALL)
    for up in (module for module in task.tokenizer.decoder.modules() if isinstance(module, Upsample2x)):
        x = torch.rand(1, up.conv.in_channels, 6, 6)
        smooth = F.interpolate(x, scale_factor=2, mode="bilinear") + up.conv.bias[:, None, None]
        torch.testing.assert_close(up(x)[..., 1:-1, 1:-1], smooth[..., 1:-1, 1:-1])


def test_the_loss_on_the_grid_sees_the_grid_alone() -> None:
    import token_levers

    patch, side = LAYOUT.patch_size, 16 * LAYOUT.patch_size
    images = torch.zeros(2, 3, side, side)
    places = torch.arange(side)

    def added(error: Tensor) -> float:
        task = token_levers.GridLoss(schedule=LAYOUT, **SMALL, perceptual="none")
        passed = Reconstruction([images + error], [images], [], torch.zeros(()))
        return float(task.further_losses(passed, torch.zeros(()), {}))

    wave = 0.2 * torch.cos(2 * math.pi * places / patch)
    # half the square of the amplitude, ten times; the sign that changes from patch to patch has another period
    assert added(wave.expand_as(images)) == pytest.approx(10 * 0.02, rel=1e-5)
    assert added((wave * (-1) ** (places // patch)).expand_as(images)) == pytest.approx(0, abs=1e-9)
    assert added(torch.full_like(images, 0.3)) == pytest.approx(0, abs=1e-9)


def test_a_copy_of_a_folder_has_the_same_contents(image_folder: Path, tmp_path: Path) -> None:
    """Whose fingerprint is another, for the files are newer; with a byte more in its files it is another folder."""
    from sets import contents

    original = ImageDataModule(str(image_folder)).real_images("train")
    shutil.copytree(image_folder, tmp_path / "copy", copy_function=shutil.copyfile)
    copy = ImageDataModule(str(tmp_path / "copy")).real_images("train")
    assert contents(copy) == contents(original)
    assert fingerprint(copy) != fingerprint(original)
    for file in (tmp_path / "copy" / "red").iterdir():
        file.write_bytes(file.read_bytes() + b"\0")
    assert contents(copy) != contents(original)


def test_every_optics_has_a_schedule_of_the_sets(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from arms import OPTICS
    from sets import QUICKSTART, images_of

    for options in OPTICS.values():
        with pytest.raises(SystemExit, match="0"):
            main(["fit", f"--config={QUICKSTART / 'structure.yaml'}", *images_of("FashionMNIST", str(tmp_path), 0),
                  *options, "--print_config"])  # fmt: skip
        schedule = FocusSchedule(**yaml.safe_load(capsys.readouterr().out)["data"]["init_args"]["schedule"])
        assert (schedule.num_scales, schedule.image_size) == (6, 32)

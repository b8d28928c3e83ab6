"""The tables of the studies by hand, and the controls of the ablation against what they stand beside."""

import copy
from pathlib import Path

import pytest
import torch
import yaml

from evaluation_worker import make_taught_task, write_tokenizers
from fvar_lightning.cli import main
from fvar_lightning.schedule import FocusSchedule
from fvar_lightning.tasks.fvar import FVARTask
from fvar_lightning.tasks.training import batch_generator
from test_teacher_gap import make_tokens

STUDIES = Path(__file__).parents[1] / "studies"


@pytest.fixture(autouse=True)
def studies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(STUDIES))


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return write_tokenizers(tmp_path_factory.mktemp("tokenizers"))


def make_control(name: str, tokenizers: list[str]) -> FVARTask:
    """With the weights of `make_taught_task`, as far as it has them."""
    import controls

    plain = make_taught_task(tokenizers)
    options = {"num_classes": 2, "depth": 2, "width": 32, "heads": 2}
    control = getattr(controls, name)(*tokenizers, **options)
    control.load_state_dict(plain.state_dict(), strict=False)
    return control


def test_differences_are_paired_by_seed() -> None:
    from tables import differences, paired, spread, values

    found = {0: {"fd": 10.0}, 1: {"fd": 13.0}, 2: {"fd": 13.0}, 3: {}}
    baseline = {0: {"fd": 12.0}, 1: {"fd": 15.5}, 2: {"fd": 14.5}, 3: {"fd": 1.0}, 4: {"fd": 1.0}}
    assert values(found, "fd") == [10, 13, 13]
    assert spread(values(found, "fd")) == "12 ± 1.7 (3)"
    assert differences(found, baseline, "fd") == [-2, -2.5, -1.5]
    # standard deviation 0.5, over the root of 3 seeds
    assert paired(differences(found, baseline, "fd")) == "**-2 ± 0.29** (3)"
    assert paired([-1.0, 1.0]) == "+0 ± 1 (2)"
    assert (paired([]), spread([])) == ("-", "-")


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


def test_every_arm_names_what_there_is() -> None:
    from arms import ARMS, OPTICS, TOKENS

    for arm in ARMS.values():
        assert TOKENS[arm.tokens][0] in OPTICS
        for argument in arm.arguments:
            assert Path(argument.removeprefix("--config=")).is_file()


def test_every_optics_has_a_schedule_of_the_sets(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from arms import OPTICS
    from sets import QUICKSTART, images_of

    for options in OPTICS.values():
        with pytest.raises(SystemExit, match="0"):
            main(["fit", f"--config={QUICKSTART / 'structure.yaml'}", *images_of("FashionMNIST", str(tmp_path), 0),
                  *options, "--print_config"])  # fmt: skip
        schedule = FocusSchedule(**yaml.safe_load(capsys.readouterr().out)["data"]["init_args"]["schedule"])
        assert (schedule.num_scales, schedule.image_size) == (6, 32)

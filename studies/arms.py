"""What the ablation compares. A new arm is a line in `ARMS`, and one in `TOKENS` or `OPTICS` if it has other tokens."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fvar_lightning.cli import configs

OPTICS: dict[str, list[str]] = {
    "disk": [],
    "none": ["--data.psf=none"],
    "gaussian": ["--data.psf=gaussian"],
    "lanczos": ["--data.psf=lanczos"],
    "nyquist": [f"--config={Path(__file__).with_name('nyquist.yaml')}"],
    "per_scale": ["--data.schedule.focus_states=6"],
}
"""Views, and with them alias residuals: arguments of all stages that read images."""

SHARP_COMMITMENT = "--model.sharp_commitment=0.25"
OCTAVES = "--model.texture_octaves=2"

TOKENS: dict[str, tuple[str, list[str]]] = {
    "view": ("disk", []),
    "full": ("disk", ["--model.targets=full"]),
    "feature": ("disk", ["--model.targets=feature"]),
    "unfocused": ("none", []),
    "whole": ("disk", ["--model.scale_dropout=0"]),
    "whole_feature": ("disk", ["--model.targets=feature", "--model.scale_dropout=0"]),
    "whole_unfocused": ("none", ["--model.scale_dropout=0"]),
    "sharp_feature": ("none", ["--model.targets=feature"]),
    "gaussian": ("gaussian", []),
    "lanczos": ("lanczos", []),
    "nyquist": ("nyquist", []),
    "per_scale": ("per_scale", []),
    "committed": ("disk", ["--model=token_levers.Committed"]),
    "sharp_committed": ("disk", [SHARP_COMMITMENT]),
    "drawn": ("disk", ["--model=token_levers.Drawn"]),
    "passing": ("disk", ["--model=token_levers.Passing", SHARP_COMMITMENT]),
    "smooth": ("disk", ["--model=token_levers.Smooth"]),
    "grid_loss": ("disk", ["--model=token_levers.GridLoss"]),
    "octaves": ("disk", [OCTAVES]),
    "octaves_feature": ("disk", [OCTAVES, "--model.targets=feature"]),
}
"""Structure tokenizers: their optics and arguments of their stage."""


def override(name: str) -> str:
    """A configuration of `configs/ablation`, as an argument."""
    return f"--config={configs() / 'ablation' / f'{name}.yaml'}"


@dataclass(frozen=True)
class Arm:
    """A row of the table."""

    tokens: str = "view"
    """In `TOKENS`."""
    alias: Literal["own", "structure", "none"] = "own"
    """What makes alias tokens: the alias tokenizer, the structure tokenizer, or nothing."""
    arguments: tuple[str, ...] = ()
    """Of stage 2."""
    task: str = "FVARTask"
    """Class of stage 2."""
    cached: bool = True
    """Whether stage 2 reads tokens from a cache, or images."""


ALONE = (override("no_teacher"),)

PAPER = {
    "var": Arm("feature", "none", ALONE),
    "next_focus": Arm(arguments=ALONE),
    "fvar": Arm(),
    "no_refocusing": Arm("unfocused", "none", ALONE),
    "gaussian": Arm("gaussian"),
    "no_dual": Arm(alias="structure"),
}
"""The rows of the paper's Table 3: the baseline, next-focus tokens alone, everything, and everything without a part."""

CONTROLS = {
    "shuffled_alias": Arm(task="controls.ShuffledAlias"),
    "self_distilled": Arm(task="controls.SelfDistilled"),
    "undistilled": Arm(arguments=(override("no_distillation"),)),
    "detached": Arm(arguments=(override("detached_trunk"),)),
}
"""What else could help: a second loss without the image's alias, an average of the student, the teacher's loss on the
shared trunk alone; or hinder: that loss."""

OURS = {
    "late": Arm(arguments=(override("late_distillation"),)),
    "late_detached": Arm(arguments=(override("detached_trunk"), override("late_distillation"))),
    "sharp_alias": Arm(arguments=(override("sharp_alias"),)),
    "lanczos": Arm("lanczos"),
    "lanczos_alone": Arm("lanczos", arguments=ALONE),
    "nyquist": Arm("nyquist"),
    "nyquist_alone": Arm("nyquist", arguments=ALONE),
    "per_scale_alone": Arm("per_scale", "none", ALONE),
    "whole_alone": Arm("whole", arguments=ALONE),
    "whole_var": Arm("whole_feature", "none", ALONE),
    "whole_no_refocusing": Arm("whole_unfocused", "none", ALONE),
    "sharp_var": Arm("sharp_feature", "none", ALONE),
    "full": Arm("full"),
    "full_alone": Arm("full", arguments=ALONE),
}
"""Other readings: when the teacher helps, other filters and schedules, what the tokens stand for. `whole_` tokenizers
decode whole token sequences only, without scale dropout; `sharp_var` decodes early tokens to the sharp image too.
`per_scale_alone` has no alias tokens: on Fashion-MNIST its narrow blurs leave too few to begin a codebook with."""

LEVERS = {
    "committed_alone": Arm("committed", arguments=ALONE),
    "sharp_committed_alone": Arm("sharp_committed", arguments=ALONE),
    "drawn_alone": Arm("drawn", arguments=ALONE),
    "passing_alone": Arm("passing", arguments=ALONE),
    "octaves_alone": Arm("octaves", arguments=ALONE),
    "octaves_var": Arm("octaves_feature", "none", ALONE),
    "smooth_alone": Arm("smooth", arguments=ALONE),
    "grid_loss_alone": Arm("grid_loss", arguments=ALONE),
    "early": Arm(arguments=(override("early_distillation"),)),
    "next_alias": Arm(arguments=(override("next_alias"),)),
    "all_alias": Arm(arguments=(override("all_alias"),)),
    "from_images": Arm(cached=False),
    "continuous_alias": Arm(task="levers.ContinuousAlias", cached=False),
    "aligned": Arm(task="levers.AlignedAlias"),
    "aligned_undistilled": Arm(arguments=(override("no_distillation"),), task="levers.AlignedAlias"),
    "inner_copy": Arm(task="levers.InnerCopy"),
    "sharper_input": Arm(task="levers.SharperInput"),
    "soft_targets": Arm(arguments=ALONE, task="levers.SoftTargets"),
    "corrupted": Arm(arguments=(*ALONE, override("token_corruption"))),
    "var_corrupted": Arm("feature", "none", (*ALONE, override("token_corruption"))),
}
"""What may better it: how the views' features are tied, what the teacher sees, what the student copies and reads."""

ARMS = PAPER | CONTROLS | OURS | LEVERS

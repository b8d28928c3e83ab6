"""Writes the tables of documents anew, from the figures of the runs in the folder results beside them.

    python studies/results.py docs/results.md docs/tokenizers.md

Every table stands below a comment that says what is in it, in words of a command (`arguments`):

    <!-- table: arms scenes-1250-1200 --seeds 0 1 2 --arms var next_focus --columns fd/real grid -->
"""

import argparse
import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from arms import ARMS
from report import DETAIL, MAIN, by_scale, overview, read_figures
from sets import STAGE_2_STEPS, TOKENIZER_STEPS
from tables import Figures, differences, markdown, p_value, paired, spread, values

from fvar_lightning.atomic import replacing

TITLES = MAIN | DETAIL | {"cross_entropy/all": "held-out nats a token", "teacher_gap/all": "teacher's gap, nats"}
SHOWN = (
    "fd/real",
    "fd/reconstructions",
    "kd/real",
    "spectrum/tilt_low",
    "spectrum/distance_mid",
    "spectrum/distance_high",
    "high_band",
    "grid",
)
RACE = ("fd/reconstructions", "kd/real", "spectrum/distance_high", "high_band", "grid")
TABLE = re.compile(r"(<!-- table: (.*?) -->\n)\n?(?:\|.*\n)*\n?")


def arguments() -> argparse.ArgumentParser:
    """Of a table."""
    parser = argparse.ArgumentParser(description="what is in a table", exit_on_error=False)
    parser.add_argument("kind", choices=("arms", "tokenizers", "scales", "race"))
    parser.add_argument(
        "studies",
        nargs="+",
        help="folder of the figures; for a race with :first-last seeds, or one, and :folder of the baseline's",
    )
    parser.add_argument("--seeds", type=int, nargs="+", help="all by default")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=["var", "next_focus"], help="of a race, two")
    parser.add_argument("--baselines", nargs="+", choices=ARMS, default=["var"], help="which arms differences are to")
    parser.add_argument("--budget", default="steps", help="of arms: steps, time, or such as 'guidance 3.0'")
    parser.add_argument("--columns", nargs="+", choices=TITLES, default=SHOWN)
    parser.add_argument("--figure", help="of a table by scales, such as teacher_gap")
    return parser


def table(words: Sequence[str], folder: Path) -> str:
    """In Markdown, from the figures below the folder."""
    asked = arguments().parse_args(list(words))
    if asked.kind == "race":
        return race([study.split(":") for study in asked.studies], *asked.arms, folder)
    kinds = figures_of(folder / asked.studies[0], asked.seeds)
    columns = {figure: TITLES[figure] for figure in asked.columns}
    if asked.kind == "tokenizers":
        tokens = {ARMS[arm].tokens: kinds["tokenizers"][ARMS[arm].tokens] for arm in asked.arms}
        return overview(tokens, [ARMS[arm].tokens for arm in asked.baselines], columns)
    arms = {arm: kinds[asked.budget][arm] for arm in asked.arms}
    return by_scale(arms, asked.figure) if asked.kind == "scales" else overview(arms, asked.baselines, columns)


def figures_of(study: Path, seeds: Sequence[int] | None) -> dict[str, dict[str, Figures]]:
    """Of a study, by kind and name: of these seeds, or all."""
    return {
        kind: {
            name: {seed: figures for seed, figures in found.items() if seeds is None or seed in seeds}
            for name, found in results.items()
        }
        for kind, results in read_figures(study / "figures.csv").items()
    }


def race(studies: Sequence[Sequence[str]], baseline: str, arm: str, folder: Path) -> str:
    """Two arms in several studies, a line each: folder, "first-last" of its seeds or the only one, and the folder of
    the baseline where that is another."""
    rows = []
    for study, seeds, *others in studies:
        ends = [int(seed) for seed in seeds.split("-")]
        folders = [folder / name for name in (*others, study)]
        mine, own = (figures_of(f, range(ends[0], ends[-1] + 1)) for f in (folders[0], folders[-1]))
        a, b = mine["steps"][baseline], own["steps"][arm]
        before, after = mine["tokenizers"][ARMS[baseline].tokens], own["tokenizers"][ARMS[arm].tokens]
        ahead = differences(b, a, "fd/real")
        rows.append([
            " against ".join(steps_of(f) for f in folders),
            seeds.replace("-", " to "),
            *(spread(values(found, "fd/real")) for found in (a, b)), paired(ahead),
            f"{p_value(ahead):.2g}" if len(ahead) > 1 else "-",
            *(paired(differences(b, a, figure)) for figure in RACE), paired(differences(after, before, "fd/real")),
            " / ".join(f"{mean(values(found, 'settled')):.1%}" for found in (a, b)),
        ])  # fmt: skip
    head = ["steps of tokenizers / students", "seeds", f"`{baseline}`", f"`{arm}`", "difference", "p",
            *(TITLES[figure] for figure in RACE), "reconstructions alone",
            f"cross-entropy still moves (`{baseline}` / `{arm}`)"]  # fmt: skip
    return markdown(head, rows)


def steps_of(study: Path) -> str:
    """Of its tokenizers and students."""
    inputs = json.loads((study / "inputs.json").read_text())["inputs"]
    return f"{round(TOKENIZER_STEPS * inputs['tokenizer_effort'])} / {round(STAGE_2_STEPS * inputs['effort'])}"


def renewed(text: str, folder: Path) -> str:
    """A document with its tables made from the figures below the folder.

    Raises:
        ValueError: naming the comment that asks for what is not there.
    """

    def replace(found: re.Match[str]) -> str:
        try:
            return f"{found[1]}\n{table(shlex.split(found[2]), folder)}\n\n"
        except (argparse.ArgumentError, KeyError, OSError) as error:
            raise ValueError(f"no table can be made of {found[2]!r}: {error!r}") from error

    return TABLE.sub(replace, text)


def main(args: Sequence[str] | None = None) -> None:
    """Rewrite documents."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("documents", type=Path, nargs="+")
    for path in parser.parse_args(args).documents:
        text = renewed(path.read_text(), path.parent / "results")
        with replacing(path) as beside:
            beside.write_text(text)


if __name__ == "__main__":
    main()

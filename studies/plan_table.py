"""The table of docs/scaling.md: every shipped configuration of a real size on eight GPUs of 80 GiB.

    python studies/plan_table.py [options of fvar plan: --gpus 8 --memory 80 --tflops 312 --utilisation 0.4]

Counted, not measured on GPUs; see `fvar plan --help` for what is assumed.
"""

import sys
from math import ceil

from fvar_lightning.cli import configs
from fvar_lightning.planning.command import Planner
from fvar_lightning.planning.plan import GIB, Plan, duration

STAGE_1 = ("structure_base", "structure_var", "alias_base")
HEADER = (
    "| configuration | trainer | parameters | tokens | images a GPU | TFLOP an image | memory of a GPU | "
    "largest batch | whole run |\n|---|---|---|---|---|---|---|---|---|"
)


def row(name: str, options: list[str]) -> str:
    """Of one configuration; sharded where the weights of every GPU would not fit."""
    made = plan(name, "ddp_bf16", options)
    trainer = "DDP"
    if not made.fits:
        sharded = plan(name, "fsdp2_bf16", options) if name.startswith("fvar") else made
        made, trainer = (sharded, "FSDP2") if sharded.fits else (made, "DDP")
    trained = sum(count for network, count in made.parameters.items() if "frozen" not in network)
    batch = f"{made.batch_size}" + (f" x {made.accumulate}" if made.accumulate > 1 else "")
    memory = f"{ceil(sum(made.memory.values()) / GIB)} GiB" + ("" if made.fits else ", too much")
    work = f"{made.flops / 1e12:.2g}" + (f" + {made.frozen_flops / 1e12:.2g}" if made.frozen_flops else "")
    cells = [name, trainer, f"{trained / 1e6:.0f} M", made.tokens, batch, work, memory, made.largest_batch,
             duration(made.seconds)]  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |"


def plan(name: str, trainer: str, options: list[str]) -> Plan:
    """With a trainer's configuration."""
    planner = Planner()
    files = [configs() / f"{name}.yaml", configs() / "trainer" / f"{trainer}.yaml"]
    return planner.plan(planner.parser.parse_args([*(f"--config={file}" for file in files), *options]))


def main(options: list[str]) -> None:
    """Print the table."""
    names = [f"tokenizer/{name}" for name in STAGE_1] + sorted(path.stem for path in configs().glob("fvar_*.yaml"))
    print(HEADER)
    for name in names:
        print(row(name, options), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])

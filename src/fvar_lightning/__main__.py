"""`python -m fvar_lightning` and the console script `fvar`: chooses the command."""

import sys

COMMANDS = {
    "generate": "images of classes, with a trained model",
    "edit": "new content in a picture, with a trained model",
    "demo": "a page in the browser to play with a trained model",
    "export": "a trained model in a form to use or publish",
    "plan": "parameters, work, memory and time of a configuration, before it is run",
    "quickstart": "all stages, small, on the photographs bundled with scikit-image",
}
"""Beside those of LightningCLI (fit, validate, test, predict)."""


def run(args: list[str] | None = None) -> None:
    """Run the command line with the given arguments, those of the process by default.

    Raises:
        SystemExit: with status 2 if an argument is refused; the message names it.
    """
    args = sys.argv[1:] if args is None else args
    command = args[0] if args else ""
    # imported when chosen: generating and exporting need no Lightning
    if command == "generate":
        from fvar_lightning.commands.generate import generate_command

        generate_command(args[1:])
    elif command == "edit":
        from fvar_lightning.commands.edit import edit_command

        edit_command(args[1:])
    elif command == "demo":
        from fvar_lightning.commands.demo.command import demo_command

        demo_command(args[1:])
    elif command == "export":
        from fvar_lightning.weights.export import export_command

        export_command(args[1:])
    elif command == "plan":
        from fvar_lightning.planning.command import plan_command

        plan_command(args[1:])
    elif command == "quickstart":
        from fvar_lightning.quickstart import quickstart_command

        quickstart_command(args[1:])
    else:
        from fvar_lightning.cli import main

        main(args, also=COMMANDS)


if __name__ == "__main__":
    run()

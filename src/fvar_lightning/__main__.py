"""`python -m fvar_lightning` and the console script `fvar`."""

from fvar_lightning.cli import main


def run() -> None:
    """Run the command line of this process."""
    main()


if __name__ == "__main__":
    run()

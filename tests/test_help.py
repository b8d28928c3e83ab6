"""Every option of the command line says what it does."""

import argparse

import pytest
from jsonargparse import ArgumentParser, capture_parser
from lightning.pytorch.cli import LightningArgumentParser

from fvar_lightning.__main__ import COMMANDS, run
from fvar_lightning.cli import COMPONENTS


def silent(parser: argparse.ArgumentParser) -> list[str]:
    """Options without a help, those of the groups' configuration files and of other libraries aside."""
    return [
        name
        for action in parser._actions
        for name in action.option_strings[:1]
        if not name.startswith("--trainer.") and len(str(action.help or "").split()) < 2
    ]


def of_class(component: type) -> ArgumentParser:
    parser = LightningArgumentParser()
    parser.add_class_arguments(component, "of")
    return parser


@pytest.mark.parametrize("component", COMPONENTS, ids=lambda component: component.__name__)
def test_every_option_of_a_configuration_has_a_help(component: type) -> None:
    assert silent(of_class(component)) == []


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_of_a_command_has_a_help(command: str) -> None:
    parser = capture_parser(run, [command])
    assert [action for action in parser._actions if action.dest != "help"]
    assert silent(parser) == []


def test_an_option_without_a_help_is_found() -> None:
    def entries_together(width: int = 1, height: int = 1, depth: int = 1) -> None:
        """What must not be.

        Args:
            width, height: of a thing.
            depth: how far it reaches.
        """

    parser = ArgumentParser()
    parser.add_function_arguments(entries_together)
    assert silent(parser) == ["--width", "--height"]

"""The command group, and the one place where errors become a paragraph and an exit code."""

import os
import signal
import sys
import traceback
from typing import Any, NoReturn

import click

from ctpd import __version__
from ctpd.cli.signals import Stopped, end_with_parent, stopped_by_signals
from ctpd.core.errors import CtpdError
from ctpd.core.printing import printable

_RESUME = "What is finished is kept; the same command continues from there."
COMMANDS = {
    "run": "ctpd.cli.recipes:run",
    "rehearse": "ctpd.cli.rehearse:rehearse",
    "train": "ctpd.cli.recipes:train",
    "eval": "ctpd.cli.recipes:evaluate",
    "compare": "ctpd.cli.recipes:compare",
    "recipes": "ctpd.cli.recipes:recipes",
    "init": "ctpd.cli.recipes:init",
    "help": "ctpd.cli.reference:explain",
    "inspect": "ctpd.cli.inspect:inspect",
    "export": "ctpd.cli.artifacts:export",
    "store": "ctpd.cli.artifacts:store",
    "doctor": "ctpd.cli.artifacts:doctor",
}
SUMMARIES = {
    "run": "Train, evaluate and compare everything that is missing.",
    "rehearse": "Try a whole recipe in minutes, with tiny models, before it is run.",
    "train": "Train the students, with all stages that they need.",
    "eval": "lm-evaluation-harness on what is trained, or on any model.",
    "compare": "Write the tables and the report from the records.",
    "recipes": "List the shipped recipes; print or copy one.",
    "init": "Write a recipe for your own pair of models and data.",
    "help": "What a key of a recipe, method or suite means.",
    "inspect": "Show pairs, aligned spans, tokenizers and weights.",
    "export": "Write a trained model as a plain transformers directory.",
    "store": "List and remove artifacts: du, rm, gc.",
    "doctor": "Check the environment and say what to do.",
}


class LazyGroup(click.Group):
    """Imports a command when it is used, so that `ctpd --help` is instant."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The commands in the order in which they are used."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one command."""
        import importlib

        if cmd_name not in COMMANDS:
            return None
        module, _, name = COMMANDS[cmd_name].partition(":")
        command: click.Command = getattr(importlib.import_module(module), name)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Offer the nearest name for an unknown command."""
        from ctpd.core.config import nearest

        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            ctx.fail(f"There is no command '{args[0]}'.{nearest(args[0], COMMANDS)}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(SUMMARIES.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="ctpd")
def cli() -> None:
    """Align a small language model with the preferences of a bigger one that has another tokenizer.

    RECIPE is a shipped name (`ctpd recipes`) or the path of a YAML file.
    """


def main(args: list[str] | None = None) -> Any:
    """Run the command line; exit 2 for the user's input, 1 for our errors, a traceback only with --debug."""
    end_with_parent()
    argv = sys.argv[1:] if args is None else args
    debug = "--debug" in argv
    try:
        with stopped_by_signals():
            result = cli.main(args=args, prog_name="ctpd", standalone_mode=False, obj=list(argv))
        _leave_finished()
        return result
    except click.exceptions.Exit as error:
        if error.exit_code == 0:
            _leave_finished()
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except Stopped as error:
        _stop(error, f"Stopped by {error.signal.name}. {_RESUME}", 128 + error.signal)
    except click.Abort as error:
        _stop(error, f"Stopped. {_RESUME}", 128 + signal.SIGINT)
    except Exception as error:
        code, text = _paragraph(error)
        if not _left_to_parent(error, traceback.format_exc() if debug else text, code):
            if debug:
                raise
            click.echo("\n".join(map(printable, f"Error: {text}".split("\n"))), err=True)
        sys.exit(code)


def _stop(error: BaseException, text: str, code: int) -> NoReturn:
    """End with a sentence on standard error, if it can still be written to: the terminal may be gone."""
    if not _left_to_parent(error, text, code):
        try:
            click.echo(text, err=True)
            sys.stdout.flush()
        except OSError:
            sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (the interpreter flushes them at its end)
    sys.exit(code)


def _leave_finished() -> None:
    from ctpd.cli.launch import leave_finished

    leave_finished()


def _left_to_parent(error: BaseException, text: str, code: int) -> bool:
    from ctpd.cli.launch import leave_error

    return leave_error(error, text, code)


def _paragraph(error: Exception) -> tuple[int, str]:
    """The exit code and the text of an error."""
    from ctpd.core.disk import explained

    error = explained(error) or error
    if isinstance(error, CtpdError):
        return error.exit_code, str(error)
    return 1, (
        f"{type(error).__name__}: {' '.join(str(error).split())} This is a fault of ctpd; what is finished is kept. "
        "Run the same command with --debug for the traceback."
    )

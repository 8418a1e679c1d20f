"""The commands, and what holds for all of them.

torch and transformers take seconds to import: each command imports them once its arguments are known to be good.
"""

from __future__ import annotations

import math
import warnings
from typing import Annotated

import typer

import prunepath
from prunepath.cli.convert import convert
from prunepath.cli.demo import demo
from prunepath.cli.evaluate import evaluate
from prunepath.cli.fields import with_fields
from prunepath.cli.generate import generate
from prunepath.cli.info import info
from prunepath.cli.pack import pack
from prunepath.cli.report import report
from prunepath.cli.train import train
from prunepath.errors import PrunePathError


class Group(typer.core.TyperGroup):
    def main(self, *arguments, **options):
        try:
            return super().main(*arguments, **options)
        except SystemExit as end:
            if end.code == 130:
                typer.echo("Interrupted.", err=True)
            raise

    def invoke(self, ctx):
        """An expected error is one sentence and exit code 2, whichever command meets it; an interrupt is 130."""
        warnings.showwarning = lambda message, *rest, **more: typer.echo(f"Warning: {message}", err=True)
        try:
            return super().invoke(ctx)
        except PrunePathError as error:
            typer.echo(f"Error: {error}", err=True)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            raise typer.Exit(130) from None


class Command(typer.core.TyperCommand):
    def invoke(self, ctx):
        for name, value in ctx.params.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise PrunePathError(f"--{name.replace('_', '-')} must be a finite number, got {value}.")
        return super().invoke(ctx)


app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich doubles the time that help takes
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Turn a language model's feed-forward networks into experts, and choose per token how many run.",
)
for name, command in {
    "convert": convert,
    "train": train,
    "eval": evaluate,
    "report": report,
    "generate": generate,
    "pack": pack,
    "info": info,
    "demo": demo,
}.items():
    app.command(name, cls=Command)(with_fields(command))


def print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"prunepath {prunepath.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Holds the options that stand before a command."""

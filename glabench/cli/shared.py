"""What every verb needs: how an error is told, and how a document is printed."""

import json
import sys
from typing import Any

import typer
from typer.core import TyperGroup

from glabench.errors import GlabenchError

INTERRUPTED = 130


class Group(TyperGroup):
    """Turns a GlabenchError into one line on stderr and exit code 2; `--debug` keeps the traceback."""

    def invoke(self, ctx: typer.Context) -> Any:
        try:
            return super().invoke(ctx)
        except GlabenchError as err:
            if ctx.params.get("debug"):
                raise
            if "--json" in sys.argv:
                print_json({"error": {"what": err.what, "where": err.where, "fix": err.fix}})
            else:
                typer.echo(f"error: {err}", err=True)
            raise typer.Exit(err.exit_code) from None
        except KeyboardInterrupt:
            again = "" if ctx.invoked_subcommand in ("data", "train", "tune") else " with --resume"
            typer.echo(f"interrupted: what is written is safe; the same command{again} goes on", err=True)
            raise typer.Exit(INTERRUPTED) from None


def print_json(document: Any) -> None:
    typer.echo(json.dumps(document, indent=1))


def say(text: str) -> None:
    typer.echo(text, err=True)

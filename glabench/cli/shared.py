"""What every verb needs: how an error is told, and how a document is printed."""

import json
import sys
from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperGroup

from glabench.errors import DONE, RESULT_SAYS_NO, GlabenchError

INTERRUPTED = 130
RESUMABLE = ("speed", "memory", "decode", "run", "throughput", "extrapolate", "lm-eval", "recall")


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
            typer.echo(f"interrupted: {_what_now(ctx.invoked_subcommand)}", err=True)
            raise typer.Exit(INTERRUPTED) from None


def _what_now(verb: str | None) -> str:
    """What a user who broke a verb off does next."""
    if verb in ("data", "train"):
        return "what is written is safe; the same command goes on"
    if verb in RESUMABLE:
        return "what is written is safe; the same command with --resume goes on"
    return "the same command begins anew"


def print_json(document: Any) -> None:
    typer.echo(json.dumps(document, indent=1))


def tell(found: Any, show: Callable[[Any], None], *, json_: bool) -> None:
    """Print what a runner found, as one JSON document or as it shows it."""
    if json_:
        print_json(found)
    else:
        show(found)


def finish(asked: Any, runner: Any, report: Any, *, dry_run: bool, json_: bool) -> None:
    """Plan or run what was asked for and tell it; `report` is what the run reports its progress to."""
    if dry_run:
        tell(runner.plan(asked), runner.show_plan, json_=json_)
        return
    with report as watch:
        done = runner.run(asked, watch)
    tell(done, runner.show, json_=json_)
    raise typer.Exit(RESULT_SAYS_NO if done["bad"] else DONE)


def say(text: str) -> None:
    typer.echo(text, err=True)

"""The command line: parse, call a runner, print. No logic."""

from typing import Annotated

import typer

from glabench.cli import layers, models, quality
from glabench.cli.shared import Group

app = typer.Typer(
    cls=Group,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    no_args_is_help=True,
    help="Honest benchmarks of gated linear attention and the layers it is compared with.",
    epilog="Example: glabench speed --seqlen 1k..16k",
)


def main() -> None:
    """Entry point of `glabench` and `python -m glabench`."""
    app(prog_name="glabench")


def show_version(asked: bool) -> None:
    if asked:
        from glabench import __version__

        typer.echo(__version__)
        raise typer.Exit()


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


for verbs in (layers.app, models.app, quality.app):
    app.add_typer(verbs)

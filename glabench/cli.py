"""The command line: parse, call a runner, print. No logic."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from glabench import options as opt
from glabench.errors import DONE, RESULT_SAYS_NO, GlabenchError

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
            again = "" if ctx.invoked_subcommand in ("data", "train") else " with --resume"
            typer.echo(f"interrupted: what is written is safe; the same command{again} goes on", err=True)
            raise typer.Exit(INTERRUPTED) from None


app = typer.Typer(
    cls=Group,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    no_args_is_help=True,
    help="Honest benchmarks of gated linear attention and the layers it is compared with.",
    epilog="Example: glabench speed --seqlen 1k..16k",
)


def print_json(document: Any) -> None:
    typer.echo(json.dumps(document, indent=1))


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


@app.command(
    "list",
    short_help="Every implementation, and why one cannot run here.",
    epilog="Example: glabench list --family gla",
)
def list_(
    family: Annotated[str, typer.Option(help="Only this family.")] = "",
    device: opt.Device = "auto",
    json_: opt.Json = False,
) -> None:
    """Every implementation, what a family's name resolves to, and why one cannot run here."""
    from glabench.runners import listing

    entries = listing.entries(device, family or None)
    if json_:
        print_json(entries)
    else:
        listing.show(entries)


@app.command(
    short_help="Compare implementations with the float64 oracle.",
    epilog="Example: glabench verify gla_chunk_torch mamba_torch",
)
def verify(
    impls: Annotated[
        list[str] | None, typer.Argument(help="Families, ids or files; default: all that run here.")
    ] = None,
    impl: Annotated[str, typer.Option(help="The same, separated by commas.")] = "",
    family: opt.FamilyOf = "",
    device: opt.Device = "auto",
    json_: opt.Json = False,
) -> None:
    """Compare implementations with the float64 oracle; exit code 1 where one is off."""
    from glabench.runners import verifying

    names = (*(impls or ()), *(n for n in impl.split(",") if n))
    report = verifying.verify(names, device=device, family=family or None, say=say)
    if json_:
        print_json(report)
    else:
        verifying.show(report)
    raise typer.Exit(DONE if report["ok"] else RESULT_SAYS_NO)


def say(text: str) -> None:
    typer.echo(text, err=True)


def _finish(request: Any, *, dry_run: bool, json_: bool) -> None:
    from glabench import progress
    from glabench.runners import measuring

    measuring.tell_resolved(request, say)
    if dry_run:
        plan = measuring.plan(request)
        if json_:
            print_json(plan)
        else:
            measuring.show_plan(plan)
        return
    with progress.watch() as watch:
        done = measuring.run(request, watch)
    if json_:
        print_json(done)
    else:
        measuring.show_rows(done)
    raise typer.Exit(RESULT_SAYS_NO if done["bad"] else DONE)


def measure_grid(
    ctx: typer.Context,
    seqlen: opt.Seqlen = "1k..16k",
    impl: opt.Impl = "gla,attention,mamba,retention",
    family: opt.FamilyOf = "",
    shape: opt.ShapeName = "",
    passes: opt.Passes = "fwd,fwd_bwd",
    tokens: opt.Tokens = "",
    batch: opt.Batch = None,
    dtype: opt.Dtype = "",
    device: opt.Device = "auto",
    cell_limit: opt.CellLimit = None,
    cold_limit: opt.ColdLimit = None,
    out: opt.Out = None,
    resume: opt.Resume = False,
    dry_run: opt.DryRun = False,
    seed: opt.Seed = 0,
    json_: opt.Json = False,
) -> None:
    from glabench.runners import measuring

    request = measuring.from_grid(
        ctx.info_name,
        {
            "seqlen": seqlen,
            "shape": shape,
            "passes": passes,
            "tokens": tokens,
            "batch": batch,
            "dtype": dtype,
        },
        argv=sys.argv[1:],
        impl=impl,
        family=family or None,
        device=device,
        limits={"cell_limit_s": cell_limit, "cold_limit_s": cold_limit},
        out=out,
        resume=resume,
        seed=seed,
    )
    _finish(request, dry_run=dry_run, json_=json_)


app.command(
    "speed",
    short_help="Time implementations, each checked before it is timed.",
    help="Time implementations against sequence length, each checked before it is timed.",
    epilog="Example: glabench speed --seqlen 1k..16k",
)(measure_grid)
app.command(
    "memory",
    short_help="Measure peak memory beyond the inputs.",
    help="Measure peak memory beyond the inputs: outputs, what backward keeps, workspace.",
    epilog="Example: glabench memory --seqlen 1k..16k --passes fwd_bwd",
)(measure_grid)


@app.command(
    short_help="Run a suite: the cells that a TOML file names.",
    epilog="Example: glabench run suites/quick.toml",
)
def run(
    suite: Annotated[str, typer.Argument(help="A .toml file, or the name of a shipped suite.")],
    impl: Annotated[str, typer.Option(help="Instead of the suite's implementations.")] = "",
    family: opt.FamilyOf = "",
    shape: Annotated[str, typer.Option(help="Only these of the suite's shapes.")] = "",
    device: opt.Device = "auto",
    cell_limit: opt.CellLimit = None,
    cold_limit: opt.ColdLimit = None,
    out: opt.Out = None,
    resume: opt.Resume = False,
    dry_run: opt.DryRun = False,
    json_: opt.Json = False,
) -> None:
    """Run a suite: the cells that a TOML file names, speed and memory."""
    from glabench.runners import measuring

    request = measuring.from_suite(
        suite,
        argv=sys.argv[1:],
        impl=impl,
        family=family or None,
        shape=shape,
        device=device,
        limits={"cell_limit_s": cell_limit, "cold_limit_s": cold_limit},
        out=out,
        resume=resume,
    )
    _finish(request, dry_run=dry_run, json_=json_)


@app.command(
    short_help="The shipped model configurations.",
    epilog="Example: glabench models --json",
)
def models(json_: opt.Json = False) -> None:
    """The shipped model configurations: parameters, layers, width, bytes of state."""
    from glabench.runners import models as catalog

    entries = catalog.entries()
    if json_:
        print_json(entries)
    else:
        catalog.show(entries)


@app.command(
    short_help="Write a checkpoint in another layout.",
    epilog="Example: glabench convert gla-340M-15B gla-340m --layout glabench",
)
def convert(
    source: Annotated[str, typer.Argument(metavar="IN", help="A local folder: config.json, safetensors.")],
    target: Annotated[str, typer.Argument(metavar="OUT", help="A folder that is not there yet.")],
    layout: Annotated[str, typer.Option(help="fla (flash-linear-attention's) or glabench.")],
    json_: opt.Json = False,
) -> None:
    """Write a local checkpoint in flash-linear-attention's layout, or in this suite's."""
    from glabench.runners import models as catalog

    done = catalog.convert(source, target, layout)
    if json_:
        print_json(done)
    else:
        typer.echo(
            f"wrote {target}: {done['tensors']} tensors of {done['model_type']}, {done['layout']} layout"
        )


@app.command(
    short_help="Draw the figures of a folder of results.",
    epilog="Example: glabench report results --out reports",
)
def report(
    folder: Annotated[
        Path, typer.Argument(help="A folder of results; every suite and device below it.")
    ] = Path("results"),
    out: Annotated[Path, typer.Option(help="Where the figures and index.html go.")] = Path("reports"),
    json_: opt.Json = False,
) -> None:
    """Draw the figures of a folder of results, and one self-contained page of them."""
    from glabench import report as page

    written = page.build(folder, out)
    if json_:
        print_json({"page": str(written)})
    else:
        typer.echo(f"wrote {written}")


@app.command(
    short_help="What this machine is, and what would spoil a timing.", epilog="Example: glabench doctor"
)
def doctor(device: opt.Device = "auto", json_: opt.Json = False) -> None:
    """Say what this machine is, what it reaches, and what would spoil a timing here."""
    from glabench.runners import doctor as checks

    findings = checks.examine(device)
    if json_:
        print_json(findings)
    else:
        checks.show(findings)
    raise typer.Exit(DONE if findings["ok"] else RESULT_SAYS_NO)


data = typer.Typer(cls=Group, rich_markup_mode=None, no_args_is_help=True)
app.add_typer(
    data,
    name="data",
    short_help="Prepare text for training.",
    help="Prepare text for training.",
    epilog="Example: glabench data prepare texts --out prepared",
)


@data.command(
    short_help="Turn a folder of text into token shards.",
    epilog="Example: glabench data prepare texts --out prepared --tokenizer bytes",
)
def prepare(
    folder: Annotated[
        Path, typer.Argument(help="Text: .txt, .jsonl, .parquet; .xz, .gz, .zst of them; or a data set.")
    ],
    out: Annotated[Path, typer.Option(help="Folder of the shards and of manifest.json.")],
    tokenizer: Annotated[str, typer.Option(help="mistral, bytes, or a .model or .json file.")] = "mistral",
    valid: Annotated[Path | None, typer.Option(help="A folder of validation text.")] = None,
    valid_frac: Annotated[
        float | None, typer.Option(help="Share of the documents kept for validation; default 0.01.")
    ] = None,
    shard_tokens: Annotated[int, typer.Option(min=1, help="Tokens at which a shard is full.")] = 1 << 26,
    field: Annotated[str, typer.Option(help="The key or column that holds the text.")] = "text",
    json_: opt.Json = False,
) -> None:
    """Turn a folder of text into token shards; run again, it goes on or finds them done."""
    from glabench.runners import data as preparing

    done = preparing.prepare(
        folder,
        out,
        tokenizer=tokenizer,
        valid=valid,
        valid_frac=valid_frac,
        shard_tokens=shard_tokens,
        field=field,
        say=say,
    )
    if json_:
        print_json(done)
    else:
        preparing.show(done)


@app.command(
    short_help="Train a language model; the same command resumes.",
    epilog="Example: glabench train gla-tiny --data prepared --out runs/gla-tiny",
)
def train(
    config: Annotated[str, typer.Argument(help="A shipped configuration, or a .toml file.")],
    data: Annotated[Path, typer.Option(help="A folder that `glabench data prepare` made.")],
    out: Annotated[Path, typer.Option(help="Folder of metrics.csv and of the checkpoints.")],
    steps: Annotated[
        int | None, typer.Option(min=1, help="Optimiser steps; default the configuration's.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the weights and of the data order.")] = 0,
    micro_batch: Annotated[
        int | None, typer.Option(min=1, help="Sequences in one forward pass; default the configuration's.")
    ] = None,
    device: opt.Device = "auto",
    json_: opt.Json = False,
) -> None:
    """Train a language model on prepared data; the same command with the same --out resumes."""
    from glabench.runners import train as training

    done = training.train(
        config, data, out, steps=steps, seed=seed, micro_batch=micro_batch, device=device, say=say
    )
    if done is None:
        return
    if json_:
        print_json(done)
    else:
        training.show(done)

"""The verbs that measure layers, and the figures of what was measured: parse, call a runner, print."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from glabench.cli import options as opt
from glabench.cli.shared import finish, print_json, say, tell
from glabench.errors import DONE, RESULT_SAYS_NO

app = typer.Typer()


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
    tell(entries, listing.show, json_=json_)


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
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Processes at once; default 1, on a GPU by the cores.")
    ] = None,
    json_: opt.Json = False,
) -> None:
    """Compare implementations with the float64 oracle; exit code 1 where one is off."""
    from glabench.runners import verifying

    names = (*(impls or ()), *(n for n in impl.split(",") if n))
    report = verifying.verify(names, device=device, family=family or None, say=say, jobs=jobs)
    tell(report, verifying.show, json_=json_)
    raise typer.Exit(DONE if report["ok"] else RESULT_SAYS_NO)


def _finish(request: Any, *, dry_run: bool, json_: bool) -> None:
    from glabench import progress
    from glabench.runners import measuring

    measuring.tell_resolved(request, say)
    finish(request, measuring, progress.watch(), dry_run=dry_run, json_=json_)


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
    short_help="Time one token against the context before it.",
    epilog="Example: glabench decode --context 1k..64k --batch 1,64",
)
def decode(
    context: Annotated[str, typer.Option(help="Tokens a sequence, the new one with them.")] = "1k..64k",
    batch: Annotated[str, typer.Option(help="Sequences a step; default 1, on a GPU 1,64.")] = "",
    impl: opt.Impl = "gla,attention,mamba,retention",
    family: opt.FamilyOf = "",
    shape: opt.ShapeName = "",
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
    """Time one token with a state, or with a key-value cache, against the context before it."""
    from glabench.runners import measuring

    request = measuring.for_decode(
        {"seqlen": context, "batch": batch, "shape": shape, "dtype": dtype},
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
    short_help="Find the fastest launches of our kernels on this GPU.",
    epilog="Example: glabench tune --shape 340m --limit 300",
)
def tune(
    shape: Annotated[str, typer.Option(help="Shapes to tune for; default 340m,1.3b,fig2.")] = "",
    d_k: Annotated[int | None, typer.Option(help="Instead of a shape: key channels of a head.")] = None,
    d_v: Annotated[int | None, typer.Option(help="Value channels of a head.")] = None,
    heads: Annotated[int | None, typer.Option(min=1, help="Heads.")] = None,
    impl: Annotated[
        str, typer.Option(help="Our chunk kernels, by id, separated by commas.")
    ] = "gla_chunk,linear_attention_chunk,simple_gla_chunk,retention_chunk",
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32; the last two share a plan.")] = "bf16",
    device: opt.Device = "auto",
    out: Annotated[
        Path | None, typer.Option(help="The plan file; default: named after the device, in your plan folder.")
    ] = None,
    limit: Annotated[float | None, typer.Option(help="Seconds in all; what is left then is skipped.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would be tried.")] = False,
    json_: opt.Json = False,
) -> None:
    """Find the fastest launches of our kernels on this GPU, each checked before it is timed; a plan file."""
    from glabench.runners import tune as tuning
    from glabench.runners import tune_table

    request = tuning.from_command(
        shape=shape,
        widths={"--d-k": d_k, "--d-v": d_v, "--heads": heads},
        impl=impl,
        dtype=dtype,
        device=device,
        out=out,
        limit=limit,
        dry_run=dry_run,
    )
    found = tune_table.plan(request) if dry_run else tuning.run(request, say)
    if json_:
        print_json(found)
    elif dry_run:
        tune_table.show_plan(found)
    else:
        tune_table.show(found)
    raise typer.Exit(RESULT_SAYS_NO if found.get("bad") else DONE)


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
    tell(findings, checks.show, json_=json_)
    raise typer.Exit(DONE if findings["ok"] else RESULT_SAYS_NO)

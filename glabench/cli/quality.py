"""The verbs that say what trained models can do: parse, call a runner, print."""

import sys
from typing import Annotated

import typer

from glabench.cli import options as opt
from glabench.cli.shared import print_json, say
from glabench.errors import DONE, RESULT_SAYS_NO

app = typer.Typer()


@app.command(
    short_help="Train small models to recall (MQAR, Figure 4).",
    epilog="Example: glabench recall --panel quick",
)
def recall(
    panel: Annotated[
        str | None,
        typer.Option(help="quick, a or b (Figure 4's), paper (both), or a .toml file; default quick."),
    ] = None,
    mixers: Annotated[
        str, typer.Option(help="attention, gla, retnet, mamba, or GLA's ablations, gla-no-gate and so on.")
    ] = "",
    dims: Annotated[str, typer.Option(help="Widths: 64..512 (doubling), or 64,96.")] = "",
    seqlen: Annotated[int | None, typer.Option(min=1, help="Tokens of an example.")] = None,
    pairs: Annotated[int | None, typer.Option(min=1, help="Pairs of key and value in it.")] = None,
    vocab: Annotated[int | None, typer.Option(min=1, help="Half of it keys, half values.")] = None,
    lrs: Annotated[str, typer.Option(help="Learning rates of the sweep, such as 1e-3,1e-2.")] = "",
    seeds: Annotated[int | None, typer.Option(min=1, help="Seeds 0 to N - 1 of each run.")] = None,
    heads: Annotated[int | None, typer.Option(min=1, help="Of GLA and RetNet; default 2.")] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Default 2.")] = None,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="At most so many; the rate decays over them.")
    ] = None,
    examples: Annotated[int | None, typer.Option(min=1, help="Training examples.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Examples a step; default by length.")] = None,
    dtype: Annotated[str, typer.Option(help="fp32 or bf16 (autocast); default by device.")] = "",
    impl: Annotated[str, typer.Option(help="Ids that compute the mixers, instead of the chosen ones.")] = "",
    stop_sweep: Annotated[
        bool,
        typer.Option("--stop-sweep", help="Leave out a model's other rates once one has solved the task."),
    ] = False,
    compiled: Annotated[
        bool, typer.Option("--compile", help="torch.compile the models: pays from about a minute a run.")
    ] = False,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Models trained at once; default by device.")
    ] = None,
    shard: Annotated[str, typer.Option(help="I/N: only this part of the models; implies --resume.")] = "",
    device: opt.Device = "auto",
    cell_limit: Annotated[float | None, typer.Option(help="Seconds one run may take; default 7200.")] = None,
    out: opt.Out = None,
    resume: opt.Resume = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the runs; train nothing.")] = False,
    json_: opt.Json = False,
) -> None:
    """Train small models on multi-query associative recall, over widths, learning rates and seeds."""
    from glabench.runners import recall as runner
    from glabench.runners import recall_grid as grid

    typed = {
        "seqlen": seqlen,
        "pairs": pairs,
        "vocab": vocab,
        "seeds": seeds,
        "heads": heads,
        "layers": layers,
    }
    typed |= {"epochs": epochs, "examples": examples, "batch": batch, "dtype": dtype}
    asked = grid.request(
        panel,
        grid.changes(typed, mixers=mixers, dims=dims, lrs=lrs),
        device=device,
        impl=impl,
        jobs=jobs,
        out=out,
        resume=resume,
        shard=shard,
        stop_sweep=stop_sweep,
        compiled=compiled,
        cell_limit=cell_limit,
        argv=sys.argv[1:],
    )
    if dry_run:
        planned = runner.plan(asked)
        if json_:
            print_json(planned)
        else:
            runner.show_plan(planned)
        return
    done = runner.run(asked, say)
    if json_:
        print_json(done)
    else:
        runner.show(done)
    raise typer.Exit(RESULT_SAYS_NO if done["bad"] else DONE)

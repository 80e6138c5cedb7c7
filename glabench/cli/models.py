"""The verbs of language models, their data and their training: parse, call a runner, print."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from glabench.cli import options as opt
from glabench.cli.shared import Group, finish, print_json, say, tell

app = typer.Typer()


@app.command(
    short_help="The shipped model configurations.",
    epilog="Example: glabench models --json",
)
def models(json_: opt.Json = False) -> None:
    """The shipped model configurations: parameters, layers, width, bytes of state."""
    from glabench.runners import models as catalog

    entries = catalog.entries()
    tell(entries, catalog.show, json_=json_)


@app.command(
    short_help="Write a checkpoint in another layout.",
    epilog="Example: glabench convert gla-340M-15B gla-340m --layout glabench",
)
def convert(
    source: Annotated[str, typer.Argument(metavar="IN", help="A local checkpoint or a training run.")],
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
        what = f"{done['tensors']} tensors of {done['model_type']}, {done['layout']} layout"
        typer.echo(f"wrote {target} from {done['source']}: {what}")


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
    tell(done, preparing.show, json_=json_)


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
    fused: Annotated[
        bool, typer.Option("--fused", help="Liger-Kernel's loss, norms and SwiGLU, on a GPU.")
    ] = False,
    compiled: Annotated[
        bool, typer.Option("--compile", help="torch.compile the blocks: the first step takes a while.")
    ] = False,
    device: opt.Device = "auto",
    json_: opt.Json = False,
) -> None:
    """Train a language model on prepared data; the same command with the same --out resumes."""
    from glabench.runners import train as training

    done = training.train(
        config,
        data,
        out,
        steps=steps,
        seed=seed,
        micro_batch=micro_batch,
        fused=fused,
        compiled=compiled,
        device=device,
        say=say,
    )
    if done is None:
        return
    tell(done, training.show, json_=json_)


@app.command(
    short_help="Time whole training steps: tokens/s, memory, MFU.",
    epilog="Example: glabench throughput gla transformer --size tiny --points 512x2",
)
def throughput(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL",
            help="Families (gla, retnet, mamba, mamba2, transformer, gla-fla) or shipped configurations.",
        ),
    ] = None,
    size: Annotated[str, typer.Option(help="Sizes of the families; default 1.3b, tiny on a CPU.")] = "",
    points: Annotated[
        str, typer.Option(help="LENGTHxBATCH, several; default 2kx8,4kx4,8kx2,16kx1, shorter on a CPU.")
    ] = "",
    conditions: Annotated[
        str, typer.Option(help="paper (eager), modern (compiled, fused loss); default both, paper on a CPU.")
    ] = "",
    impl: Annotated[str, typer.Option(help="Implementations of the layers, by id; one a family.")] = "",
    steps: Annotated[
        int | None, typer.Option(min=1, help="Timed steps a cell; default 24, 8 on a CPU.")
    ] = None,
    warmup: Annotated[
        int | None, typer.Option(min=1, help="Steps before them; default 8, 2 on a CPU.")
    ] = None,
    device: opt.Device = "auto",
    cell_limit: Annotated[
        float | None, typer.Option(help="Seconds the timed steps may take; default 180.")
    ] = None,
    cold_limit: Annotated[
        float | None,
        typer.Option(help="Seconds building, checking and compiling may take, each; default 300."),
    ] = None,
    out: opt.Out = None,
    resume: opt.Resume = False,
    dry_run: opt.DryRun = False,
    seed: opt.Seed = 0,
    json_: opt.Json = False,
) -> None:
    """Time whole training steps of language models: tokens/s, peak memory, MFU and the step's parts."""
    from glabench.runners import throughput as training

    asked = training.request(
        models or (),
        size=size,
        points=points,
        conditions=conditions,
        impl=impl,
        device=device,
        steps=steps,
        warmup=warmup,
        cell_limit=cell_limit,
        cold_limit=cold_limit,
        out=out,
        resume=resume,
        seed=seed,
        argv=sys.argv[1:],
    )
    from glabench import progress

    finish(asked, training, progress.watch(), dry_run=dry_run, json_=json_)

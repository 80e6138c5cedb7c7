"""The verbs that say what a trained model can do: parse, call a runner, print."""

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from glabench.cli import options as opt
from glabench.cli.shared import finish, print_json, say, tell
from glabench.errors import DONE, RESULT_SAYS_NO

app = typer.Typer()


@app.command(
    short_help="Perplexity by position, beyond the training length.",
    epilog="Example: glabench extrapolate --ckpt runs/gla-tiny --ckpt runs/transformer-tiny",
)
def extrapolate(
    ckpt: Annotated[
        list[Path], typer.Option(help="A local checkpoint or a training run; give it again for more.")
    ],
    data: Annotated[
        Path | None,
        typer.Option(help="A folder of long texts, or of prepared data; default a sample of books."),
    ] = None,
    lengths: Annotated[
        str, typer.Option(help="Ends of the buckets to report: 2k..24k (each of them), or 2k,8k,24k.")
    ] = "2k..24k",
    bucket: Annotated[str, typer.Option(help="Tokens a bucket of positions.")] = "2k",
    docs: Annotated[int | None, typer.Option(min=1, help="At most so many documents.")] = None,
    state_passing: Annotated[
        bool, typer.Option("--state-passing", help="Also start each document from the state after the last.")
    ] = False,
    window: Annotated[
        int | None, typer.Option(min=2, help="Tokens of a transformer's sliding window; default as trained.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="mistral, bytes, or a .model or .json file; default the checkpoint's.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="fp32 or bf16; default fp32 on a CPU, bf16 on a GPU.")] = "",
    device: opt.Device = "auto",
    out: Annotated[
        Path | None, typer.Option(help="Folder of the rows; default results/extrapolate/DEVICE.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Skip the documents that are done.")] = False,
    json_: opt.Json = False,
) -> None:
    """Perplexity of long documents by position, with intervals over documents, for any local checkpoint."""
    from glabench.runners import extrapolate as runner

    ends, size = runner.parse_lengths(lengths, bucket)
    request = runner.Request(
        checkpoints=tuple(ckpt),
        data=data,
        ends=ends,
        bucket=size,
        docs=docs,
        window=window,
        state_passing=state_passing,
        tokenizer=tokenizer,
        device=device,
        dtype=dtype,
        out=out,
        resume=resume,
        argv=tuple(sys.argv[1:]),
    )
    done = runner.run(request, say)
    tell(done, runner.show, json_=json_)
    raise typer.Exit(RESULT_SAYS_NO if done["bad"] else DONE)


@app.command(
    name="lm-eval",
    short_help="The paper's language tasks, by lm-evaluation-harness.",
    epilog="Example: glabench lm-eval --ckpt gla-340m --tasks paper --tasks-from eval",
)
def lm_eval(
    ckpt: Annotated[
        list[Path], typer.Option(help="A local checkpoint or a training run; give it again for more.")
    ],
    tasks: Annotated[
        str, typer.Option(help="paper, recall, recall-like, or names of tasks; separated by commas.")
    ] = "paper",
    tasks_from: Annotated[
        Path | None, typer.Option(help="Folder of TASK.jsonl; without it the hub's data.")
    ] = None,
    tokenizer: Annotated[
        str, typer.Option(help="A folder, a file, mistral or bytes; default the checkpoint's own.")
    ] = "",
    limit: Annotated[int | None, typer.Option(min=1, help="Documents a task; for trying out.")] = None,
    shots: Annotated[int, typer.Option(min=0, help="Examples in a prompt.")] = 0,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Requests in a forward pass; default by device.")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(min=2, help="Tokens of the window; default the model's training length.")
    ] = None,
    device: opt.Device = "auto",
    dtype: Annotated[str, typer.Option(help="fp32 or bf16; default fp32 on a CPU, bf16 on a GPU.")] = "",
    out: Annotated[
        Path | None, typer.Option(help="Folder of the rows; default results/lm-eval/DEVICE.")
    ] = None,
    resume: opt.Resume = False,
    compare_hf: Annotated[
        bool,
        typer.Option("--compare-hf", help="Run the harness's own model class as well: values, speed-up."),
    ] = False,
    json_: opt.Json = False,
) -> None:
    """Score checkpoints by lm-evaluation-harness, beside the paper's Tables 2, 3 and 5."""
    from dataclasses import asdict

    from glabench.runners import lm_eval as runner

    request = runner.Request(
        checkpoints=tuple(ckpt),
        tasks=tasks,
        data=tasks_from,
        tokenizer=tokenizer,
        limit=limit,
        shots=shots,
        batch=batch,
        max_length=max_length,
        device=device,
        dtype=dtype,
        out=out,
        resume=resume,
        compare_hf=compare_hf,
        argv=tuple(sys.argv[1:]),
    )
    folder, rows = runner.run(request, say)
    if json_:
        print_json({"folder": str(folder), "rows": [asdict(row) for row in rows]})
    else:
        runner.show(folder, rows)
    raise typer.Exit(DONE if runner.went_well(rows) else RESULT_SAYS_NO)


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
    finish(asked, runner, nullcontext(say), dry_run=dry_run, json_=json_)

"""The command line's options that several verbs share."""

from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Impl = Annotated[
    str,
    typer.Option(
        help="Families (the best one that runs here), ids, or FILE.py:FUNCTION; separated by commas."
    ),
]
FamilyOf = Annotated[str, typer.Option("--family", help="What a FILE.py:FUNCTION computes.")]
Out = Annotated[Path | None, typer.Option(help="Folder of the rows; default results/SUITE/DEVICE.")]
Resume = Annotated[bool, typer.Option("--resume", help="Skip the cells that the last run finished.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print the cells, their memory and the time; measure nothing.")
]
CellLimit = Annotated[float | None, typer.Option(help="Seconds a cell may take, compilation apart.")]
ColdLimit = Annotated[float | None, typer.Option(help="Seconds compilation and autotuning may take a cell.")]
Seqlen = Annotated[str, typer.Option(help="Lengths: 1k..16k (doubling), or 512,1k,3000.")]
ShapeName = Annotated[
    str, typer.Option("--shape", help="cpu, 340m, 1.3b or fig2, or several; default by device.")
]
Passes = Annotated[str, typer.Option(help="fwd, bwd, fwd_bwd; separated by commas.")]
Tokens = Annotated[str, typer.Option(help="Tokens a call: the batch is this over the length.")]
Batch = Annotated[int | None, typer.Option(min=1, help="Sequences a call, instead of --tokens.")]
Dtype = Annotated[str, typer.Option(help="fp32, bf16 or fp16; default by device.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the inputs and of the visiting order.")]

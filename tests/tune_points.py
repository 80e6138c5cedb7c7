"""Runs in a process of its own, under Triton's interpreter: one tiny tuning, end to end.

Takes the plan file's path; prints the report of runners.tune.run as JSON, and the plan that is then in force.
"""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported, here and in the workers

from glabench.cases import Shape
from glabench.kernels import gla_configs
from glabench.kernels.plan_files import FOLDER, Launch, Point
from glabench.runners import tune


def main():
    """Tune linear attention at one small width."""
    out = Path(sys.argv[1])
    request = tune.Request(
        impls=("linear_attention_chunk",),
        shapes=(Shape("test", heads=1, d_k=16, d_v=32, head_dim=32),),
        dtype="fp32",
        device="cpu",
        out=out,
        tokens=33,
        seqlen=33,
        compile_tokens=33,
        max_busy_s=0.1,
        variants={
            64: {"gradient": [Launch(16, 4, 1), Launch(24, 1, 1)]},  # one that does not compile
            32: {"state": [Launch(16, 4, 1)]},
        },
    )
    report = tune.run(request, lambda text: print(text, file=sys.stderr))  # noqa: T201
    os.environ[FOLDER] = str(out.parent)
    plan = gla_configs.plan_for(16, 32, 0, True, None)
    other = gla_configs.plan_for(16, 32, 0, False, None) == gla_configs.rule(Point(16, 32, 0, False))
    print(json.dumps({"report": report, "in_force": asdict(plan), "others_are_the_rule": other}))  # noqa: T201


if __name__ == "__main__":
    main()

"""Train and evaluate the small models of the paper's quality claims; what a time limit cuts off goes on.

    tools/quality.py STEP... --corpus FOLDER     STEP: data tune main tbptt ablations evaluate all

data       text -> tokens; files named valid* are the validation split, else 1% of the documents
tune       every family for --tune-tokens at each of --rates
main       the families for --tokens at the rate of --lr, or the one that `tune` found best
tbptt      GLA on sequences of --segments segments, the state carried over and the gradient not
ablations  Table 4: GLA, its gates and its heads, for --ablation-tokens, with --seeds seeds each
evaluate   the last checkpoints of main and tbptt by `glabench extrapolate` on the documents of --books, and
           those of main by `glabench lm-eval` on the files of --tasks-from

`main`, `tbptt` and `ablations` run side by side, --jobs runs a GPU at a time, all GPUs at once. A run that
meets --limit, or --total for everything, saves a checkpoint and goes on with the next call that has the same
--site. Curves, settings, rows and a summary are packed into OUT/quality.tar.gz whatever happens. The last
checkpoints of the runs of --weights go to OUT/RUN.tar.00, .01 and on, in bf16: `cat RUN.tar.* | tar x`.
"""

import argparse
import csv
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

from quality_site import Site, Work, bring_weights, say

FAMILIES = ("mamba", "gla", "retnet", "transformer")  # the slowest to train first
ABLATIONS = ("", "-no-gate", "-fixed-decay", "-scalar-gate", "-1-head", "-8-heads")
STEPS = ("data", "tune", "main", "tbptt", "ablations", "evaluate")
# each needs what the one before made; within one, what takes longest goes first: segments are small steps
TOGETHER = (("tune",), ("tbptt", "main", "ablations"), ("evaluate",))
RATE = 1e-3  # where neither --lr nor `tune` says another
KEPT = ("metrics.csv", "train.json")
EVALUATED = {"extrapolate": ("main-", "tbptt-"), "lm-eval": ("main-",)}  # verb -> the runs it is for
SUMMARY = (
    "run",
    "model",
    "seed",
    "lr",
    "steps",
    "of_steps",
    "tokens",
    "valid_loss",
    "train_loss",
    "tokens_per_s",
)


@dataclass(frozen=True)
class Job:
    """One training run: its folder's name, its model's table and its settings."""

    name: str
    model: str
    seed: int
    train: dict

    def toml(self) -> str:
        lines = [f'[model]\nname = "{self.model}"\n[train]']
        return "\n".join([*lines, *(f"{k} = {json.dumps(v)}" for k, v in self.train.items())]) + "\n"


def size(text: str) -> int:
    """ "300m" -> 300,000,000."""
    unit = {"k": 10**3, "m": 10**6, "b": 10**9}.get(text[-1:].lower(), 1)
    return round(float(text[:-1] if unit > 1 else text) * unit)


def folder(text: str) -> Path:
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"no folder {text!r}; check the path")
    return Path(text)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("steps", nargs="+", choices=(*STEPS, "all"))
    parser.add_argument("--corpus", type=folder, help="folder of text, for `data`")
    parser.add_argument(
        "--data", type=folder, help="folder that `glabench data prepare` made: no --corpus then"
    )
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "out")))
    parser.add_argument(
        "--site", type=Path, default=Path.home() / "quality", help="where runs live between calls"
    )
    parser.add_argument("--size", default="30m")
    parser.add_argument("--tokenizer", default="mistral", help="mistral, bytes or a file")
    parser.add_argument("--tokens", type=size, default=size("300m"))
    parser.add_argument("--tune-tokens", type=size, default=size("40m"))
    parser.add_argument("--ablation-tokens", type=size, default=size("100m"))
    parser.add_argument("--rates", default="1e-3,2e-3,4e-3")
    parser.add_argument("--lr", default="", help="gla=2e-3,mamba=1e-3: instead of what `tune` found")
    parser.add_argument("--seeds", type=int, default=2, help="of the ablations")
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--segments", type=int, default=12, help="of `tbptt`; the paper's 12 x 2K")
    parser.add_argument("--batch-tokens", type=int, default=64 * 2048)
    parser.add_argument("--micro-batch", type=int, default=16)
    parser.add_argument("--families", default=",".join(FAMILIES))
    parser.add_argument(
        "--books", type=folder, help="long documents, for `evaluate`; default the shipped sample"
    )
    parser.add_argument("--lengths", default="2k..24k", help="of `evaluate`: ends of buckets of 2k positions")
    parser.add_argument("--tasks-from", type=folder, help="folder of TASK.jsonl; without it no lm-eval")
    parser.add_argument("--tasks", default="paper,recall-like")
    parser.add_argument("--eval-batch", type=int, default=128, help="requests in a forward pass of lm-eval")
    parser.add_argument("--docs", type=int, help="books, and documents a task, at most; for trying out")
    parser.add_argument("--jobs", type=int, default=1, help="runs a GPU at a time")
    parser.add_argument("--limit", type=float, default=540, help="seconds a run")
    parser.add_argument("--total", type=float, default=560, help="seconds of this call, packing apart")
    parser.add_argument("--reserve", type=float, default=0, help="of them, kept from training for `evaluate`")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--plain", action="store_true", help="without Liger-Kernel's fused operations")
    parser.add_argument("--compile", action="store_true", help="torch.compile the models' blocks")
    parser.add_argument(
        "--weights", default="", help="runs whose last weights come back, as main-gla,main-mamba"
    )
    return parser.parse_args()


# --- the steps --------------------------------------------------------------------------------------------


def prepare(site: Site) -> bool:
    """Tokens from the corpus; files named valid* apart. Idempotent, and cut off it goes on."""
    corpus = site.args.corpus
    if corpus is None or site.args.data:
        if (site.data / "manifest.json").exists():
            return True
        raise SystemExit(f"no data in {site.data}: name text with --corpus, or prepared tokens with --data")
    text = {part: site.args.site / "text" / part for part in ("train", "valid")}
    for path in sorted(p for p in corpus.iterdir() if p.is_file()):
        part = "valid" if path.name.startswith("valid") else "train"
        text[part].mkdir(parents=True, exist_ok=True)
        if not (text[part] / path.name).exists():
            shutil.copyfile(path, text[part] / path.name)
    words = [
        "data",
        "prepare",
        str(text["train"]),
        "--out",
        str(site.data),
        "--tokenizer",
        site.args.tokenizer,
    ]
    words += ["--valid", str(text["valid"])] if text["valid"].is_dir() else []
    ended = site.command("data", site.args.total, *words)
    say(f"data: {ended}")
    return ended == "done"


def settings(site: Site, tokens: int, lr: float, segments: int = 1) -> dict:
    """[train] for a budget: warm-up of a hundred steps or a twentieth, decay to a tenth, twelve evaluations.

    The batch is --batch-tokens, or the nearest whole number of sequences to it.
    """
    args, sequence = site.args, segments * site.args.seqlen
    batch = sequence * max(1, round(args.batch_tokens / sequence))
    steps = max(2, tokens // batch)
    every = max(1, steps // 12)
    return {
        "steps": steps, "batch_tokens": batch, "seqlen": args.seqlen, "segments": segments,
        "warmup_steps": max(1, steps // 20, min(100, steps // 4)), "lr": lr, "lr_end": lr / 10,
        "weight_decay": 0.01, "micro_batch": args.micro_batch, "eval_every": every, "save_every": 2 * every,
        "keep": 1, "fused": site.fused, "compile": args.compile,
    }  # fmt: skip


def rate(site: Site, family: str) -> float:
    """--lr, else the best of `tune`, else RATE."""
    given = dict(pair.split("=") for pair in site.args.lr.split(",") if pair)
    if family in given:
        return float(given[family])
    tuned = [r for r in summary(site) if r["run"].startswith(f"tune-{family}-") and r["valid_loss"]]
    return float(min(tuned, key=lambda r: float(r["valid_loss"]))["lr"]) if tuned else RATE


def jobs(site: Site, step: str) -> list[Job]:
    args, families = site.args, site.args.families.split(",")
    if step == "tune":
        return [
            Job(f"tune-{f}-{lr}", f"{f}-{args.size}", 0, settings(site, args.tune_tokens, float(lr)))
            for lr in args.rates.split(",")
            for f in families
        ]
    if step == "main":
        return [
            Job(f"main-{f}", f"{f}-{args.size}", 0, settings(site, args.tokens, rate(site, f)))
            for f in families
        ]
    lr = rate(site, "gla")
    if step == "tbptt":
        carried = settings(site, args.tokens, lr, segments=args.segments)
        return [Job(f"tbptt-gla-{args.segments}x{args.seqlen}", f"gla-{args.size}", 0, carried)]
    train = settings(site, args.ablation_tokens, lr)
    return [
        Job(f"ablation-gla{change}-s{seed}", f"gla-{args.size}{change}", seed, train)
        for seed in range(args.seeds)
        for change in ABLATIONS
    ]


def training(site: Site, job: Job) -> Work:
    """The run as a command, its settings in a file of its own."""
    path = site.args.site / f"{job.name}.toml"
    path.write_text(job.toml(), encoding="utf-8")
    words = ("train", str(path), "--data", str(site.data), "--out", str(site.runs / job.name))
    return Work(job.name, (*words, "--seed", str(job.seed)), lambda: finished(site, job))


def finished(site: Site, job: Job) -> bool:
    rows = _rows(site.runs / job.name)
    return bool(rows) and int(rows[-1]["step"]) == job.train["steps"] and bool(rows[-1]["valid_loss"])


def evaluations(site: Site) -> list[Work]:
    """A command a verb and worker, over the checkpoints that it has not been through."""
    found = []
    for verb, words in verbs(site).items():
        waiting = [
            (run, mark) for run in checkpoints(site, verb) if not (mark := _mark(site, verb, run)).exists()
        ]
        for part in filter(None, (waiting[n :: len(site.workers)] for n in range(len(site.workers)))):
            first, *more = (run.name for run, _ in part)
            named = [word for run, _ in part for word in ("--ckpt", str(run))]
            found.append(
                Work(
                    f"{verb}-{first}{f'+{len(more)}' if more else ''}",
                    (verb, *named, *words, "--out", str(site.evaluation / verb), "--resume"),
                    is_done=lambda: False,
                    when_done=lambda part=part: [mark.touch() for _, mark in part],
                    grace_s=2.0,
                )
            )
    return found


def verbs(site: Site) -> dict[str, list[str]]:
    """Each verb of `evaluate` with what it is asked, checkpoints apart."""
    args = site.args
    own = ["--tokenizer", args.tokenizer] if Path(args.tokenizer).is_file() else []
    asked = {"extrapolate": ["--lengths", args.lengths, *own]}
    asked["extrapolate"] += ["--data", str(args.books)] if args.books else []
    asked["extrapolate"] += ["--docs", str(args.docs)] if args.docs else []
    if args.tasks_from:
        asked["lm-eval"] = ["--tasks", args.tasks, "--tasks-from", str(args.tasks_from), *own]
        asked["lm-eval"] += [] if args.device == "cpu" else ["--batch", str(args.eval_batch)]
        asked["lm-eval"] += ["--limit", str(args.docs)] if args.docs else []
    return asked


def checkpoints(site: Site, verb: str) -> list[Path]:
    """Runs with a checkpoint, of those that the verb is for."""
    runs = (run for run in sorted(site.runs.iterdir()) if run.name.startswith(EVALUATED[verb]))
    return [run for run in runs if _newest(run)]


def _newest(run: Path) -> str:
    return max((path.name for path in run.glob("checkpoints/step-*")), default="")


def _mark(site: Site, verb: str, run: Path) -> Path:
    """A file that says: this checkpoint went through this command."""
    asked = hashlib.sha256(" ".join(verbs(site)[verb]).encode()).hexdigest()[:8]
    return site.evaluation / f".{verb}-{run.name}-{_newest(run)}-{asked}"


# --- what comes back --------------------------------------------------------------------------------------


def _rows(run: Path) -> list[dict[str, str]]:
    return _table(run / "metrics.csv")


def _table(path: Path) -> list[dict[str, str]]:
    """Whole lines of a CSV."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    return list(csv.DictReader(text[: text.rfind("\n") + 1].splitlines()))


def summary(site: Site) -> list[dict[str, str]]:
    """One line a run: how far it is, its last validation loss, its mean loss over the last 200 steps."""
    found = []
    for run in sorted(p for p in site.runs.iterdir() if p.is_dir()):
        rows, identity = _rows(run), run / "train.json"
        if not rows or not identity.exists():
            continue
        said = json.loads(identity.read_text(encoding="utf-8"))["identity"]
        last, tail = rows[-1], rows[-200:]
        mean = {name: sum(float(r[name]) for r in tail) / len(tail) for name in ("loss", "tokens_per_s")}
        valid = [r["valid_loss"] for r in rows if r["valid_loss"]]
        values = (run.name, said["model"]["name"], said["seed"], said["train"]["lr"], last["step"])
        values += (said["train"]["steps"], last["tokens"], valid[-1] if valid else "")
        values += (f"{mean['loss']:.5f}", f"{mean['tokens_per_s']:.0f}")
        found.append(dict(zip(SUMMARY, map(str, values), strict=True)))
    return found


def scores(site: Site) -> list[str]:
    """A line a model and protocol with its perplexities, and a line a model and task with its scores."""
    lines: dict[tuple[str, ...], dict[str, str]] = {}
    for row in _table(site.evaluation / "extrapolate" / "extrapolate.csv"):
        end = f"{int(row['bucket']) * int(row['bucket_tokens']) // 1024}k"
        lines.setdefault((row["impl"], row["protocol"]), {})[end] = row["ppl"][:6] or row["status"]
    for row in _table(site.evaluation / "lm-eval" / "lm-eval.csv"):
        if row["status"] == "unavailable":
            continue  # no such file in --tasks-from
        metric = row["metric"] or row["status"]
        lines.setdefault((row["checkpoint"], row["task"]), {})[metric] = (
            row["value"][:6] or row["reason"][:60]
        )
    return [
        f"{name:<24} {what:<16} " + " ".join(f"{k} {v}" for k, v in found.items())
        for (name, what), found in lines.items()
    ]


def pack(site: Site) -> None:
    """OUT/quality.tar.gz: summary, curves, rows, their figures, settings, logs."""
    rows = summary(site)
    with (site.args.site / "summary.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, SUMMARY, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        done = f"step {row['steps']}/{row['of_steps']}"
        say(f"{row['run']:<32} {done:<16} valid {row['valid_loss'][:7]:<7} lr {row['lr']}")
    for line in scores(site):
        say(line)
    figures = site.args.site / "figures"
    for folder in (site.runs, site.evaluation):
        command = (sys.executable, "-m", "glabench", "report", str(folder))
        command += ("--out", str(figures / folder.name))
        subprocess.run(command, check=False, capture_output=True, timeout=60)
    kept = (site.args.site / "summary.csv", figures, site.logs, site.evaluation)
    with tarfile.open(site.args.out / "quality.tar.gz", "w:gz") as tar:
        for path in (*kept, *site.args.site.glob("*.toml")):
            if path.exists():
                tar.add(path, path.name)
        for run in sorted(site.runs.iterdir()):
            for path in (run / name for name in KEPT):
                if path.exists():
                    tar.add(path, f"runs/{path.relative_to(site.runs)}")


def weights(site: Site) -> None:
    """The last checkpoints of the runs of --weights, in OUT."""
    for run in (site.runs / name for name in site.args.weights.split(",") if name):
        if newest := _newest(run):
            bring_weights(run / "checkpoints" / newest, run.name, site.args.out)


def run(site: Site, steps: list[str]) -> None:
    """All runs of these steps, side by side."""
    if steps == ["evaluate"]:
        found = evaluations(site)
    else:
        found = [training(site, job) for step in steps for job in jobs(site, step)]
    say(f"{' '.join(steps)}: {len(found)} runs, {len(site.workers)} at a time, {site.left_s():.0f} s left")
    site.run_all(found)


def main() -> None:
    args = arguments()
    site = Site(args)
    asked = [step for step in STEPS if step in args.steps or "all" in args.steps]
    try:
        if asked == ["evaluate"] or prepare(site):
            for together in TOGETHER:
                site.kept_s = args.reserve if "evaluate" in asked and "evaluate" not in together else 0.0
                if steps := [step for step in together if step in asked]:
                    run(site, steps)
    finally:
        pack(site)
        weights(site)


if __name__ == "__main__":
    main()

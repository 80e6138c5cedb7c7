"""Train the small models of the paper's quality claims, within time limits; what is cut off goes on.

    tools/quality.py STEP... --corpus FOLDER     STEP: data tune main tbptt ablations all

data       text -> tokens; files named valid* are the validation split, else 1% of the documents
tune       every family for --tune-tokens at each of --rates
main       the families for --tokens at the rate of --lr, or the one that `tune` found best
tbptt      GLA on sequences of --segments segments, the state carried over and the gradient not
ablations  Table 4: GLA, its gates and its heads, with --seeds seeds each

One run a GPU at a time, all GPUs at once. A run that meets --limit, or --total for everything, saves a
checkpoint and goes on with the next call that has the same --site. Curves, settings and a summary are packed
into OUT/quality.tar.gz whatever happens; weights only with --weights.
"""

import argparse
import csv
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

FAMILIES = ("gla", "retnet", "mamba", "transformer")
ABLATIONS = ("", "-no-gate", "-fixed-decay", "-scalar-gate", "-1-head", "-8-heads")
STEPS = ("data", "tune", "main", "tbptt", "ablations")
RATE = 1e-3  # where neither --lr nor `tune` says another
KEPT = ("metrics.csv", "train.json")
GRACE_S = 45.0  # from the notice to the checkpoint on disk
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


def say(text: str) -> None:
    sys.stdout.write(f"[{time.strftime('%H:%M:%S')}] {text}\n")
    sys.stdout.flush()


def size(text: str) -> int:
    """ "300m" -> 300,000,000."""
    unit = {"k": 10**3, "m": 10**6, "b": 10**9}.get(text[-1:].lower(), 1)
    return round(float(text[:-1] if unit > 1 else text) * unit)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("steps", nargs="+", choices=(*STEPS, "all"))
    parser.add_argument("--corpus", type=Path, help="folder of text, for `data`")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "out")))
    parser.add_argument(
        "--site", type=Path, default=Path.home() / "quality", help="where runs live between calls"
    )
    parser.add_argument("--size", default="30m")
    parser.add_argument("--tokenizer", default="mistral")
    parser.add_argument("--tokens", type=size, default=size("300m"))
    parser.add_argument("--tune-tokens", type=size, default=size("40m"))
    parser.add_argument("--rates", default="1e-3,2e-3,4e-3")
    parser.add_argument("--lr", default="", help="gla=2e-3,mamba=1e-3: instead of what `tune` found")
    parser.add_argument("--seeds", type=int, default=2, help="of the ablations")
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--segments", type=int, default=12, help="of `tbptt`; the paper's 12 x 2K")
    parser.add_argument("--batch-tokens", type=int, default=64 * 2048)
    parser.add_argument("--micro-batch", type=int, default=16)
    parser.add_argument("--families", default=",".join(FAMILIES))
    parser.add_argument("--limit", type=float, default=540, help="seconds a run")
    parser.add_argument("--total", type=float, default=570, help="seconds of this call, packing apart")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--plain", action="store_true", help="without Liger-Kernel's fused operations")
    parser.add_argument("--weights", action="store_true", help="pack the last checkpoints' weights too")
    return parser.parse_args()


class Site:
    """Runs and their logs below one folder, and the clock of this call."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.begun = args, time.monotonic()
        self.data, self.runs, self.logs = (args.site / name for name in ("data", "runs", "logs"))
        for folder in (args.out, self.runs, self.logs):
            folder.mkdir(parents=True, exist_ok=True)
        self.gpus = self._gpus()
        self.fused = bool(self.gpus) and not args.plain

    def _gpus(self) -> list[str]:
        """Indices, one worker each; none on a CPU."""
        if self.args.device == "cpu" or not shutil.which("nvidia-smi"):
            return []
        listed = subprocess.run(("nvidia-smi", "-L"), capture_output=True, text=True, check=False).stdout
        return [str(n) for n in range(sum(line.startswith("GPU ") for line in listed.splitlines()))]

    def left_s(self) -> float:
        return self.args.total - (time.monotonic() - self.begun)

    def command(self, log: str, limit_s: float, *words: str, gpu: str | None = None) -> str:
        """Run glabench; "done", "cut" where the time ran out, or "failed"."""
        limit_s = min(limit_s, self.left_s() - GRACE_S)
        if limit_s <= 0:
            return "cut"
        root = str(Path(__file__).parents[1])
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        env = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "TRITON_CACHE_AUTOTUNING": "1"}
        env |= {} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}
        with (self.logs / f"{log}.log").open("a") as file:
            command = (sys.executable, "-m", "glabench", *words)
            process = subprocess.Popen(command, stdout=file, stderr=file, env=env, start_new_session=True)
            try:
                return "done" if process.wait(limit_s) == 0 else "failed"
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGTERM)  # training ends its step and saves
            try:
                process.wait(GRACE_S)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        return "cut"


# --- the steps --------------------------------------------------------------------------------------------


def prepare(site: Site) -> bool:
    """Tokens from the corpus; files named valid* apart. Idempotent, and cut off it goes on."""
    corpus = site.args.corpus
    if corpus is None:
        if (site.data / "manifest.json").exists():
            return True
        raise SystemExit("no data yet: name the folder of text with --corpus")
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
    """[train] for a budget: warm-up over a twentieth, decay to a tenth, twelve evaluations.

    The batch is --batch-tokens, or the nearest whole number of sequences to it.
    """
    args, sequence = site.args, segments * site.args.seqlen
    batch = sequence * max(1, round(args.batch_tokens / sequence))
    steps = max(2, tokens // batch)
    every = max(1, steps // 12)
    return {
        "steps": steps, "batch_tokens": batch, "seqlen": args.seqlen, "segments": segments,
        "warmup_steps": min(steps - 1, max(1, steps // 20)), "lr": lr, "lr_end": lr / 10,
        "weight_decay": 0.01, "micro_batch": args.micro_batch, "eval_every": every, "save_every": 2 * every,
        "keep": 1, "fused": site.fused,
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
    return [
        Job(
            f"ablation-gla{change}-s{seed}", f"gla-{args.size}{change}", seed, settings(site, args.tokens, lr)
        )
        for seed in range(args.seeds)
        for change in ABLATIONS
    ]


def train_all(site: Site, found: list[Job]) -> None:
    """A thread a GPU takes the next run until none is left or the time is over."""
    waiting: queue.SimpleQueue[Job] = queue.SimpleQueue()
    for job in found:
        waiting.put(job)

    def work(gpu: str | None) -> None:
        while True:
            try:
                job = waiting.get_nowait()
            except queue.Empty:
                return
            if finished(site, job):
                continue
            path = site.args.site / f"{job.name}.toml"
            path.write_text(job.toml(), encoding="utf-8")
            device = site.args.device if gpu is None else "cuda"
            words = ("train", str(path), "--data", str(site.data), "--out", str(site.runs / job.name))
            begun = time.monotonic()
            ended = site.command(
                job.name, site.args.limit, *words, "--seed", str(job.seed), "--device", device, gpu=gpu
            )
            say(f"{job.name}: {ended} after {time.monotonic() - begun:.0f} s{_last_words(site, job, ended)}")

    threads = [threading.Thread(target=work, args=(gpu,)) for gpu in site.gpus or [None]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def finished(site: Site, job: Job) -> bool:
    rows = _rows(site.runs / job.name)
    return bool(rows) and int(rows[-1]["step"]) == job.train["steps"] and bool(rows[-1]["valid_loss"])


def _last_words(site: Site, job: Job, ended: str) -> str:
    if ended != "failed":
        return ""
    lines = (site.logs / f"{job.name}.log").read_text(errors="replace").strip().splitlines()
    return f": {lines[-1]}" if lines else ""


# --- what comes back --------------------------------------------------------------------------------------


def _rows(run: Path) -> list[dict[str, str]]:
    """Whole lines of metrics.csv."""
    path = run / "metrics.csv"
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


def pack(site: Site) -> None:
    """OUT/quality.tar.gz: summary, curves and their figure, settings, logs; weights where asked."""
    rows = summary(site)
    with (site.args.site / "summary.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, SUMMARY, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        done = f"step {row['steps']}/{row['of_steps']}"
        say(f"{row['run']:<32} {done:<16} valid {row['valid_loss'][:7]:<7} lr {row['lr']}")
    figures = site.args.site / "figures"
    if rows:
        report = (sys.executable, "-m", "glabench", "report", str(site.runs), "--out", str(figures))
        subprocess.run(report, check=False, capture_output=True, timeout=60)
    with tarfile.open(site.args.out / "quality.tar.gz", "w:gz") as tar:
        for path in (site.args.site / "summary.csv", figures, site.logs, *site.args.site.glob("*.toml")):
            if path.exists():
                tar.add(path, path.name)
        for run in sorted(site.runs.iterdir()):
            for name in KEPT:
                if (run / name).exists():
                    tar.add(run / name, f"runs/{run.name}/{name}")
            for path in sorted((run / "checkpoints").glob("*/*")) if site.args.weights else ():
                if path.name in ("model.safetensors", "config.json"):
                    tar.add(path, f"runs/{run.name}/{path.parent.name}/{path.name}")


def main() -> None:
    args = arguments()
    site = Site(args)
    try:
        ready = prepare(site)
        for step in STEPS[1:] if ready else ():
            if step in args.steps or "all" in args.steps:
                found = jobs(site, step)
                say(f"{step}: {len(found)} runs on {len(site.gpus) or 'no'} GPUs, {site.left_s():.0f} s left")
                train_all(site, found)
    finally:
        pack(site)


if __name__ == "__main__":
    main()

"""The training loop: micro-batches to a batch in tokens, clip, AdamW, evaluation, checkpoints."""

import hashlib
import math
import resource
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch.distributed.tensor import DTensor

from glabench.corpus.manifest import Tokens
from glabench.errors import RESULT_SAYS_NO, GlabenchError, UsageError
from glabench.meter import meter
from glabench.training import checkpoint, optimizer, processes
from glabench.training.metrics import METRICS, Metric, MetricsFile
from glabench.training.order import Order, validation_rows
from glabench.training.schedule import learning_rate
from glabench.training.segments import segment_losses
from glabench.training.settings import Settings


class TrainingError(GlabenchError):
    """A run that went wrong by itself: its loss or its gradient is no number any more."""

    exit_code = RESULT_SAYS_NO


class Trainer:
    """One run on one process or several: its model, its optimiser, and where in the data it is.

    `folder` and `manifest` are of a prepared corpus that was verified. Batches are whole sequences;
    the processes share each one equally. Raises: UsageError for a batch that does not divide.
    """

    def __init__(
        self,
        model: Any,
        settings: Settings,
        folder: Path,
        manifest: dict[str, Any],
        seed: int,
        state: PartialState,
    ) -> None:
        self.settings, self.seed, self.state = settings, seed, state
        if settings.sequences % state.num_processes:
            raise UsageError(
                f"{settings.sequences} sequences a step do not divide among {state.num_processes} processes",
                where="train.batch_tokens",
                fix="change the batch or the number of processes",
            )
        length = settings.seqlen * settings.segments
        self.order = Order(Tokens(folder, manifest, "train"), length, seed)
        self.valid = Tokens(folder, manifest, "valid")
        self.model = model.to(state.device)
        if settings.grad_checkpointing:
            _checkpoint_activations(self.model)
        if settings.fused:
            from glabench.models.fused import fuse

            fuse(self.model, operations=not settings.compile)  # a compiler fuses norms and SwiGLU itself
        processes.shard(self.model, state)
        if settings.compile:
            from glabench.models.compiling import compile_blocks

            compile_blocks(self.model)
        self.optimizer = optimizer.make(self.model, settings)
        self.step = 0

    def resume(self, out: Path) -> None:
        """Go on from the newest checkpoint, if there is one."""
        found = checkpoint.find(out)
        if found:
            self.step = checkpoint.load(found[-1][1], self.model, self.optimizer)["step"]

    def train_step(self) -> tuple[float, float]:
        """Forward, backward and, where both are finite, the update. Returns loss and gradient norm."""
        settings, mine = self.settings, self.settings.sequences // self.state.num_processes
        _seed_step(self.seed, self.step, self.state.process_index)
        first = self.step * settings.sequences + self.state.process_index * mine
        total = torch.zeros((), device=self.state.device)
        rows = self._to_device(self.order.rows(first, mine))  # at once: each copy waits for the device
        self.model.train()
        for at in range(0, mine, settings.micro_batch):
            count = min(settings.micro_batch, mine - at)
            ids = rows[at : at + count]
            # equal lengths: the mean over sequences is the mean over predicted tokens
            for loss in segment_losses(self.model, ids, settings.segments, self._autocast):
                part = loss * (count / mine / settings.segments)
                part.backward()
                total += part.detach()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        loss = processes.mean(total, self.state).item()
        if math.isfinite(loss) and math.isfinite(norm.item()):
            optimizer.set_rate(self.optimizer, learning_rate(self.step, settings))
            self.optimizer.step()
            self.step += 1
        self.optimizer.zero_grad(set_to_none=True)
        return loss, norm.item()

    @torch.no_grad()
    def evaluate(self) -> float | None:
        """Mean loss over the validation sequences, the same for any number of processes; None without any."""
        settings, length = self.settings, self.settings.seqlen
        rows = validation_rows(self.valid, length, settings.eval_tokens)
        if not rows:
            return None
        self.model.eval()
        total = torch.zeros(2, device=self.state.device, dtype=torch.float64)
        starts = range(0, rows, settings.micro_batch)
        world = self.state.num_processes
        for turn in range(-(-len(starts) // world)):
            number = turn * world + self.state.process_index
            # sharded weights need every process in every forward pass: one without a batch repeats the first
            at = starts[number] if number < len(starts) else 0
            count = min(settings.micro_batch, rows - at)
            block = self.valid.read(at * length, count * length).reshape(count, length)
            with self._autocast():
                ids = self._to_device(block)
                loss = self.model(input_ids=ids, labels=ids, use_cache=False).loss
            if number < len(starts):
                total += torch.stack([loss.double() * count, torch.tensor(float(count), device=loss.device)])
        summed = processes.mean(total, self.state)
        return (summed[0] / summed[1]).item()

    def save(self, out: Path, extra: dict[str, Any]) -> None:
        """Write a checkpoint of this step; `extra` is kept with it."""
        state = {"step": self.step, "next_sequence": self.step * self.settings.sequences, "seed": self.seed}
        checkpoint.save(
            out,
            self.model,
            self.optimizer,
            {**state, **extra},
            is_main=self.state.is_main_process,
        )
        self.state.wait_for_everyone()

    def _autocast(self) -> Any:
        enabled = self.settings.precision == "bf16"
        return torch.autocast(self.state.device.type, dtype=torch.bfloat16, enabled=enabled)

    def _to_device(self, rows: Any) -> torch.Tensor:
        return torch.from_numpy(rows).to(self.state.device, non_blocking=True)


def _checkpoint_activations(model: Any) -> None:
    """Under the name that this version of transformers has for it; 5.x renamed it."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def _seed_step(seed: int, step: int, process: int) -> None:
    """Dropout and the like depend on the step, not on how often the run was resumed."""
    digest = hashlib.blake2b(f"{seed} {step} {process}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest) >> 1)


def fit(trainer: Trainer, out: Path, extra: dict[str, Any]) -> dict[str, Any]:
    """Train from where the trainer is to the last step, writing metrics and checkpoints.

    Raises: TrainingError where the loss or the gradient is not finite; nothing of that step is kept.
    """
    with ExitStack() as stack:
        rows = None
        if trainer.state.is_main_process:
            rows = stack.enter_context(closing(MetricsFile(out / METRICS, trainer.step)))
        _fit(trainer, out, extra, rows)
    if rows:
        checkpoint.prune(out, trainer.settings.keep)
    return {"step": trainer.step, "finished": trainer.step == trainer.settings.steps}


def _fit(trainer: Trainer, out: Path, extra: dict[str, Any], rows: MetricsFile | None) -> None:
    settings, state = trainer.settings, trainer.state
    with (
        meter(settings.steps, "step", done=trainer.step, silent=rows is None) as bar,
        _asked_to_stop() as stop,
    ):
        if 0 < trainer.step < settings.steps:
            bar.say(f"going on from step {trainer.step}")
        while trainer.step < settings.steps:
            started, rate = time.perf_counter(), learning_rate(trainer.step, settings)
            loss, norm = trainer.train_step()
            spent = time.perf_counter() - started
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise _not_finite(trainer, out, loss, norm)
            if rows:  # only now: this loss is the proof that the newest checkpoint is a good one
                checkpoint.prune(out, settings.keep)
            is_last = trainer.step == settings.steps
            leave = processes.mean(torch.tensor(float(bool(stop)), device=state.device), state).item() > 0
            due = settings.eval_every and trainer.step % settings.eval_every == 0
            valid_loss = trainer.evaluate() if due or is_last else None
            if valid_loss is not None and not math.isfinite(valid_loss):
                raise _not_finite(trainer, out, valid_loss, norm)
            metric = Metric(
                step=trainer.step,
                tokens=trainer.step * settings.batch_tokens,
                loss=loss,
                lr=rate,
                grad_norm=norm,
                tokens_per_s=settings.batch_tokens / spent,
                peak_mem_mib=peak_mem_mib(state.device),
                valid_loss=valid_loss,
            )
            if rows:
                rows.append(metric)
            if is_last or leave or trainer.step % settings.save_every == 0:
                trainer.save(out, extra)
            bar.update(trainer.step, _describe(metric))
            if leave and not is_last:
                break


def _describe(metric: Metric) -> str:
    valid = "" if metric.valid_loss is None else f"  valid {metric.valid_loss:.3f}"
    return f"loss {metric.loss:.3f}{valid}  {metric.tokens_per_s:,.0f} tokens/s"


def _not_finite(trainer: Trainer, out: Path, loss: float, norm: float) -> TrainingError:
    found = checkpoint.find(out)
    if len(found) > 1 and found[-1][0] == trainer.step:  # its weights are those that failed
        if trainer.state.is_main_process:
            checkpoint.remove(found[-1][1])
        found.pop()
    kept = f"checkpoint {found[-1][1].name} is kept" if found else "there is no checkpoint yet"
    what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient norm is {norm}"
    return TrainingError(
        f"{what} at step {trainer.step + 1}; {kept}",
        where=str(out),
        fix="lower lr or lengthen warmup_steps, with another --out",
    )


@contextmanager
def _asked_to_stop() -> Iterator[list[int]]:
    """A list that fills when SIGTERM comes (a scheduler's notice): the step ends, and is saved."""
    got: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: got.append(number))
    try:
        yield got
    finally:
        signal.signal(signal.SIGTERM, before)


def peak_mem_mib(device: torch.device) -> float:
    """Most memory so far, MiB: the CUDA allocator's on a GPU, the process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10  # KiB on Linux

"""Train one small model on recall and say how well it recalls (Zoology appendix E's protocol)."""

import functools
import gc
import math
import os
import sys
import time
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from glabench.quality import mqar
from glabench.quality.recall_model import RecallModel
from glabench.worker import CellFailure, emit_phase, one_line

TRAIN_SEED, TEST_SEED, VALID_SEED = 0, 10, 20
WEIGHT_DECAY = 0.1  # of every parameter
SOLVED = 0.99  # a run ends with the epoch whose test accuracy is above
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WARM_STEPS = 3  # eager steps before a graph is captured: they compile kernels and fill the allocator
EVALUATION_TOKENS = 1 << 16  # in one forward pass


def train(cell: dict[str, Any]) -> dict[str, Any]:
    """A worker's call: train one (mixer, width, learning rate, seed) and measure it.

    `cell`: mixer, impl, dim, heads, layers, seqlen, pairs, vocab, lr, seed, epochs, batch, examples, test,
    valid, dtype, device, threads, graph, compile. Returns
    the row's measured fields and `curve`, a list of [loss, test, test by example, validation] an epoch.
    Raises: CellFailure with status "error" where the loss is not finite.
    """
    emit_phase("data")
    torch.set_num_threads(cell["threads"])
    device = torch.device(cell["device"])
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
        gc.collect()
        torch.cuda.empty_cache()  # other processes train on this device
    splits = _splits(*(cell[k] for k in ("seqlen", "pairs", "vocab", "examples", "test", "valid")), device)
    emit_phase("train")
    started = time.perf_counter()
    run = Run(cell, splits[0], device)
    curve, stop = [], "epochs"
    for epoch in range(cell["epochs"]):
        begun = time.perf_counter()
        loss = run.epoch(epoch)
        epoch_s = time.perf_counter() - begun
        if not math.isfinite(loss):
            raise CellFailure("error", f"diverged: the loss is not finite in epoch {epoch + 1}")
        test, valid = run.accuracy(splits[1]), run.accuracy(splits[2])
        curve.append([round(loss, 6), *test, valid[0]])
        if test[0] > SOLVED:
            stop = "solved"
            break
    return {
        "acc_token_frac": test[0],
        "acc_example_frac": test[1],
        "val_acc_frac": valid[0],
        "loss_nats": loss,
        "epochs": len(curve),
        "steps": len(curve) * run.steps,
        "stop": stop,
        "params": sum(p.numel() for p in run.model.parameters()),
        "state_bytes": run.state_bytes(),
        "graphed": "yes" if run.graph is not None else "no",
        "compiled": "yes" if cell["compile"] else "no",
        "epoch_s": epoch_s,
        "train_s": time.perf_counter() - started,
        "peak_mem_mib": torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else None,
        "curve": curve,
    }


@functools.lru_cache(maxsize=2)
def _splits(
    seqlen: int, pairs: int, vocab: int, examples: int, test: int, valid: int, device: torch.device
) -> tuple[mqar.Examples, mqar.Examples, mqar.Examples]:
    """Training, test and validation examples on the device; the last two are the reference program's."""
    shape = (seqlen, pairs, vocab)
    train = mqar.draw(examples, *shape, TRAIN_SEED)
    held_out = (mqar.draw_reference(n, *shape, s) for n, s in ((test, TEST_SEED), (valid, VALID_SEED)))
    return tuple(split.to(device) for split in (train, *held_out))


class Run:
    """A model, its optimiser and its training examples; on a GPU a whole step is one CUDA graph."""

    def __init__(self, cell: dict[str, Any], examples: mqar.Examples, device: torch.device) -> None:
        self.cell, self.examples, self.device = cell, examples, device
        self.steps = -(-len(examples) // cell["batch"])  # the last batch of an epoch may be smaller
        is_cuda = device.type == "cuda"
        if is_cuda:
            torch.cuda.reset_peak_memory_stats()
        torch.manual_seed(cell["seed"])
        names = ("dim", "heads", "layers", "vocab", "seqlen", "impl")
        with torch.device("cpu"):  # the same weights on every device
            self.model = RecallModel(cell["mixer"], **{name: cell[name] for name in names})
        self.model.to(device)
        self.model.compute = DTYPES[cell["dtype"]]
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=torch.tensor(cell["lr"], device=device) if is_cuda else cell["lr"],  # a graph reads it anew
            weight_decay=WEIGHT_DECAY,
            fused=True,
            capturable=is_cuda,
        )
        self.order = torch.Generator().manual_seed(cell["seed"])
        self.total = torch.zeros((), device=device)
        self.rows = torch.arange(cell["batch"], device=device)
        if cell["compile"]:
            torch.compiler.reset()  # past eight models in a process it would give up in silence
        self.forward = torch.compile(self.model) if cell["compile"] else self.model  # in training only
        self.graph = self._capture() if is_cuda and cell["graph"] else None

    def epoch(self, number: int) -> float:
        """One pass over the examples in a new order; returns the mean loss in nats a query."""
        lr = self.cell["lr"] * (1 + math.cos(math.pi * number / self.cell["epochs"])) / 2
        self._set_rate(lr)
        self.model.train()
        self.total.zero_()
        order = torch.randperm(len(self.examples), generator=self.order).to(self.device)
        for rows in order.split(self.cell["batch"]):
            if self.graph is None or len(rows) < len(self.rows):
                self._step(rows)
            else:
                self.rows.copy_(rows)
                self.graph.replay()
        return self.total.item() / self.steps

    def _set_rate(self, lr: float) -> None:
        (group,) = self.optimizer.param_groups
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr

    def _step(self, rows: Tensor) -> None:
        batch = self.examples
        # compiled for whole batches alone: the last one of an epoch would be compiled for once more
        forward = self.forward if len(rows) == len(self.rows) else self.model
        with _autocast(self.device, self.model.compute):
            hidden = forward(batch.tokens[rows], batch.queries[rows])
            logits = self.model.logits(hidden)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), batch.answers[rows].flatten().long())
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.total += loss.detach()

    def _capture(self) -> torch.cuda.CUDAGraph:
        """The step as a CUDA graph; its warm-up leaves weights and moments as they were."""
        self._set_rate(0.0)  # AdamW with a rate of 0 moves no weight, by decay neither
        self.model.train()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_STEPS):
                self._step(self.rows)
        torch.cuda.current_stream().wait_stream(side)
        self.optimizer.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._step(self.rows)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as err:  # after it this process can neither capture nor draw random numbers
            sys.stderr.write(f"no CUDA graph: {one_line(str(err))}\n")
            sys.stderr.flush()
            os._exit(1)
        for state in self.optimizer.state.values():
            for tensor in state.values():
                tensor.zero_()
        return graph

    def state_bytes(self) -> int:
        """Bytes, at four a number, that decoding keeps of one sequence: measured from the states."""
        self.model.eval()
        with _autocast(self.device, self.model.compute):
            return 4 * self.model.state_elements(self.examples.tokens[:1])

    @torch.no_grad()
    def accuracy(self, examples: mqar.Examples) -> tuple[float, float]:
        """Share of the queries, and of the examples with every query, whose most likely token is right."""
        self.model.eval()
        size = max(1, EVALUATION_TOKENS // examples.tokens.shape[1])
        right = []
        for first in range(0, len(examples), size):
            rows = slice(first, first + size)
            with _autocast(self.device, self.model.compute):
                hidden = self.model(examples.tokens[rows], examples.queries[rows])
            logits = self.model.logits(hidden.float())  # in 16 bits the first of several might be a tie
            right.append(logits.argmax(-1) == examples.answers[rows])
        whole = torch.cat(right)  # counted, and divided in double: 0.99 must not be above 0.99
        return int(whole.sum()) / whole.numel(), int(whole.all(-1).sum()) / len(whole)


def _autocast(device: torch.device, compute: torch.dtype) -> Any:
    if compute == torch.float32:
        return nullcontext()
    # a cast that outlived a captured graph would be read by the next one
    return torch.autocast(device.type, dtype=compute, cache_enabled=False)

"""Launching for less of the host's time: Triton's look-up taken once, and whole calls played back.

What a call allocates and launches is the same for every call of a model's layer, and planning it, shapes and
plans and constants, takes the host longer than the launches. The third call of a kind is played from a tape.
"""

from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from glabench.kernels import ahead, gla_configs
from glabench.kernels.plan_files import Launch

INTERPRETED = triton.knobs.runtime.interpret  # read once: the compiler cannot trace the look-up
MOST = 512  # kinds of calls that are remembered: a model has few, but a prompt may have any length

Runner = Callable[..., object]  # a compiled kernel with its grid
Tensors = Sequence[Tensor | None]

_compiled: dict[tuple, object] = {}
_tapes: dict[Hashable, "Tape | bool | None"] = {}  # None: made once; False: not to be played


def launch(kernel, programs: int, tensors: tuple, numbers: tuple, constants: dict, tile: Launch) -> None:
    """Launch on the tensors' device; Triton's own look-up, 15 us, is taken once for each kind of launch."""
    if not programs:
        return
    asked = ahead.asked()
    if asked is not None:
        asked.append(ahead.Asked(kernel, programs, tensors, numbers, constants, tile))
        return
    if INTERPRETED:
        kernel[(programs,)](*tensors, *numbers, **constants, **tile.options())
        return
    device = tensors[0].device.index
    key = _key(kernel, device, tensors, constants, tile)
    compiled = _compiled.get(key)
    with _on(device):
        if compiled is None:
            ahead.compile_rest(tensors[0].device)
            _compiled[key] = kernel[(programs,)](*tensors, *numbers, **constants, **tile.options())
        else:
            compiled[(programs, 1, 1)](*tensors, *numbers, *constants.values())


def do(function: Callable[..., None], tensors: tuple, rest: tuple) -> None:
    """function(*tensors, *rest), PyTorch's work on tensors between two launches, made where they are."""
    asked = ahead.asked()
    if asked is None:
        function(*tensors, *rest)
    else:
        asked.append(ahead.Asked(function, 1, tensors, rest, {}, None))


def _key(kernel, device: int, tensors: tuple, constants: dict, tile: Launch) -> tuple:
    """All that Triton specialises on: types, absence and alignment, but no value of `numbers`."""
    kinds = tuple(None if x is None else (x.dtype, x.data_ptr() % 16 == 0) for x in tensors)
    return (kernel, device, tile, kinds, *constants.values())


def _on(device: int):
    return nullcontext() if device == torch.cuda.current_device() else torch.cuda.device(device)


# --- whole calls ------------------------------------------------------------------------------------------


class Tape(NamedTuple):
    """What a call allocates, launches and gives: a launch is a runner, its tensors and what follows them.

    Tensors are places in the row of inputs, buffers, tables, which all calls share, and a None.
    """

    buffers: tuple[tuple[torch.Size, torch.dtype], ...]
    tables: tuple[Tensor, ...]
    launches: tuple[tuple[Runner, tuple[int, ...], tuple], ...]
    outs: tuple[int, ...]

    def play(self, inputs: Tensors) -> list[Tensor | None]:
        """What the call gives for these inputs."""
        new_empty = inputs[0].new_empty
        made = (new_empty(shape, dtype=dtype) for shape, dtype in self.buffers)
        row = [*inputs, *made, *self.tables, None]
        for runner, places, rest in self.launches:
            runner(*[row[i] for i in places], *rest)
        return [row[i] for i in self.outs]


def played(
    call: Callable[..., Tensors],
    inputs: tuple[Tensor | None, ...],
    cu_seqlens: Tensor | None,
    how: dict,
    first: Callable[..., object] | None = None,
) -> Tensors:
    """call(*inputs, cu_seqlens, **how), by its tape where there is one: of equal rows, on a GPU.

    `call` allocates by new_empty, launches by `launch`, and does what else it does by `do`. `first`, with the
    same arguments, asks for all that is to be compiled.
    """
    key = None if INTERPRETED or cu_seqlens is not None else _kind(call, inputs, how)
    tape = _tapes.get(key)
    if tape:
        with _on(inputs[0].device.index):
            return tape.play(inputs)
    with ahead.during(None if first is None else lambda: first(*inputs, cu_seqlens, **how)):
        found = call(*inputs, cu_seqlens, **how)
    if key is not None:
        _learn(key, call, inputs, how)
    return found


def _kind(call: Callable[..., Tensors], inputs: Tensors, how: dict) -> Hashable | None:
    """All that a call's launches follow from; None where tensors are not aligned: kernels differ then."""
    seen = [call, inputs[0].get_device(), gla_configs.changes_in_force(), *how.values()]
    for x in inputs:
        if x is None:
            seen.append(None)
        elif x.data_ptr() % 16:
            return None
        else:
            seen += (x.shape, x.dtype)
    return tuple(seen)


def _learn(key: Hashable, call: Callable[..., Tensors], inputs: Tensors, how: dict) -> None:
    """Note the call when it was made twice: most kinds of a prompt's come once."""
    if key not in _tapes:
        if len(_tapes) >= MOST:
            _tapes.clear()
        _tapes[key] = None
    elif _tapes[key] is None:
        device, without = inputs[0].device, without_memory(inputs)
        with ahead.noting(device) as noted:
            outs = call(*without, None, **how)
        _tapes[key] = _tape(noted, without, outs, device.index) or False


def without_memory(inputs: Tensors) -> list[Tensor | None]:
    """Meta tensors like these."""
    return [None if x is None else torch.empty(x.shape, dtype=x.dtype, device="meta") for x in inputs]


def _tape(noted: list[ahead.Asked], inputs: Tensors, outs: Tensors, device: int) -> Tape | None:
    """None where a launch was never made."""
    seen = [x for asked in noted for x in asked.tensors] + [*outs]
    new = {id(x): x for x in seen if x is not None}
    for x in inputs:
        new.pop(id(x), None)
    buffers = [x for x in new.values() if x.is_meta]
    tables = [x for x in new.values() if not x.is_meta]
    places = {id(x): i for i, x in enumerate([*inputs, *buffers, *tables])} | {id(None): -1}
    launches = []
    for asked in noted:
        runner = asked.kernel
        if asked.tile is not None:
            compiled = _compiled.get(_key(asked.kernel, device, asked.tensors, asked.constants, asked.tile))
            if compiled is None:
                return None
            runner = compiled[(asked.programs, 1, 1)]
        rest = (*asked.numbers, *asked.constants.values())
        launches.append((runner, tuple(places[id(x)] for x in asked.tensors), rest))
    kinds = tuple((x.shape, x.dtype) for x in buffers)
    return Tape(kinds, tuple(tables), tuple(launches), tuple(places[id(x)] for x in outs))

"""Launching for less of the host's time: Triton's look-up taken once, and whole calls played back.

What a call allocates and launches is the same for every call of a model's layer, and planning it, shapes and
plans and constants, takes the host longer than the launches. The third call of a kind is played from a tape.
"""

import operator
from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime import driver

from glabench.kernels import ahead, gla_configs
from glabench.kernels.plan_files import Launch

INTERPRETED = triton.knobs.runtime.interpret  # read once: the compiler cannot trace the look-up
HERE = nullcontext()
MOST = 512  # kinds of calls that are remembered: a model has few, but a prompt may have any length

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
    device, addresses = tensors[0].device.index, addresses_of(tensors)
    key = _key(kernel, device, tensors, addresses, constants, tile)
    compiled = _compiled.get(key)
    with _on(device):
        if compiled is None:
            ahead.compile_rest(tensors[0].device)
            _compiled[key] = kernel[(programs,)](*tensors, *numbers, **constants, **tile.options())
        elif _is_watched():
            compiled[(programs, 1, 1)](*tensors, *numbers, *constants.values())
        else:
            stream, rest = driver.active.get_current_stream(device), (*numbers, *constants.values())
            compiled.run(programs, 1, 1, stream, *_told(compiled), *addresses, *rest)


def addresses_of(tensors: Tensors) -> list[int | None]:
    """What a kernel is given for them: of a tensor, a launcher asks its address, and of that the driver."""
    return [None if x is None else x.data_ptr() for x in tensors]


def _told(compiled) -> tuple:
    """What its launcher takes before a kernel's arguments: no metadata and no hooks, unless _is_watched."""
    return compiled.function, compiled.packed_metadata, None, None, None


def _is_watched() -> bool:
    """Whether a profiler hooks into Triton's launches: a hook is a function, a chain of them, or None."""
    hooks = triton.knobs.runtime
    return any(getattr(x, "calls", x) for x in (hooks.launch_enter_hook, hooks.launch_exit_hook))


def do(function: Callable[..., None], tensors: tuple, rest: tuple) -> None:
    """function(*tensors, *rest), PyTorch's work on tensors between two launches, made where they are."""
    asked = ahead.asked()
    if asked is None:
        function(*tensors, *rest)
    else:
        asked.append(ahead.Asked(function, 1, tensors, rest, {}, None))


def _key(kernel, device: int, tensors: tuple, addresses: list, constants: dict, tile: Launch) -> tuple:
    """All that Triton specialises on: types, absence and alignment, but no value of `numbers`."""
    pairs = zip(tensors, addresses, strict=True)
    kinds = tuple(None if x is None else (x.dtype, address % 16 == 0) for x, address in pairs)
    return (kernel, device, tile, kinds, *constants.values())


def _on(device: int):
    return HERE if device == torch.cuda.current_device() else torch.cuda.device(device)


# --- whole calls ------------------------------------------------------------------------------------------


class Played(NamedTuple):
    """A launch of `compiled` on so many programs, by its launcher `run`; or PyTorch's work, a function.

    `take` gives the tensors, or their addresses, from the tape's row; `rest` follows them.
    """

    compiled: object
    programs: int
    take: Callable[[Sequence], tuple]
    rest: tuple
    run: Callable[..., object] | None = None
    told: tuple = ()


class Tape(NamedTuple):
    """What a call allocates, launches and gives.

    Tensors are places in the row of inputs, buffers, tables, which all calls share, and a None.
    """

    buffers: tuple[tuple[torch.Size, tuple[int, ...], torch.dtype], ...]
    tables: tuple[Tensor, ...]
    launches: tuple[Played, ...]
    outs: Callable[[Sequence], tuple]

    def play(self, inputs: Tensors, addresses: Sequence[int | None], device: torch.device) -> Tensors:
        """What the call gives for these inputs, which lie at these addresses of the current device."""
        empty = torch.empty_strided  # half of new_empty's time
        made = [empty(shape, strides, dtype=dtype, device=device) for shape, strides, dtype in self.buffers]
        made += self.tables
        row, at = [*inputs, *made, None], [*addresses, *addresses_of(made), None]
        stream = driver.active.get_current_stream(device.index)
        is_watched = _is_watched()
        for compiled, programs, take, rest, run, told in self.launches:
            if run is None:
                compiled(*take(row), *rest)
            elif is_watched:
                compiled[(programs, 1, 1)](*take(row), *rest, stream=stream)
            else:
                run(programs, 1, 1, stream, *told, *take(at), *rest)
        return self.outs(row)


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
    key = None
    if cu_seqlens is None and not INTERPRETED:
        addresses = addresses_of(inputs)
        key = _kind(call, inputs, addresses, how)
        tape = _tapes.get(key)
        if tape:
            device = inputs[0].device
            with _on(device.index):
                return tape.play(inputs, addresses, device)
    with ahead.during(None if first is None else lambda: first(*inputs, cu_seqlens, **how)):
        found = call(*inputs, cu_seqlens, **how)
    if key is not None:
        _learn(key, call, inputs, how)
    return found


def _kind(call: Callable[..., Tensors], inputs: Tensors, addresses: list, how: dict) -> Hashable | None:
    """All that a call's launches follow from; None where tensors are not aligned: kernels differ then."""
    seen = [call, inputs[0].get_device(), gla_configs.changes_in_force(), *how.values()]
    for x, address in zip(inputs, addresses, strict=True):
        if x is None:
            seen.append(None)
        elif address % 16:
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
    for kernel, programs, tensors, numbers, constants, tile in noted:
        take = operator.itemgetter(*(places[id(x)] for x in tensors))
        rest = (*numbers, *constants.values())
        if tile is None:
            launches.append(Played(kernel, 1, take, rest))
            continue
        aligned = [0] * len(tensors)
        compiled = _compiled.get(_key(kernel, device, tensors, aligned, constants, tile))
        if compiled is None:
            return None
        launches.append(Played(compiled, programs, take, rest, compiled.run, _told(compiled)))
    kinds = tuple((x.shape, x.stride(), x.dtype) for x in buffers)
    return Tape(kinds, tuple(tables), tuple(launches), operator.itemgetter(*(places[id(x)] for x in outs)))

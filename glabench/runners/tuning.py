"""Triton's autotuning inside a worker: compile ahead in parallel, and tell what was tried and chosen.

Triton compiles and times one configuration after the other: minutes for kernels with dozens of them.
Here all configurations of a kernel are compiled in threads before the first is timed. Only private parts
that Triton 3.5+ has are used; where they are missing, tuning goes on as Triton does it.
"""

import contextlib
import functools
import importlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

# Milliseconds Triton may spend on timing one configuration (it takes 125 by itself); unset: its own choice.
TUNE_MS = "GLABENCH_TUNE_MS"
PENDING = "_glabench_pending"


@dataclass
class Record:
    """What tuning and compiling did during one `recording()`."""

    tune_s: float = 0.0
    tried: int = 0
    chosen: dict[str, str] = field(default_factory=dict)  # kernel -> configuration
    compiled: int = 0
    loaded: int = 0  # from Triton's disk cache

    @property
    def config(self) -> str:
        """The chosen configuration of every tuned kernel that ran."""
        return "; ".join(f"{kernel}({words})" for kernel, words in sorted(self.chosen.items()))

    @property
    def cache(self) -> str:
        """ "cold" where a kernel had to be compiled, "warm" where the disk cache had them all, else ""."""
        return "cold" if self.compiled else "warm" if self.loaded else ""


class Aside:
    """Steps aside once for all threads that compile: the first leaves the device, the last takes it back."""

    def __init__(self) -> None:
        self.step_aside: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
        self.waited_s = 0.0  # for the others to let the device go
        self._lock, self._inside, self._stack = threading.Lock(), 0, contextlib.ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._stack.enter_context(self.step_aside())
            self._inside += 1

    def __exit__(self, *exc: object) -> None:
        with self._lock:  # held while waiting: nobody here begins to compile as if the device were free
            self._inside -= 1
            if not self._inside:
                begun = time.perf_counter()
                self._stack.close()
                self.waited_s += time.perf_counter() - begun


# Where Triton finds its compilers when it needs them: of kernels, and of the C code that launches them.
COMPILERS = (("triton.compiler", "compile"), ("triton.backends.nvidia.driver", "compile_module_from_src"))
_records: list[Record] = []
_aside = Aside()


def install(step_aside: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext) -> bool:
    """Hook Triton's autotuner, once a process; whether its configurations are compiled ahead.

    `step_aside()` is entered while compiling: the device is free for others then.
    """
    _aside.step_aside = step_aside
    try:
        from triton.runtime.autotuner import Autotuner
    except ImportError:
        return False
    if not hasattr(Autotuner, "prune_configs") or not hasattr(Autotuner, "_bench"):
        return False
    if not hasattr(Autotuner._bench, "glabench"):
        _hook(Autotuner)
    return _async_mode() is not None


def compile_aside() -> None:
    """From now on step aside, as `install` was told, whenever Triton compiles, not only while it tunes.

    What Triton has first called before keeps its compiler. Does nothing where Triton has no such parts.
    """
    for module, name in COMPILERS:
        with contextlib.suppress(ImportError, AttributeError):
            place = importlib.import_module(module)
            function = getattr(place, name)
            if not hasattr(function, "glabench"):
                setattr(place, name, _set_aside(function))


def _set_aside(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with _aside:
            return function(*args, **kwargs)

    call.glabench = True
    return call


def _async_mode() -> Any:
    try:
        from triton.runtime._async_compile import AsyncCompileMode
    except ImportError:
        return None
    return AsyncCompileMode


def _hook(autotuner: Any) -> None:
    """Wrap what tuning calls, not `run`: that is on the path of every launch, and would be timed."""
    prune, bench = autotuner.prune_configs, autotuner._bench

    def prune_configs(self: Any, kwargs: dict[str, Any]) -> list[Any]:
        configs = prune(self, kwargs)
        setattr(self, PENDING, configs)
        return configs

    def _bench(self: Any, *args: Any, config: Any, **meta: Any) -> Any:
        begun, waited_s = time.perf_counter(), _aside.waited_s
        pending = self.__dict__.pop(PENDING, ())
        if len(pending) > 1:
            compile_ahead(self, args, meta, pending)
        _bound_timing(self)
        timing = bench(self, *args, config=config, **meta)
        spent_s = time.perf_counter() - begun - (_aside.waited_s - waited_s)
        for record in _records:
            record.tune_s += spent_s
            record.tried += 1
        return timing

    _bench.glabench = True
    autotuner.prune_configs, autotuner._bench = prune_configs, _bench


def compile_ahead(tuner: Any, args: tuple[Any, ...], meta: dict[str, Any], configs: list[Any]) -> None:
    """Compile every configuration in threads; errors are left to the timing that meets them again."""
    mode = _async_mode()
    if mode is None or not _is_compiled(tuner):
        return
    pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)))
    with _aside, pool, contextlib.suppress(Exception), mode(pool, ignore_errors=True):
        for config in configs:
            with contextlib.suppress(Exception):
                tuner.fn.run(*args, **{**meta, **config.all_kwargs(), "warmup": True})


def _is_compiled(tuner: Any) -> bool:
    """Whether it tunes a compiled function: an interpreted one would run instead of compile."""
    from triton.runtime.jit import JITFunction

    function = tuner.fn
    while not isinstance(function, JITFunction) and hasattr(function, "fn"):
        function = function.fn
    return isinstance(function, JITFunction)


def _bound_timing(tuner: Any) -> None:
    limit_ms = os.environ.get(TUNE_MS, "")
    if limit_ms.isdecimal() and "do_bench" not in tuner.__dict__ and tuner._do_bench is None:
        from triton.testing import do_bench

        rep = max(1, int(limit_ms))
        tuner._do_bench = lambda call, quantiles: do_bench(
            call, warmup=max(1, rep // 4), rep=rep, quantiles=quantiles
        )


@contextlib.contextmanager
def recording() -> Iterator[Record]:
    """Note tuning, compiling and chosen configurations until the end; launches are slower meanwhile."""
    record = Record()
    try:
        from triton import knobs
        from triton.runtime.autotuner import Autotuner
    except ImportError:
        yield record
        return
    run, listener = Autotuner.run, knobs.compilation.listener

    def run_and_note(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = run(self, *args, **kwargs)
        if len(self.configs) > 1:
            chosen = self.best_config.all_kwargs().items()
            record.chosen[self.base_fn.__name__] = ", ".join(f"{name}={value}" for name, value in chosen)
        return result

    def listen(**event: Any) -> None:
        if event.get("cache_hit"):
            record.loaded += 1
        else:
            record.compiled += 1
        if listener is not None:
            listener(**event)

    Autotuner.run, knobs.compilation.listener = run_and_note, listen
    _records.append(record)
    try:
        yield record
    finally:
        _records.remove(record)
        Autotuner.run, knobs.compilation.listener = run, listener

"""Progress of one long job on stderr: a bar on a terminal, a plain line every few seconds otherwise."""

import sys
import time

EVERY_S = 5.0  # between plain lines: a log of hours stays readable


def duration(seconds: float) -> str:
    """Seconds as "42s", "3m05s" or "2h07m"."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    return f"{whole // 60}m{whole % 60:02d}s" if whole < 3600 else f"{whole // 3600}h{whole // 60 % 60:02d}m"


class Meter:
    """Counts `total` units of work; `update` says how many are done and what to show beside them.

    `done` at the start is what an earlier run did: the pace, and with it the time left, comes from this run.
    """

    def __init__(self, total: int, unit: str, *, done: int = 0, every_s: float = EVERY_S) -> None:
        self.total, self.unit, self.first, self.every_s = total, unit, done, every_s
        self.started = self.spoke = time.perf_counter()

    def __enter__(self) -> "Meter":
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def left(self, done: int) -> str:
        """Time left in words, from the pace of this run; empty before there is one."""
        if done <= self.first or done >= self.total:
            return ""
        pace = (time.perf_counter() - self.started) / (done - self.first)
        return f"{duration(pace * (self.total - done))} left"

    def update(self, done: int, text: str) -> None:
        now = time.perf_counter()
        if now - self.spoke >= self.every_s or done >= self.total or done == self.first + 1:
            self.spoke = now
            self.say(f"{self.unit} {done}/{self.total}  {text}  {self.left(done)}".rstrip())

    def say(self, text: str) -> None:
        sys.stderr.write(text + "\n")
        sys.stderr.flush()


class Bar(Meter):
    """The same at the foot of a terminal; what is said scrolls above it."""

    def __enter__(self) -> "Bar":
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=Console(stderr=True, highlight=False),
            transient=True,
        )
        self.task = self.bar.add_task(self.unit, total=self.total, completed=self.first, text="", left="")
        self.bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.bar.stop()

    def update(self, done: int, text: str) -> None:
        self.bar.update(self.task, completed=done, text=text, left=self.left(done))

    def say(self, text: str) -> None:
        self.bar.console.print(text, markup=False, soft_wrap=True)


class Silent(Meter):
    """Says nothing: the processes of a distributed run other than the first."""

    def update(self, done: int, text: str) -> None:
        pass

    def say(self, text: str) -> None:
        pass


def meter(total: int, unit: str, *, done: int = 0, silent: bool = False) -> Meter:
    """The bar on a terminal, plain lines otherwise, nothing where `silent`."""
    kind = Silent if silent else Bar if sys.stderr.isatty() else Meter
    return kind(total, unit, done=done)

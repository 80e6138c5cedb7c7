"""Errors a user can act on, and the exit codes of the command line."""

DONE = 0  # every row is ok, unsupported, unavailable, oom or timeout
RESULT_SAYS_NO = 1  # it ran, and a row is wrong, crashed or error, or a check missed its limit
MISUSE = 2  # it could not run as asked


class GlabenchError(Exception):
    """A failure the user can act on: what is wrong, where, and what to do."""

    exit_code = MISUSE

    def __init__(self, what: str, *, where: str, fix: str) -> None:
        super().__init__(f"{what} ({where}); {fix}")
        self.what, self.where, self.fix = what, where, fix


class UsageError(GlabenchError):
    """An argument, a range, an id or a suite file that does not make sense."""


class UnavailableError(GlabenchError):
    """Something that exists but cannot run on this machine, device or installation."""


class ShapeError(GlabenchError):
    """Tensors whose shape, dtype or device does not fit the operation's contract."""

    def __init__(
        self, what: str, *, where: str = "arguments", fix: str = "see the function's docstring"
    ) -> None:
        super().__init__(what, where=where, fix=fix)


class ResultsError(GlabenchError):
    """A results folder that cannot be read or written as asked; nothing in it was changed."""


def nearest(word: str, known: list[str] | tuple[str, ...]) -> str:
    """Return "did you mean 'x'?" for a near miss, else the list of what is known."""
    import difflib

    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"

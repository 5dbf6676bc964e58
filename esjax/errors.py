"""What ends a command before it is done: the kinds of errors, their exit codes, and one line for each."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What JAX' runtime says when another process of a run is gone or cannot be reached.
PEER = (
    "gloo",
    "unavailable:",
    "deadline_exceeded",
    "heartbeat",
    "connection reset by peer",
    "connection closed by peer",
)
# What an operating system or a network says that may be over when the same command is tried again.
PASSING = (errno.EIO, errno.ESTALE, errno.EAGAIN, errno.EINTR, errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN)


LONGEST = 1600  # characters of a line: a file may hold names of any length


class _Told(Exception):
    """An error whose text is one line that can be printed, whatever names from files stand in it."""

    def __str__(self) -> str:
        text = super().__str__().encode(errors="backslashreplace").decode()
        line = "".join(c if c not in "\n\r\x0b\x0c\x85\u2028\u2029" else repr(c)[1:-1] for c in text)
        return line if len(line) <= LONGEST else f"{line[: LONGEST // 2]} ... {line[-LONGEST // 2 :]}"


class InputError(_Told):
    """Bad input: one line saying what, where, which values are allowed and what to do. The command exits with code 2."""


class TransientError(_Told):
    """What passes without a change of the command: a network, a lock, a lease. The command exits with code 75."""


class RunError(_Told):
    """The run cannot go on: an invariant of the method does not hold. The command exits with code 1."""


class Stopped(BaseException):
    """SIGTERM came (a preemption): what was done is saved, and the same command continues. The command exits with code 143.

    No ``Exception``, for it may come anywhere: nobody who deals with a damaged file or a broken network may take it for one.
    """


@contextmanager
def within(where: str) -> Iterator[None]:
    """Say where, file and line or id, in front of an InputError that is raised inside."""
    try:
        yield
    except InputError as e:
        raise InputError(f"{where}: {e}") from e


def outcome(error: BaseException, continues: bool = True) -> tuple[int, str] | None:
    """The exit code and the line of an error that a person or time can mend; None for what only we can.

    Errors of the operating system count: a full disk and a lost connection pass (75), a folder that may not be written
    does not (2). Memory that does not suffice will not suffice the next time either (2). ``continues`` is whether the same
    command, given again, goes on from what was done.
    """
    again = "continues" if continues else "starts over"
    for kind, code in ((InputError, 2), (TransientError, 75), (RunError, 1)):
        if isinstance(error, kind):
            return code, f"error: {error}"
    if isinstance(error, Stopped):
        return 143, f"stopped by SIGTERM; the same command {again}"
    if isinstance(error, KeyboardInterrupt):
        return 130, f"interrupted; the same command {again}"
    if isinstance(error, SystemExit):
        return None
    if is_full_disk(error):
        return 75, f"error: the disk is full; free some space and run the same command again, it {again}"
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        return 2, (
            f"error: out of memory ({_line(error)}); lower sft.micro_rows, dpo.micro_rows or evolve.batch, choose "
            "model.remat=full, or use more devices: `esjax plan` says what fits"
        )
    if type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError") and any(p in str(error).lower() for p in PEER):
        return 75, f"error: another process of this run ended or cannot be reached ({_line(error)}); start all again"
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        if isinstance(error, ConnectionError | TimeoutError) or error.errno in PASSING:
            return 75, f"error: {where}{_line(error)}; run the same command again, it {again}"
        if error.errno is not None:
            return 2, f"error: {where}{error.strerror}; choose a place that can be read and written"
    return None


def is_full_disk(error: BaseException) -> bool:
    """Whether an exception, or what caused it, says that the disk is full (also as text, from libraries in C++)."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in NO_SPACE:
            return True
        if any(
            word in str(seen) for word in ("No space left on device", "ENOSPC", "Disk quota exceeded", "File too large")
        ):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__

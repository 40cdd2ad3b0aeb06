"""Signals: one rule for all phases of a program. Importing this loads nothing.

The first SIGINT, SIGTERM or SIGHUP stops a program where it is, by raising `Stopped`; where
something must become whole first, a step or a micro-batch of samples, it is remembered until then
(`finishing`). A second one ends the process at once.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

__all__ = ["Stopped", "end_at_once", "finishing", "handled", "raise_again", "received"]

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_AGAIN_AFTER = 0.05  # seconds, in which a callback that must not raise comes to its end


class Stopped(BaseException):
    """A signal came; no error, which a program that handles errors would take for its own.

    Attributes:
      signum: the signal.
      place: where it came, for the message; set on the way out.
      code: the exit code of a program that it stops.
    """

    def __init__(self, signum: int, place: str = ""):
        super().__init__(signum, place)
        self.signum, self.place = signum, place

    @property
    def code(self) -> int:
        return 128 + self.signum

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.signum).name}{self.place}"


class Finishing:
    """A block that signals do not cut short.

    Attributes:
      what: is finished, for the message.
      signum: the signal that came, or None.
    """

    def __init__(self, what: str):
        self.what, self.signum = what, None


class _State:
    first: int | None = None  # signal that came
    blocks: tuple[Finishing, ...] = ()  # that are open, the innermost last


@contextlib.contextmanager
def handled() -> Iterator[None]:
    """Lets signals raise `Stopped` in the main thread; SIGHUP stays ignored, as under nohup."""
    before = {}
    main = threading.current_thread() is threading.main_thread()
    if main and signal.getsignal(signal.SIGTERM) is not _receive:
        for signum in _SIGNALS:
            if signum != signal.SIGHUP or signal.getsignal(signum) != signal.SIG_IGN:
                before[signum] = signal.signal(signum, _receive)
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
        if before:
            _State.first = None


@contextlib.contextmanager
def finishing(what: str) -> Iterator[Finishing]:
    """Finishes the block before a signal raises `Stopped`.

    Where the block itself raises, that passes. Outside of `handled` the rule holds for the block
    alone.

    Args:
      what: is finished, for the message, as in "the step and saving".

    Raises:
      Stopped: a signal came, before or inside of the block.
    """
    with handled():
        if _State.first and not _State.blocks:
            raise Stopped(_State.first)  # once more: what called us has lost the first
        block, outer = Finishing(what), _State.blocks
        _State.blocks = (*outer, block)
        try:
            yield block
        finally:
            _State.blocks = outer
        if block.signum and not outer:
            raise Stopped(block.signum)


def received() -> Stopped | None:
    """Of the signal that stops this program, also where it has not been raised yet; or None."""
    return None if _State.first is None else Stopped(_State.first)


def end_at_once() -> None:
    """Lets signals end the process with one line, as long as nothing handles them.

    It is for the time of imports: what a handler raises then, a callback of the garbage collector
    or a careless module may swallow.
    """
    for signum in _SIGNALS:
        if signal.getsignal(signum) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(signum, _end)


def raise_again(stopped: Stopped) -> None:
    """Sends a signal once more whose `Stopped` was raised where it could not pass."""
    _State.first = None
    timer = threading.Timer(_AGAIN_AFTER, os.kill, (os.getpid(), stopped.signum))
    timer.daemon = True
    timer.start()


def _receive(signum, _frame):
    if _State.first is not None:
        os._exit(128 + signum)
    _State.first = signum
    if not _State.blocks:
        raise Stopped(signum)
    for block in _State.blocks:
        block.signum = signum
    name = signal.Signals(signum).name
    _say(f"\n{name}: finishing {_State.blocks[-1].what}; once more to stop at once\n")


def _end(signum, _frame):
    _say(f"{Stopped(signum)}\n")
    os._exit(128 + signum)


def _say(message):
    with contextlib.suppress(OSError):  # nobody may be reading
        os.write(2, message.encode())

"""The processes of one run: they come together, and end together.

jax notices a process that dies after minutes, or at once with a page of its own; a collective waits
for it forever. So process 0 listens where the run's coordinator is said to be. The others connect,
and each process has a thread that looks at its connections and sends a beat every second. The
kernel closes the connections of a process that dies, and one whose host vanishes is silent;
whoever notices tells the others, and each ends with one line. Nothing here imports jax.
"""

import contextlib
import dataclasses
import os
import selectors
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable

from gen_jax import signals

__all__ = ["Watch", "end_together", "join", "relay"]

_BEAT = 1.0  # seconds between two signs of life
_LOOK = 0.2  # seconds that the thread waits for messages at a time
_GRACE = 5.0  # seconds that a process has left once another ended with an error
_SETTLE = 2.0  # seconds in which the cause of an error of jax shows: kernels close at once
_GREETING = "gen_jax"  # begins the first line of a connection; others are strangers
_LONGEST = 4096  # bytes of a line

_joined: "Watch | None" = None  # that of this process


class Watch:
    """One process's view of the others; use `join`.

    Args:
      index: of this process.
      processes: how many there are.
      connections: to all others of process 0, to process 0 of the others.
      patience: seconds of silence after which a process counts as gone.
      advice: what to do when one is gone, the end of the line that says so.
    """

    def __init__(
        self,
        index: int,
        processes: int,
        connections: dict[int, socket.socket],
        patience: float,
        advice: str,
    ):
        self.index, self.processes = index, processes
        self._patience, self._advice = patience, advice
        self._connections = connections
        self._texts = dict.fromkeys(connections, b"")
        self._heard = dict.fromkeys(connections, time.monotonic())
        self._codes: dict[int, int] = {}  # exit codes of those that have ended
        self._deadline: float | None = None  # for this process, since another ended with an error
        self._hurry = self._ending = False
        self._over = threading.Event()  # all have ended well
        self._sending = threading.Lock()
        self._selector = selectors.DefaultSelector()
        for other, connection in connections.items():
            connection.setblocking(False)
            self._selector.register(connection, selectors.EVENT_READ, other)
        _start_thread(self._look)

    def part(self) -> None:
        """Says that this process is done, and waits until all others are."""
        self._codes[self.index] = 0
        self._tell(f"ended {self.index} 0")
        self._over.wait()

    def leave(self, code: int) -> None:
        """Tells the others that this process ends with an error; it is watched no longer."""
        self._ending = True
        self._tell(f"ended {self.index} {code}")

    def settle(self) -> None:
        """Waits as long as an error here may be due to another's end; then this process ends, too.

        A collective may give up on a process before its silence has lasted long enough.
        """
        self._hurry = True
        end = time.monotonic() + _SETTLE
        while time.monotonic() < end or self._waits_for_one():
            time.sleep(_LOOK)

    def _waits_for_one(self):
        now = time.monotonic()
        return any(now - heard > 3 * _BEAT for heard in list(self._heard.values()))

    def _look(self):
        """The thread: beats, messages, and what they mean, until all is over."""
        looked, beaten = time.monotonic(), -float("inf")
        while not self._over.is_set():
            if looked - beaten >= _BEAT:
                beaten = looked
                self._tell("beat")
            for key, _ in self._selector.select(_LOOK):
                self._read(key.data)
            before, looked = looked, time.monotonic()
            if looked - before > _BEAT:  # this process stood still, and may have missed beats
                for other in self._heard:
                    self._heard[other] = looked
            self._judge(looked)

    def _read(self, other):
        try:
            data = self._connections[other].recv(_LONGEST)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._selector.unregister(self._connections[other])
            del self._heard[other]
            if not self._codes.get(other):
                self._end(other, "was killed, or crashed")
            return
        self._heard[other] = time.monotonic()
        *lines, self._texts[other] = (self._texts[other] + data).split(b"\n")
        for line in lines:
            self._understand(line.decode())

    def _understand(self, line):
        word, _, rest = line.partition(" ")
        if word == "done":
            self._over.set()
        elif word == "ended":
            other, code = map(int, rest.split())
            self._codes[other] = code
            if self.index == 0:
                self._tell(line)
            if code and self._deadline is None:
                self._deadline = time.monotonic() + _GRACE
        elif word == "gone":
            other, _, how = rest.partition(" ")
            self._end(int(other), how)

    def _judge(self, now):
        for other, heard in self._heard.items():
            if now - heard > self._patience and not self._codes.get(other):
                self._end(other, f"has been silent for {self._patience:g} s")
        if self._deadline is not None and (self._hurry or now > self._deadline):
            other, code = next((other, code) for other, code in self._codes.items() if code)
            self._end(other, f"ended with exit code {code}")
        if self.index == 0 and list(self._codes.values()) == [0] * self.processes:
            self._tell("done")
            self._over.set()

    def _tell(self, line):
        """Sends a line to those that are connected; one that takes nothing is silent, too."""
        for connection in self._connections.values():
            with self._sending, contextlib.suppress(OSError):
                connection.send(f"{line}\n".encode())

    def _end(self, other, how):
        """Ends this process for what became of another, unless it ends already."""
        if self._ending:
            return
        self._tell(f"gone {other} {how}")
        itself = " (this one)" if other == self.index else ""
        stop = signals.received()  # as the others have, where all are stopped
        begins, code = ("error: ", 1) if stop is None else (f"{stop}, and ", stop.code)
        line = f"{begins}process {other} of {self.processes}{itself} {how}; {self._advice}\n"
        _flush()
        start = "\n" if os.isatty(2) else ""  # where there may be a bar
        with contextlib.suppress(OSError):  # nobody may be reading
            os.write(2, f"{start}{line}".encode())
        os._exit(code)


def end_together(run: Callable[[], None], exit_code: Callable[[Callable[[], None]], int]) -> int:
    """Runs a program, and where processes are joined ends with them.

    One that ends well waits for the others. One that does not tells them, and the interpreter then
    ends at once, because jax would wait at its end for processes that do not come any more.

    Args:
      run: the program.
      exit_code: runs it, and says what was wrong.

    Returns:
      The exit code.
    """

    def settled():
        try:
            run()
        except ValueError:  # of this process's own
            raise
        except Exception:
            if _joined is not None:
                _joined.settle()
            raise

    try:
        code = exit_code(settled)
    except BaseException as error:
        if _joined is None:
            raise
        code = 1
        if not isinstance(error, SystemExit):
            traceback.print_exception(error)
        elif isinstance(error.code, int):
            code = error.code
    if _joined is None:
        return code
    if code:
        _joined.leave(code)
        _flush()
        os._exit(code)
    _joined.part()
    return code


def _flush():
    """Writes out what is buffered; no stream that is stuck can keep the process."""

    def flush():
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()

    _start_thread(flush).join(1)


def join(
    address: str,
    processes: int,
    index: int,
    *,
    patience: float,
    wait: float,
    advice: str,
    port: Callable[[], int],
) -> tuple[Watch, int]:
    """Waits until all processes of a run are there, and watches them from then on.

    Args:
      address: host:port, where process 0 listens.
      processes: how many there are.
      index: of this one.
      patience: seconds of silence after which a process counts as gone.
      wait: seconds for all to come.
      advice: the end of the line that says that a process is gone.
      port: chooses a number on process 0, which all processes get.

    Returns:
      The watch, and the number.

    Raises:
      ValueError: process 0 cannot listen there; or it is another run's, or has this index already.
      OSError: not all processes came.
    """
    global _joined
    host, _, number = address.rpartition(":")
    meeting = _Meeting(host.strip("[]"), int(number), processes, wait)
    connections, chosen = meeting.lead(port) if index == 0 else meeting.follow(index)
    _joined = Watch(index, processes, connections, patience, advice)
    return _joined, chosen


@dataclasses.dataclass(frozen=True)
class _Meeting:
    """Where processes come together, and how long they wait for one another."""

    host: str
    port: int
    processes: int
    wait: float

    def lead(self, choose):
        """As process 0: the connections to the others by index, and what was chosen."""
        end, came = time.monotonic() + self.wait, {}
        with self._listen() as listener:
            listener.settimeout(_LOOK)
            while len(came) < self.processes - 1:
                came = {index: other for index, other in came.items() if _open(other)}
                if time.monotonic() > end:
                    missing = sorted({*range(1, self.processes)} - {*came})
                    raise TimeoutError(self._late(", ".join(map(str, missing))))
                with contextlib.suppress(TimeoutError):
                    self._welcome(listener.accept()[0], came)
        chosen = choose()
        for connection in came.values():
            connection.sendall(f"start {chosen}\n".encode())
        return came, chosen

    def _listen(self):
        try:
            if socket.has_dualstack_ipv6():
                return socket.create_server(
                    ("", self.port), family=socket.AF_INET6, dualstack_ipv6=True
                )
            return socket.create_server(("", self.port))
        except OSError as error:
            raise ValueError(
                f"process 0 cannot listen on port {self.port} of the coordinator "
                f"({error.strerror}); choose another --distributed.coordinator for all processes"
            ) from None

    def _welcome(self, connection, came):
        """Adds a connection to those that came, or closes it."""
        connection.settimeout(_SETTLE)
        try:
            word, index, processes = _receive_line(connection).split()
            index, processes = int(index), int(processes)
            if word != _GREETING:
                raise ValueError(word)
        except (OSError, ValueError):  # a stranger
            connection.close()
            return
        refusal = ""
        if processes != self.processes:
            refusal = f"process 0 was started as one of {self.processes}, not of {processes}"
        elif index in came:
            refusal = f"there is a process {index} of {processes} already"
        if not refusal:
            came[index] = connection
            return
        with connection, contextlib.suppress(OSError):
            connection.sendall(f"no {refusal}\n".encode())

    def follow(self, index):
        """As another process: the connection to process 0, and what was chosen."""
        end = time.monotonic() + self.wait
        connection = self._connect(end)
        # A little longer than process 0, which knows who is late.
        connection.settimeout(max(0, end - time.monotonic()) + _GRACE)
        try:
            connection.sendall(f"{_GREETING} {index} {self.processes}\n".encode())
            word, _, rest = _receive_line(connection).partition(" ")
        except TimeoutError:
            raise TimeoutError(self._late("0")) from None
        except OSError:
            word, rest = "", ""
        if word == "no":
            connection.close()
            raise ValueError(f"{rest}; see --distributed.index and --distributed.processes")
        if word != "start":
            connection.close()
            raise ConnectionError(
                f"process 0 of {self.processes} ended before all had come; see its messages"
            )
        return {0: connection}, int(rest)

    def _connect(self, end):
        while True:
            try:
                connection = socket.create_connection((self.host, self.port), timeout=_GRACE)
                # Where nobody listens yet, a connection on one host may be to itself.
                if connection.getsockname() != connection.getpeername():
                    return connection
                connection.close()
                reason = "nobody listens there"
            except OSError as error:
                reason = error.strerror or "no answer"
            if time.monotonic() > end:
                raise TimeoutError(f"{self._late('0')} ({reason})")
            time.sleep(_LOOK)

    def _late(self, missing):
        return (
            f"process {missing} of {self.processes} did not come to {self.host}:{self.port} "
            f"within {self.wait:g} s; start all processes with the same --distributed.coordinator"
        )


def _receive_line(connection):
    """A line without its end, or "" where the connection ends before."""
    text = b""
    while not text.endswith(b"\n"):
        byte = connection.recv(1)  # what follows is for the watch
        if not byte or len(text) > _LONGEST:
            return ""
        text += byte
    return text[:-1].decode()


def _open(connection):
    """Whether a connection, on which nothing is due, has not ended."""
    connection.setblocking(False)
    try:
        return bool(connection.recv(1, socket.MSG_PEEK))
    except BlockingIOError:
        return True
    except OSError:
        return False


def relay(host: str, port: int) -> int:
    """Carries connections to a service of another host, and keeps them when that goes away.

    jax ends the process with a page of its own as soon as the connection to its service closes.

    Args:
      host: of the service.
      port: of the service, which need not be there yet.

    Returns:
      The port of 127.0.0.1 to connect to in its place.
    """
    listener = socket.create_server(("127.0.0.1", 0))

    def accept():
        while True:
            _start_thread(carry, listener.accept()[0])

    def carry(near):
        while True:
            try:
                far = socket.create_connection((host, port))
                break
            except OSError:  # if it never comes, the watch will say so
                time.sleep(_LOOK / 4)
        _start_thread(bring, far, near)
        with contextlib.suppress(OSError):  # the process has closed it
            while data := near.recv(2**16):
                with contextlib.suppress(OSError):  # the service is gone
                    far.sendall(data)
        with contextlib.suppress(OSError):
            far.shutdown(socket.SHUT_WR)

    def bring(far, near):
        with contextlib.suppress(OSError):  # one of them is gone
            while data := far.recv(2**16):
                near.sendall(data)

    _start_thread(accept)
    return listener.getsockname()[1]


def _start_thread(target, *arguments):
    thread = threading.Thread(target=target, args=arguments, daemon=True)
    thread.start()
    return thread

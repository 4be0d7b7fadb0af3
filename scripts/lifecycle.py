"""Stop requests, silent ranks, lost launchers: each rank has one watching thread and a line to rank 0, which knows all.

The thread hears signals through a pipe whatever the main thread does, looks whether the launcher lives, and beats. Knows
processes, signals and sockets; nothing of training but the number of the step, which it repeats to the others.
"""

import atexit
import json
import math
import os
import secrets
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn, TextIO

STOPPED, FAILED = 75, 1
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
SECOND_AFTER_SECONDS = {"SIGINT": 0.3, "SIGTERM": 2.0}
BEAT_SECONDS = 0.25
LEAVE_SECONDS = 3.0
HANG_UP_SECONDS = SAY_SECONDS = VERDICT_SECONDS = 1.0
CONNECT_SECONDS = 60.0
READ_BYTES = 65536
SAME_COMMAND = "the same command continues from the newest checkpoint"


@dataclass(eq=False)
class _Link:
    """The line to one other rank and what it last said; on rank 0 there is one for each rank, elsewhere one to rank 0."""

    line: socket.socket
    rank: int
    heard_at: float
    said: dict = field(default_factory=dict)
    incoming: bytes = b""
    outgoing: bytes = b""


class Watch:
    """This rank's watch over stop requests, over the other ranks, and over the launchers above it.

    `reason` says why the run should stop, None while nothing asks for it; the training loop reads it at step boundaries and
    the ranks agree there. Before training a request leaves at once with status 75. A second SIGINT leaves at once with status
    1, and so does every rank when one is gone, or silent for `silent_seconds`.
    """

    def __init__(self, rank: int, local_rank: int, num_launchers: int, silent_seconds: float) -> None:
        self.reason: str | None = None
        self.step = 0
        self._rank, self._local_rank, self._silent_seconds = rank, local_rank, silent_seconds
        self._training = self._closing = self._leaving = self._at_once = self._raised = False
        self._verdict: str | None = None
        self._token, self._links, self._listener = "", [], None
        self._asked_at = self._looked_at = time.monotonic()
        self._interrupted_at = math.inf
        self._num_launchers, self._launchers = num_launchers, [] if _is_orphan(num_launchers) else _ancestors(num_launchers)
        self._selector = selectors.DefaultSelector()
        self._waker, self._wakened = socket.socketpair()
        for end in (self._waker, self._wakened):
            end.setblocking(False)
        self._selector.register(self._wakened, selectors.EVENT_READ, self._hear_signals)
        self._wakeup_before = -1
        self._handlers = self._take_signals() if threading.current_thread() is threading.main_thread() else None
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)
        self._thread.start()

    def listen(self) -> tuple[int, int]:
        """Rank 0 opens the line for the others: (port, token), which `connect` on every other rank needs."""
        self._listener = socket.create_server(("", 0))
        self._listener.setblocking(False)
        number = secrets.randbits(48)
        self._token = f"{number}"
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        return self._listener.getsockname()[1], number

    def connect(self, host: str, port: int, number: int) -> None:
        """Every rank but 0 calls rank 0, which listens at `port` of `host`."""
        self._token = f"{number}"
        self._add_link(socket.create_connection((host, port), CONNECT_SECONDS), 0)
        self._wake()

    @contextmanager
    def before_training(self) -> Iterator[None]:
        """Around everything before step one: a stop request ends in status 75, whatever it interrupted; later ones wait."""
        try:
            yield
        except BaseException as fault:
            if self.reason is None or isinstance(fault, ValueError):
                self.close(clean=isinstance(fault, (ValueError, SystemExit)))
                raise
            self._say_stopped()
            self.close(clean=True)
            raise SystemExit(STOPPED) from None
        self._training = True

    @contextmanager
    def during_training(self) -> Iterator[None]:
        """Around the loop, where a request waits for the step boundary at which all ranks agree.

        A collective that fails here because a rank died may be known before the watch knows of that rank: it is given time to.
        """
        try:
            yield
        except SystemExit:
            self.close(clean=True)
            raise
        except BaseException:
            if self._links:
                self._thread.join(VERDICT_SECONDS)
            self.close(clean=False)
            raise
        self.close(clean=True)

    def close(self, clean: bool) -> None:
        """Ends the watch; `clean` tells the other ranks that this one leaves because it may."""
        self._leaving, self._closing = clean, True
        self._wake()
        self._thread.join()
        if self._handlers is not None:
            signal.set_wakeup_fd(self._wakeup_before)
            for number, handler in self._handlers.items():
                signal.signal(number, handler or signal.SIG_DFL)
        if clean:
            self._tell()
            self._hang_up()
        for each in (*(link.line for link in self._links), self._listener, self._waker, self._wakened, self._selector):
            if each is not None:
                each.close()

    def _hang_up(self) -> None:
        """Lets the last words arrive: a line that is closed with something unread in it takes them back."""
        limit = time.monotonic() + HANG_UP_SECONDS
        for link in self._links:
            link.line.settimeout(max(0.01, limit - time.monotonic()))
            try:
                link.line.shutdown(socket.SHUT_WR)
                while link.line.recv(READ_BYTES) and time.monotonic() < limit:
                    continue
            except OSError:
                continue

    def _take_signals(self) -> dict:
        """Takes over the stop signals; a hang-up that was to be ignored (nohup) stays ignored."""
        self._wakeup_before = signal.set_wakeup_fd(self._waker.fileno(), warn_on_full_buffer=False)
        taken = [each for each in STOP_SIGNALS if each != signal.SIGHUP or signal.getsignal(each) != signal.SIG_IGN]
        return {number: signal.signal(number, self._on_signal) for number in taken}

    def _on_signal(self, number: int, frame) -> None:
        """In the main thread, where only an exception can end what it does."""
        if self._training or self._closing or self._raised:
            return
        self._raised, self._asked_at = True, time.monotonic()
        self.reason = self.reason or signal.Signals(number).name
        _end_descendants()
        raise SystemExit(STOPPED)

    def _wake(self) -> None:
        self._waker.send(b"\0")

    def _watch(self) -> None:
        while not self._closing:
            ready = self._selector.select(BEAT_SECONDS)
            self._forgive_own_pause()
            for key, _ in ready:
                key.data(key.fileobj)
            if self._launchers != _ancestors(self._num_launchers):
                self._request("a lost launcher")
            self._tell()
            self._judge()

    def _forgive_own_pause(self) -> None:
        """A rank that was itself stopped or starved heard nobody for that time, which is not the others' silence."""
        now = time.monotonic()
        pause, self._looked_at = now - self._looked_at, now
        if pause > self._silent_seconds / 2:
            for link in self._links:
                link.heard_at += pause

    def _hear_signals(self, wakened: socket.socket) -> None:
        for number in wakened.recv(READ_BYTES):
            if number in STOP_SIGNALS:
                self._hear_signal(signal.Signals(number).name)

    def _hear_signal(self, name: str) -> None:
        """launch.py adds a SIGTERM to the first Ctrl-C, and torchrun makes a SIGTERM of the second: they differ in time."""
        waited = time.monotonic() - self._interrupted_at
        if self._training and waited > SECOND_AFTER_SECONDS.get(name, math.inf):
            self._leave_at_once()
        if name == "SIGINT":
            self._interrupted_at = min(self._interrupted_at, time.monotonic())
        self._request(name)

    def _request(self, reason: str) -> None:
        if self.reason is None:
            self.reason, self._asked_at = reason, time.monotonic()
            if not self._training and self._handlers is not None:
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)

    def _accept(self, listener: socket.socket) -> None:
        try:
            line, _ = listener.accept()
        except OSError:
            return
        self._add_link(line, None)

    def _add_link(self, line: socket.socket, rank: int | None) -> None:
        line.setblocking(False)
        line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        link = _Link(line, -1 if rank is None else rank, time.monotonic())
        self._links = [*self._links, link]
        self._selector.register(line, selectors.EVENT_READ, lambda _: self._hear(link))

    def _hear(self, link: _Link) -> None:
        try:
            received = link.line.recv(READ_BYTES)
        except OSError:
            received = b""
        *lines, link.incoming = (link.incoming + received).split(b"\n")
        news = [_parse(line) for line in lines]
        for said in news:
            if said.get("token") == self._token:
                self._heed(link, said)
        if not received or any(said.get("token") != self._token for said in news):
            self._drop(link)
            if link.said and not link.said["leaving"]:
                self._fail(f"rank {link.rank} is gone, at step {link.said['step']}")

    def _heed(self, link: _Link, said: dict) -> None:
        link.said, link.rank, link.heard_at = said, said["rank"], time.monotonic()
        if said["verdict"] is not None:
            self._verdict = said["verdict"]
            os._exit(FAILED)
        if said["at_once"]:
            self._leave_at_once()
        if said["reason"] is not None:
            self._request(said["reason"])

    def _drop(self, link: _Link) -> None:
        self._links = [other for other in self._links if other is not link]
        self._selector.unregister(link.line)
        link.line.close()

    def _tell(self) -> None:
        """Sends the present state to the other end of every line; what a full line cannot take is left for the next beat."""
        state = {
            "token": self._token, "rank": self._rank, "process": os.getpid(), "parent": os.getppid(),
            "host": socket.gethostname(), "step": self.step, "reason": self.reason, "at_once": self._at_once,
            "verdict": self._verdict, "leaving": self._leaving,
        }  # fmt: skip
        message = json.dumps(state).encode() + b"\n"
        for link in self._links if self._rank else [link for link in self._links if link.said]:
            link.outgoing = link.outgoing or message
            try:
                link.outgoing = link.outgoing[link.line.send(link.outgoing) :]
            except OSError:
                continue

    def _judge(self) -> None:
        now = time.monotonic()
        for link in self._links:
            if now - link.heard_at > self._silent_seconds and link.said and not link.said["leaving"]:
                self._fail(
                    f"rank {link.rank} has been silent for {self._silent_seconds:g} s, at step {link.said['step']}", link
                )
        if self.reason is not None and not self._training and now - self._asked_at > LEAVE_SECONDS and not self._closing:
            self._leaving = True
            self._tell()
            self._say_stopped()
            _end_descendants()
            os._exit(STOPPED)

    def _fail(self, verdict: str, silent: _Link | None = None) -> None:
        self._verdict = verdict
        self._tell()
        if silent is not None:
            _kill_sibling(silent.said)
        if self._rank <= 1 or self._local_rank == 0:
            _say_briefly(f"failed: {verdict}; all ranks stop; {SAME_COMMAND}", sys.stderr)
        os._exit(FAILED)

    def _leave_at_once(self) -> None:
        self._at_once = True
        self._tell()
        if self._rank == 0:
            _say_briefly(f"Stopped at once, at step {self.step}, without a save; {SAME_COMMAND}", sys.stdout)
        os._exit(FAILED)

    def _say_stopped(self) -> None:
        if self._rank == 0:
            say(f"Stopped by {self.reason} before training went on; {SAME_COMMAND}", sys.stdout)


def end(status: int) -> NoReturn:
    """Ends the process after its exit handlers, all output written."""
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        lose_terminal()
    os._exit(status)


def say(line: str, file: TextIO) -> None:
    """Prints a line; when the terminal or the pipe behind it is gone, all output goes nowhere from then on."""
    try:
        print(line, file=file, flush=True)
    except OSError:
        lose_terminal()


def lose_terminal() -> None:
    """Points standard output and error at nothing: a lost terminal must not end a run."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    for number in (1, 2):
        os.dup2(nothing, number)
    os.close(nothing)


def _say_briefly(line: str, file: TextIO) -> None:
    """As `say`, from a process that must end even if its output is blocked."""
    speaker = threading.Thread(target=say, args=(line, file), daemon=True)
    speaker.start()
    speaker.join(SAY_SECONDS)


def _parse(line: bytes) -> dict:
    """What a line says; nothing when a stranger sent it."""
    try:
        said = json.loads(line)
    except ValueError:
        said = None
    return said if isinstance(said, dict) else {}


def _ancestors(count: int) -> list[int]:
    """The process numbers of `count` generations above this one, 0 for one that is gone."""
    found = [os.getppid()]
    while len(found) < count:
        found.append(_parent(found[-1]))
    return found[:count]


def _is_orphan(count: int) -> bool:
    """Whether the `deepspeed` command above launch.py was gone before this process began to watch."""
    return count == 2 and _ancestors(count)[1] == 1 and b"deepspeed" not in Path("/proc/1/cmdline").read_bytes()


def _parent(process: int) -> int:
    try:
        return int(Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return 0


def _kill_sibling(said: dict) -> None:
    """A stopped process hears nothing but SIGKILL; only a child of this process's own launcher is meant."""
    if said.get("host") == socket.gethostname() and said.get("parent") == os.getppid() == _parent(said["process"]):
        _signal(said["process"], signal.SIGKILL)


def _end_descendants() -> None:
    """Asks compilers and what else this process has started to end."""
    parents = {int(path.name): _parent(int(path.name)) for path in Path("/proc").iterdir() if path.name.isdecimal()}
    family = {os.getpid()}
    while grown := {process for process, parent in parents.items() if parent in family} - family:
        family |= grown
    for process in family - {os.getpid()}:
        _signal(process, signal.SIGTERM)


def _signal(process: int, number: signal.Signals) -> bool:
    """Whether the process was still there to be signalled."""
    try:
        os.kill(process, number)
    except ProcessLookupError:
        return False
    return True

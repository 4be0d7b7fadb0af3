"""Stop requests, silent ranks and lost launchers. Knows processes, signals and sockets; of training only the step's number.

Each rank has one watching thread, which runs whatever the main thread does, and a TCP line to rank 0, which tells the others.
Python's own handler writes each signal into a pipe to that thread. What follows a Ctrl-C:

Before training: `_interrupt_main_thread` ends compilers and raises SystemExit; `before_training` leaves with status 75. The
    watching thread tells the other ranks, where `_request` sends SIGUSR1 to the main thread. `_check_limits` ends a main thread
    that takes longer than LEAVE_SECONDS, with status 75 too. A second Ctrl-C changes nothing.
While training: `_request` sets `reason` on every rank. The loop reads it after each step; all ranks save and leave with status
    75. A second Ctrl-C ends all ranks with status 1, without a save.
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
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, NoReturn, TextIO

import torch

from scripts import config

STOPPED = 75
FAILED = 1
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
SAME_COMMAND = "the same command continues from the newest checkpoint"
READ_BYTES = 65536


class Address(NamedTuple):
    """The `port` at which rank 0 listens, and the `token` (48 random bits) without which it takes nobody for a rank."""

    port: int
    token: int


class ProcessStat(NamedTuple):
    """From /proc/<process>/stat: the state's letter, the parent's number, and the start in the kernel's ticks since boot."""

    state: str
    parent: int
    started_ticks: str


class CpuTimes(NamedTuple):
    """Seconds of work of all programs on the cores that this process may use, and of this process; seconds on the clock."""

    everyone: float
    own: float
    clock: float


@dataclass(eq=False)
class _Link:
    """The line to one other rank, and the last state that it sent. Rank 0 has one for each rank, the others one to rank 0."""

    line: socket.socket
    heard_at: float
    state: dict = field(default_factory=dict)
    incoming: bytes = b""
    outgoing: bytes = b""


class Watch:
    """This rank's watch over stop requests, over the other ranks, and over the `num_launchers` processes that launched it.

    The training loop sets `step`, and reads in `reason` why the run should stop; None while nothing asks for that. When a rank
    is gone, or silent for `silent_seconds`, every rank ends with status 1.
    """

    def __init__(self, rank: int, local_rank: int, num_launchers: int, silent_seconds: float) -> None:
        self.reason: str | None = None
        self.step = 0
        self._rank, self._local_rank, self._silent_seconds = rank, local_rank, silent_seconds
        self._training = self._closing = self._leaving = self._at_once = self._raised = False
        self._token, self._links, self._listener, self._interrupted_at = 0, [], None, math.inf
        self._asked_at = self._looked_at = self._told_at = time.monotonic()
        self._told_reason: str | None = None
        self._launchers = _ancestors(num_launchers)
        if num_launchers == 2 and self._launchers[1] == 1 and b"deepspeed" not in Path("/proc/1/cmdline").read_bytes():
            self._launchers[1] = 0  # the `deepspeed` command above launch.py was gone before this watch began
        self._selector = selectors.DefaultSelector()
        self._waker, self._wakened = socket.socketpair()
        for end in (self._waker, self._wakened):
            end.setblocking(False)
        self._selector.register(self._wakened, selectors.EVENT_READ, self._read_signals)
        self._wakeup_before, self._handlers = -1, {}
        if threading.current_thread() is threading.main_thread():
            self._wakeup_before = signal.set_wakeup_fd(self._waker.fileno(), warn_on_full_buffer=False)
            taken = [each for each in STOP_SIGNALS if each != signal.SIGHUP or signal.getsignal(each) != signal.SIG_IGN]
            self._handlers = {number: signal.signal(number, self._interrupt_main_thread) for number in taken}
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)
        self._thread.start()

    def listen(self) -> Address:
        """Rank 0 opens a port for the others: what `connect` on every other rank needs, beside the host's name."""
        self._listener = socket.create_server(("", 0))
        self._listener.setblocking(False)
        self._token = secrets.randbits(48)
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        return Address(self._listener.getsockname()[1], self._token)

    def connect(self, host: str, port: int, token: int) -> None:
        """Every other rank calls rank 0, which listens on `host`; OSError when nobody answers there."""
        self._token = token
        self._add_link(socket.create_connection((host, port), config.CONNECT_SECONDS))
        self._waker.send(b"\0")

    @contextmanager
    def before_training(self) -> Iterator[None]:
        """Around everything before step one. A stop request ends it with SystemExit(75), whatever it interrupts."""
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
        """Around the loop, where a request waits for the end of the step. A collective may fail before the watch knows that a
        rank has died: it gets VERDICT_SECONDS to name that rank.
        """
        clean = True
        try:
            with sharing_cores():
                yield
        except BaseException as fault:
            clean = isinstance(fault, SystemExit)
            if self._links and not clean:
                self._thread.join(config.VERDICT_SECONDS)
            raise
        finally:
            self.close(clean)

    def close(self, clean: bool) -> None:
        """Ends the watch and gives the signals back; `clean` tells the other ranks that this one may leave."""
        self._leaving, self._closing = clean, True
        self._waker.send(b"\0")
        self._thread.join()
        if self._handlers:
            signal.set_wakeup_fd(self._wakeup_before)
            for number, handler in self._handlers.items():
                signal.signal(number, handler or signal.SIG_DFL)
        if clean:
            self._send_state()
            self._finish_lines()
        for each in filter(None, (*(link.line for link in self._links), self._listener, self._waker, self._wakened)):
            each.close()
        self._selector.close()

    def _finish_lines(self) -> None:
        """Waits until the last state has arrived: closing a line with something unread in it would take that back."""
        limit = time.monotonic() + config.LAST_WORDS_SECONDS
        for link in self._links:
            link.line.settimeout(max(0.01, limit - time.monotonic()))
            try:
                link.line.shutdown(socket.SHUT_WR)
                while link.line.recv(READ_BYTES) and time.monotonic() < limit:
                    continue
            except OSError:
                continue

    def _interrupt_main_thread(self, number: int, frame) -> None:
        """Python runs this in the main thread. Before training it ends whatever that does; later the loop reads `reason`."""
        if self._training or self._closing or self._raised:
            return
        self._raised, self._asked_at = True, time.monotonic()
        self.reason = self.reason or signal.Signals(number).name
        _end_descendants()
        raise SystemExit(STOPPED)

    def _watch(self) -> None:
        while not self._closing:
            ready = self._selector.select(config.WATCH_BEAT_SECONDS)
            now = time.monotonic()
            pause, self._looked_at = now - self._looked_at, now
            if pause > self._silent_seconds / 2:  # itself stopped or starved, it has heard nobody: the others were not silent
                for link in self._links:
                    link.heard_at += pause
            for key, _ in ready:
                key.data(key.fileobj)
            if self._launchers != _ancestors(len(self._launchers)):
                self._request("a lost launcher")
            # Not for each message: two ranks would answer each other without end.
            if self.reason != self._told_reason or now >= self._told_at + config.WATCH_BEAT_SECONDS:
                self._told_reason, self._told_at = self.reason, now
                self._send_state()
            self._check_limits()

    def _read_signals(self, wakened: socket.socket) -> None:
        """A first signal is a request; a second Ctrl-C while training ends all ranks at once. Time tells which it is: launch.py
        adds a SIGTERM to the first Ctrl-C at once, and torchrun makes a SIGTERM of the second.
        """
        for name in [signal.Signals(number).name for number in wakened.recv(READ_BYTES) if number in STOP_SIGNALS]:
            waited = time.monotonic() - self._interrupted_at
            if self._training and waited > config.SECOND_SIGNAL_AFTER_SECONDS.get(name, math.inf):
                self._leave_at_once()
            if name == "SIGINT":
                self._interrupted_at = min(self._interrupted_at, time.monotonic())
            self._request(name)

    def _request(self, reason: str) -> None:
        if self.reason is None:
            self.reason, self._asked_at = reason, time.monotonic()
            if not self._training and self._handlers:
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)

    def _accept(self, listener: socket.socket) -> None:
        try:
            line, _ = listener.accept()
        except OSError:
            return
        self._add_link(line)

    def _add_link(self, line: socket.socket) -> None:
        line.setblocking(False)
        line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        link = _Link(line, time.monotonic())
        self._links = [*self._links, link]
        self._selector.register(line, selectors.EVENT_READ, lambda _: self._read_messages(link))

    def _read_messages(self, link: _Link) -> None:
        """Applies the states that have come over a line; the line is dropped when it is closed or a stranger's."""
        try:
            received = link.line.recv(READ_BYTES)
        except OSError:
            received = b""
        *lines, link.incoming = (link.incoming + received).split(b"\n")
        states = [_parse(line) for line in lines]
        known = [state for state in states if state.get("token") == self._token]
        for state in known:
            link.state, link.heard_at = state, time.monotonic()
            if state["verdict"] is not None:
                os._exit(FAILED)
            if state["at_once"]:
                self._leave_at_once()
            if state["reason"] is not None:
                self._request(state["reason"])
        if not received or len(known) < len(states):
            self._links = [other for other in self._links if other is not link]
            self._selector.unregister(link.line)
            link.line.close()
            if link.state and not link.state["leaving"]:
                self._fail(f"rank {link.state['rank']} is gone, at step {link.state['step']}")

    def _send_state(self, verdict: str | None = None) -> None:
        """Sends the present state over every line; what a full line cannot take waits for the next beat."""
        message = json.dumps({
            "token": self._token, "rank": self._rank, "process": os.getpid(), "parent": os.getppid(),
            "host": socket.gethostname(), "step": self.step, "reason": self.reason, "at_once": self._at_once,
            "verdict": verdict, "leaving": self._leaving,
        }).encode() + b"\n"  # fmt: skip
        for link in self._links if self._rank else [link for link in self._links if link.state]:
            link.outgoing = link.outgoing or message
            try:
                link.outgoing = link.outgoing[link.line.send(link.outgoing) :]
            except OSError:
                continue

    def _check_limits(self) -> None:
        """Ends the run when a rank is silent for too long, and this process when its main thread does not obey a request."""
        now = time.monotonic()
        for link in self._links:
            if now - link.heard_at > self._silent_seconds and link.state and not link.state["leaving"]:
                silent = f"rank {link.state['rank']} has been silent for {self._silent_seconds:g} s"
                self._fail(f"{silent}, at step {link.state['step']}", link.state)
        if self.reason is not None and not self._training and now - self._asked_at > config.LEAVE_SECONDS and not self._closing:
            self._leaving = True
            self._send_state()
            self._say_stopped()
            _end_descendants()
            os._exit(STOPPED)

    def _fail(self, verdict: str, silent: dict | None = None) -> None:
        self._send_state(verdict)
        if silent and silent["host"] == socket.gethostname() and silent["parent"] == os.getppid() == _parent(silent["process"]):
            _signal(silent["process"], signal.SIGKILL)  # a stopped process of this launcher obeys nothing else
        if self._rank <= 1 or self._local_rank == 0:
            _say_briefly(f"failed: {verdict}; all ranks stop; {SAME_COMMAND}", sys.stderr)
        os._exit(FAILED)

    def _leave_at_once(self) -> None:
        self._at_once = True
        self._send_state()
        if self._rank == 0:
            _say_briefly(f"Stopped at once, at step {self.step}, without a save; {SAME_COMMAND}", sys.stdout)
        os._exit(FAILED)

    def _say_stopped(self) -> None:
        if self._rank == 0:
            say(f"Stopped by {self.reason} before training went on; {SAME_COMMAND}", sys.stdout)


def end(status: int) -> NoReturn:
    """Ends the process with `status`, after its exit handlers and with all output written, without Python's own teardown."""
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        lose_terminal()
    os._exit(status)


@contextmanager
def sharing_cores() -> Iterator[None]:
    """Keeps steps from becoming many times slower while other programs take cores. Changes no result; one thread needs none."""
    leave, num_threads = threading.Event(), torch.get_num_threads()
    thread = threading.Thread(target=_share_cores, args=(leave, num_threads), name="sharing cores", daemon=True)
    if num_threads > 1:
        thread.start()
    try:
        yield
    finally:
        leave.set()
        if num_threads > 1:
            thread.join()


def cpu_times() -> CpuTimes:
    """What was spent until now, from /proc/stat."""
    cores = {f"cpu{number}" for number in os.sched_getaffinity(0)}
    rows = (line.split() for line in Path("/proc/stat").read_text().splitlines())
    ticks = sum(sum(map(int, row[1:4] + row[6:8])) for row in rows if row[0] in cores)
    return CpuTimes(ticks / os.sysconf("SC_CLK_TCK"), time.process_time(), time.monotonic())


def cores_of_others(before: CpuTimes, after: CpuTimes) -> float:
    """How many cores other programs kept busy in between."""
    others = after.everyone - before.everyone - (after.own - before.own)
    return others / (after.clock - before.clock)


def idle_teams(num_threads: int, num_cores: int) -> int:
    """How many teams of threads more give the process more threads than cores."""
    return (num_cores - num_threads) // (num_threads - 1) + 1


def _share_cores(leave: threading.Event, num_threads: int) -> None:
    """While other programs take more than our threads leave free, holds teams of OpenMP's threads that do nothing.

    Where a process has more threads than cores, libgomp's threads wait 1,000 rounds for work before they sleep, and else
    300,000, while another program or a thread of ours waits for the core (libgomp/config/linux/wait.h, gomp_managed_threads).
    """
    num_cores, held, before = len(os.sched_getaffinity(0)), [], cpu_times()
    while not leave.wait(config.COMPANY_SECONDS):
        now = cpu_times()
        has_company, before = cores_of_others(before, now) > num_cores - num_threads + config.COMPANY_CORES, now
        if has_company and not held:
            held = [ThreadPoolExecutor(1) for _ in range(idle_teams(num_threads, num_cores))]
            for team in held:
                team.submit(torch.zeros, config.TEAM_ELEMENTS * num_threads)
        elif held and not has_company:
            _let_go(held)
            held = []
    _let_go(held)


def _let_go(held: list[ThreadPoolExecutor]) -> None:
    for team in held:
        team.shutdown()


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


def process_stat(process: int) -> ProcessStat | None:
    """What the kernel says of a process of this machine, by its number; None when there is none (any more)."""
    try:
        fields = Path(f"/proc/{process}/stat").read_bytes().rpartition(b")")[2].decode().split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return ProcessStat(state=fields[0], parent=int(fields[1]), started_ticks=fields[19])


def _say_briefly(line: str, file: TextIO) -> None:
    """As `say`, from a process that must end even if its output is blocked."""
    speaker = threading.Thread(target=say, args=(line, file), daemon=True)
    speaker.start()
    speaker.join(config.SAY_SECONDS)


def _parse(line: bytes) -> dict:
    try:
        state = json.loads(line)
    except ValueError:
        return {}
    return state if isinstance(state, dict) else {}


def _ancestors(count: int) -> list[int]:
    """The process numbers of `count` generations above this one, 0 for one that is gone."""
    found = [os.getppid()]
    while len(found) < count:
        found.append(_parent(found[-1]))
    return found[:count]


def _parent(process: int) -> int:
    stat = process_stat(process)
    return 0 if stat is None else stat.parent


def _end_descendants() -> None:
    """Asks every process that this one has started, compilers above all, to end."""
    parents = {int(path.name): _parent(int(path.name)) for path in Path("/proc").iterdir() if path.name.isdecimal()}
    family = {os.getpid()}
    while grown := {process for process, parent in parents.items() if parent in family} - family:
        family |= grown
    for process in family - {os.getpid()}:
        _signal(process, signal.SIGTERM)


def _signal(process: int, number: signal.Signals) -> None:
    try:
        os.kill(process, number)
    except ProcessLookupError:
        return

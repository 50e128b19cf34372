"""Processes of a run notice within seconds when another process or their launcher dies.

A collective whose partner has died fails at once under gloo and waits for the full timeout under nccl; a worker whose
launcher was killed with -9 would keep writing forever.  So every process holds a TCP connection to the main one, which
the kernel closes however the process ends, and checks who its parent is.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from sora_llm import terminal
from sora_llm.errors import RunFailed

CONNECT_SECONDS = 60
POLL_SECONDS = 0.25
GRACE_SECONDS = 8.0
"""Time for the main thread to end by itself, with its own error, after another process was lost."""
LAUNCHER_GRACE_SECONDS = 3.0
"""Time for the signal that ended the launcher to arrive here too."""
NOTICE_SECONDS = 2.0
"""Time to notice the death that caused an error in a collective."""

_LAUNCHER_MARKS = ("LOCAL_RANK", "TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION")


class LivenessMonitor:
    """Watches the launcher, and after `connect` also the other processes, in a thread.

    `lost_process` names the process that died, or None; a stopped or slow one is not dead.  A process that has not
    ended by itself `GRACE_SECONDS` later is ended, after calling `on_lost_process`.
    """

    def __init__(self, is_stopping: Callable[[], bool] = lambda: False) -> None:
        """Args:
        is_stopping: whether this process was asked to stop.  It will, and needs no launcher for that: USR1 sent to all
            processes of a job shortly before its time is up kills launchers, but a checkpoint must still be saved.
        """
        self._is_stopping = is_stopping
        self._orphaned_at: float | None = None
        self.lost_process: str | None = None
        self.on_lost_process: Callable[[str], None] = print_final_error
        self._name = f"a process on {socket.gethostname()}"
        self._parent = os.getppid() if any(mark in os.environ for mark in _LAUNCHER_MARKS) else None
        self._closing = threading.Event()
        self._lost = threading.Event()
        self._has_waited = False
        self._peers: dict[socket.socket, int] = {}
        self._selector = selectors.DefaultSelector()
        self._thread = threading.Thread(target=self._watch, name="liveness", daemon=True)
        if self._parent is not None:
            self._thread.start()

    def connect(self, process_index: int, num_processes: int, exchange: Callable[[Any], list[Any]]) -> None:
        """Connect to the other processes; call it on every process.

        Args:
            exchange: gathers a value from every process on every process, in their order.
        """
        self._name = f"process {process_index} on {socket.gethostname()}"
        if num_processes == 1:
            return
        for index, peer in _star(process_index, num_processes, exchange).items():
            self._peers[peer] = index
        names = exchange(self._name)
        for peer, index in self._peers.items():
            self._selector.register(peer, selectors.EVENT_READ, names[index])
        if not self._thread.is_alive():
            self._thread.start()

    def close(self, failure: str | None = None) -> None:
        """Disconnect cleanly, so that this process's end is not reported as a death.  With `failure` the others are
        told that it failed."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join()
        self._selector.close()
        for peer in self._peers:
            with contextlib.suppress(OSError):
                peer.sendall(b"bye\n" if failure is None else f"lost {self._own(failure)}\n".encode())
            peer.close()

    def wait_for_lost_process(self) -> str | None:
        """The lost process, if one is noticed within NOTICE_SECONDS: errors of collectives arrive slightly earlier.
        Only the first call waits, since one error may ask repeatedly while it propagates."""
        if self._thread.is_alive() and not self._has_waited:
            self._has_waited = True
            self._lost.wait(NOTICE_SECONDS)
        return self.lost_process

    # ----- the thread -------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        while not self._closing.is_set():
            for key, _ in self._selector.select(POLL_SECONDS):
                sentence = _heard(key.fileobj, name=key.data)  # type: ignore[arg-type]
                self._selector.unregister(key.fileobj)
                if sentence is not None:
                    self._give_up(sentence)
                    return
            if self._has_outlived_launcher():
                self._give_up(f"the launcher of {self._name} died")
                return

    def _has_outlived_launcher(self) -> bool:
        """Whether the launcher has been dead for LAUNCHER_GRACE_SECONDS and nobody has asked this process to stop."""
        if self._parent is None or os.getppid() == self._parent:
            return False
        self._orphaned_at = self._orphaned_at or time.monotonic()
        return not self._is_stopping() and time.monotonic() - self._orphaned_at > LAUNCHER_GRACE_SECONDS

    def _give_up(self, sentence: str) -> None:
        self.lost_process = sentence
        for peer in self._peers:
            with contextlib.suppress(OSError):
                peer.sendall(f"lost {sentence}\n".encode())
        self._lost.set()
        deadline = time.monotonic() + GRACE_SECONDS
        while time.monotonic() < deadline and not self._has_outlived_launcher():
            if self._closing.wait(POLL_SECONDS):
                return
        try:
            self.on_lost_process(sentence)
        finally:
            os._exit(1)

    def _own(self, failure: str) -> str:
        return f"{self._name} failed: {' '.join(failure.split())[:1000]}"


def print_final_error(sentence: str) -> None:
    """Print a final message to stderr only: a thread that waits forever may hold stdout's lock."""
    end = "\n" if terminal.is_progress_open() else ""
    print(f"{end}sora_llm: {sentence}", file=sys.stderr, flush=True)


# ----- connections ----------------------------------------------------------------------------------------------------


def _star(process_index: int, num_processes: int, exchange: Callable[[Any], list[Any]]) -> dict[int, socket.socket]:
    """Connections by process: process 0, which all others know as MASTER_ADDR, has one to each of them."""
    host = os.environ.get("MASTER_ADDR", "127.0.0.1")
    server = place = None
    if process_index == 0:
        server = _listen(host)
        place = (server.getsockname()[1], secrets.token_hex(16))
    port, token = exchange(place)[0]
    peers: dict[int, socket.socket] = {}
    if server is None:
        try:
            peer = socket.create_connection((host, port), timeout=CONNECT_SECONDS)
            peer.sendall(f"{token} {process_index}\n".encode())
        except OSError as error:
            raise RunFailed(
                f"process {process_index} on {socket.gethostname()} cannot reach the main process at {host}:{port} "
                f"({error}): the machines of a run must be able to connect to each other on any port"
            ) from error
        return {0: _kept_alive(peer)}
    with server:
        server.settimeout(CONNECT_SECONDS)
        while len(peers) < num_processes - 1:
            try:
                peer, _ = server.accept()
            except OSError as error:
                missing = sorted(set(range(1, num_processes)) - set(peers))
                raise RunFailed(
                    f"process {missing[0]} has not connected to the main process on {socket.gethostname()} within "
                    f"{CONNECT_SECONDS} s: the machines of a run must be able to connect to each other on any port"
                ) from error
            said, _, index = _first_line(peer).partition(" ")
            if secrets.compare_digest(said.encode(), token.encode()):
                peers[int(index)] = _kept_alive(peer)
            else:  # a stranger
                peer.close()
    return peers


def _listen(host: str) -> socket.socket:
    """Listen on every address, like torch's own store: the main machine may resolve its name to 127.0.1.1, or not at
    all.  A run that declares itself local to one machine listens on loopback only."""
    if host in ("localhost", "127.0.0.1"):
        return socket.create_server((host, 0))
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _first_line(peer: socket.socket) -> str:
    """The first line from a connection, read byte by byte because the rest is for the watching thread."""
    peer.settimeout(5)
    said = b""
    with contextlib.suppress(OSError):
        while not said.endswith(b"\n") and len(said) < 100 and (byte := peer.recv(1)):
            said += byte
    return said.decode(errors="replace").strip()


def _heard(peer: socket.socket, name: str) -> str | None:
    """The message from a readable connection; None for a clean disconnect."""
    try:
        said = peer.recv(4096).decode(errors="replace")
    except OSError:
        said = ""
    if said.startswith("bye"):
        return None
    if said.startswith("lost "):
        return said.removeprefix("lost ").strip()
    return f"{name} died"


def _kept_alive(peer: socket.socket) -> socket.socket:
    """Turn on keep-alive: a machine that loses power closes no connection, so half a minute of silence means dead."""
    peer.settimeout(5)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, option):
            peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    return peer

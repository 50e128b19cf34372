"""A run's processes notice each other's death, and that of their launcher, within seconds.

A collective whose partner has died fails at once under gloo and waits for the whole timeout under nccl; a worker whose
launcher was killed with -9 would go on writing for ever.  So every process holds a TCP connection to the main one,
which the kernel closes when a process ends, however it ends; and looks at who its parent is.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import selectors
import socket
import threading
from collections.abc import Callable
from typing import Any

POLL_SECONDS = 0.25
GRACE_SECONDS = 8.0
"""For the main thread to end by itself, with its own error, after a loss."""

_LAUNCHER_MARKS = ("LOCAL_RANK", "TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION")


class Lifeline:
    """Watches the other processes and the launcher in a thread; `loss` says who was lost, None while all live.

    After a loss `on_loss` is called once with the sentence, `GRACE_SECONDS` later the process is ended.
    """

    def __init__(
        self,
        process_index: int,
        num_processes: int,
        exchange: Callable[[Any], list[Any]],
        on_loss: Callable[[str], None] = lambda sentence: None,
    ) -> None:
        """Call it on every process.

        Args:
            exchange: gathers a value from every process on every process, in their order.
        """
        self.loss: str | None = None
        self.on_loss = on_loss
        self._process_index = process_index
        self._parent = os.getppid() if any(mark in os.environ for mark in _LAUNCHER_MARKS) else None
        self._closing = threading.Event()
        self._lost = threading.Event()
        self._peers: dict[socket.socket, int] = {}
        self._names = exchange(f"process {process_index} on {socket.gethostname()}")
        if num_processes > 1:
            self._connect(num_processes, exchange)
        self._thread = threading.Thread(target=self._watch, name="lifeline", daemon=True)
        if self._peers or self._parent is not None:
            self._thread.start()

    def close(self, failure: str | None = None) -> None:
        """Say goodbye: what happens to this process afterwards is no loss.  With `failure` it is one, and the others
        are told."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join()
        for peer in self._peers:
            with contextlib.suppress(OSError):
                peer.sendall(b"bye\n" if failure is None else f"lost {self._own(failure)}\n".encode())
                peer.close()

    def wait_for_loss(self, seconds: float = 2.0) -> str | None:
        """Who was lost, if anybody is found to be within `seconds`: errors of collectives come a little sooner."""
        self._lost.wait(seconds)
        return self.loss

    # ----- connections ------------------------------------------------------------------------------------------------

    def _connect(self, num_processes: int, exchange: Callable[[Any], list[Any]]) -> None:
        """A star around process 0, whose address everybody knows as MASTER_ADDR."""
        host = os.environ.get("MASTER_ADDR", "127.0.0.1")
        server = place = None
        if self._process_index == 0:
            server = _listen(host)
            place = (server.getsockname()[1], secrets.token_hex(16))
        port, token = exchange(place)[0]
        if server is None:
            peer = socket.create_connection((host, port), timeout=60)
            peer.sendall(f"{token} {self._process_index}\n".encode())
            self._peers[_kept_alive(peer)] = 0
            return
        with server:
            server.settimeout(60)
            while len(self._peers) < num_processes - 1:
                peer, _ = server.accept()
                peer.settimeout(5)
                said, _, index = peer.makefile("r").readline().strip().partition(" ")
                if secrets.compare_digest(said, token):
                    self._peers[_kept_alive(peer)] = int(index)
                else:
                    peer.close()

    # ----- the thread -------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            for peer in self._peers:
                selector.register(peer, selectors.EVENT_READ)
            while not self._closing.is_set():
                for key, _ in selector.select(POLL_SECONDS):
                    sentence = self._heard(key.fileobj)  # type: ignore[arg-type]
                    selector.unregister(key.fileobj)
                    if sentence is not None:
                        self._lose(sentence)
                        return
                if self._parent is not None and os.getppid() != self._parent:
                    self._lose(f"the launcher of {self._names[self._process_index]} died")
                    return

    def _heard(self, peer: socket.socket) -> str | None:
        """What a connection that has something to say says: None is goodbye."""
        try:
            said = peer.recv(4096).decode(errors="replace")
        except OSError:
            said = ""
        if said.startswith("bye"):
            return None
        if said.startswith("lost "):
            return said.removeprefix("lost ").strip()
        return f"{self._names[self._peers[peer]]} died"

    def _lose(self, sentence: str) -> None:
        self.loss = sentence
        for peer in self._peers:
            with contextlib.suppress(OSError):
                peer.sendall(f"lost {sentence}\n".encode())
        self._lost.set()
        if not self._closing.wait(GRACE_SECONDS):
            self.on_loss(sentence)
            os._exit(1)

    def _own(self, failure: str) -> str:
        return f"{self._names[self._process_index]} failed: {' '.join(failure.split())[:1000]}"


def _listen(host: str) -> socket.socket:
    try:
        return socket.create_server((host, 0))
    except OSError:  # the name others know this machine by is none of its own addresses
        return socket.create_server(("", 0))


def _kept_alive(peer: socket.socket) -> socket.socket:
    """A machine that loses its power closes nothing: after half a minute without an answer it counts as dead."""
    peer.settimeout(5)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, option):
            peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    return peer

"""One fetch a node: a subscriber that leads fetches each version once, the others map the same memory.

The memory has no name and is sealed against change (memfd); it is handed over a socket of the abstract namespace. So
nothing is left behind however the processes end: the kernel frees the memory with its last user, and the address, which
only one process can hold, with its leader. Either side checks that the other is of the same user. Where the system has
none of this (it is Linux's), everyone fetches for itself.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import mmap
import os
import socket
import struct
import threading
import time
from collections.abc import Callable

import numpy as np

from gsa.packing import snapshot
from gsa.schema import WeightSnapshot

SUPPORTED = hasattr(os, "memfd_create") and hasattr(socket, "SO_PEERCRED")
BEAT_S = 0.5  # between two signs of life of a leader that is asked for what it does not have yet
SILENCE_S = 5.0  # of a leader: then it hangs
PATIENCE_S = 60.0  # with one that lives and gets nothing
SEALS = 0x1 | 0x2 | 0x4 | 0x8  # F_SEAL_SEAL, _SHRINK, _GROW, _WRITE
_ADD_SEALS, _GET_SEALS = 1033, 1034
_ORDER, _SIZES = struct.Struct("<qq"), struct.Struct("<qqqq")  # epoch, version; then bytes of memory and description

Order = tuple[int, int]  # epoch, version


class Memory:
    """Room for one snapshot's bytes, and its description behind them."""

    def __init__(self, fd: int = -1, size: int = 0, description: int = 0) -> None:
        self.fd, self.size, self._described = fd, size, description

    def reserve(self, size: int) -> None:
        """Room for so many bytes, to `write` until `seal`; what was there is let go of."""
        self.close()
        self.size = size
        try:
            self.fd = os.memfd_create("gsa-weights", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.ftruncate(self.fd, max(size, 1))
        except (OSError, AttributeError):  # forbidden here, or not there: then it is this process's alone
            self.close()
            self._own = np.empty(size, np.uint8)

    def write(self, at: int, part: memoryview) -> None:
        """Copies `part` to byte `at`. By write and not through a map: pages then need neither a fault nor zeros."""
        if self.fd < 0:
            self._own[at : at + len(part)] = part
            return
        while part:
            written = os.pwrite(self.fd, part, at)
            at, part = at + written, part[written:]

    def seal(self, description: bytes) -> WeightSnapshot:
        """From here on nobody can change it."""
        self._described = len(description)
        if self.fd < 0:
            return snapshot(description, self._own)
        self.write(self.size, memoryview(description))
        fcntl.fcntl(self.fd, _ADD_SEALS, SEALS)
        return self.read()

    def read(self) -> WeightSnapshot:
        """The snapshot as views of this memory. ValueError where it is not sealed or not as long as said."""
        if fcntl.fcntl(self.fd, _GET_SEALS) & SEALS != SEALS or os.fstat(self.fd).st_size != self._end:
            raise ValueError("not the sealed memory of a snapshot")
        whole = np.frombuffer(mmap.mmap(self.fd, self._end, prot=mmap.PROT_READ), np.uint8)
        return snapshot(whole[self.size : self._end].tobytes(), whole[: self.size])

    def close(self) -> None:
        """Lets go of it; snapshots read from it live on."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def send(self, sock: socket.socket, order: Order) -> None:
        if self.fd >= 0:
            socket.send_fds(sock, [_SIZES.pack(*order, self.size, self._described)], [self.fd])

    @property
    def _end(self) -> int:
        return self.size + self._described


class NodeShare:
    """Owns a subscriber's place among those of its node that follow the same weights: it leads, or it asks.

    `secret` names the weights: it has the server's password in it, so that others cannot guess the address.
    """

    def __init__(self, secret: str) -> None:
        digest = hashlib.blake2b(f"{os.geteuid()} {secret}".encode(), digest_size=16).hexdigest()
        self._address = f"\0gsa-weights-{digest}"
        self._listening: socket.socket | None = None
        self._changed = threading.Condition()  # guards what follows
        self._order: Order = (-1, -1)
        self._memory = Memory()
        self._closed = False

    def lead(self) -> bool:
        """Whether this process is to fetch. It is if nobody else leads; then others ask it."""
        if not SUPPORTED or self._listening is not None:
            return True
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            listening.bind(self._address)
        except OSError:
            listening.close()
            return False
        listening.listen(64)
        self._listening = listening
        self._serving = threading.Thread(target=self._serve, args=[listening], name="share-weights", daemon=True)
        self._serving.start()
        return True

    def offer(self, order: Order, memory: Memory) -> None:
        """Gives sealed memory to those who ask, from now on, in place of what was there."""
        with self._changed:
            previous, self._memory, self._order = self._memory, memory, order
            self._changed.notify_all()
            previous.close()

    def ask(self, order: Order, stopped: Callable[[], bool]) -> tuple[Order, WeightSnapshot] | None:
        """What the leader has, once it has `order` or above. None where it is gone, hangs or is not of this user."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock, contextlib.suppress(OSError, ValueError):
            sock.settimeout(SILENCE_S)
            sock.connect(self._address)
            if not _of_this_user(sock):
                return None
            sock.send(_ORDER.pack(*order))
            deadline = time.monotonic() + PATIENCE_S
            while not stopped() and time.monotonic() < deadline:
                said, fds, _, _ = socket.recv_fds(sock, _SIZES.size, 1)
                if fds:
                    return self._take(said, fds[0])
                if not said:
                    return None
        return None

    def close(self) -> None:
        """Ends it. Where it led, another can lead once this returns."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            self._memory.close()
        if self._listening is not None:
            with contextlib.suppress(OSError):
                self._listening.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
            self._listening.close()
            self._serving.join(1)  # one that still accepts keeps the address

    def _take(self, said: bytes, fd: int) -> tuple[Order, WeightSnapshot]:
        epoch, version, size, description = _SIZES.unpack(said)
        memory = Memory(fd, size, description)
        try:
            received = memory.read()
        except BaseException:
            memory.close()
            raise
        self.offer((epoch, version), memory)  # kept for the case that this one has to lead
        return (epoch, version), received

    def _serve(self, listening: socket.socket) -> None:
        while not self._closed:
            try:
                sock, _ = listening.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=[sock], name="share-weights", daemon=True).start()

    def _answer(self, sock: socket.socket) -> None:
        with sock, contextlib.suppress(OSError, struct.error):
            sock.settimeout(SILENCE_S)
            if not _of_this_user(sock):
                return
            wanted = _ORDER.unpack(sock.recv(_ORDER.size))
            with self._changed:
                while not self._closed:
                    if self._changed.wait_for(lambda: self._closed or self._order >= wanted, BEAT_S):
                        if not self._closed:
                            self._memory.send(sock, self._order)
                        return
                    sock.send(b".")


def _of_this_user(sock: socket.socket) -> bool:
    pid_uid_gid = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return struct.unpack("3i", pid_uid_gid)[1] == os.geteuid()

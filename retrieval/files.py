"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import io
import mmap
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from isal.isal_zlib import crc32  # zlib's checksum, many times as fast

from gsa.errors import UsageError

BLOCK_BYTES = 4 << 20  # a multiple of a huge page
TRIES, RETRY_S = 5, 0.02  # to take a writer's lock


class WholeFile(io.FileIO):
    """An unbuffered file whose `write` writes all or raises: a disk that fills up is not taken for success.

    `crc` is the CRC-32 of what was written since it was last set to 0.
    """

    crc = 0

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self.crc = crc32(view, self.crc)
        self._put(view)
        return len(view)

    def _put(self, view: memoryview) -> None:
        while view:
            view = view[super().write(view) or 0 :]


class BlockFile(WholeFile):
    """A new file that reaches the system in whole blocks, each at a multiple of its size; the rest by `flush`.

    Linux keeps what is written so in huge pages where the file system has them (ext4, xfs): reading a map of it then
    costs what reading memory does, and a quarter more otherwise.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, "x+")
        self._held, self._size = memoryview(mmap.mmap(-1, BLOCK_BYTES)), 0  # held back: so many bytes
        self._room = BLOCK_BYTES  # for it, up to the end of the block

    def _put(self, view: memoryview) -> None:
        while view:
            part = view[: self._room - self._size]
            self._held[self._size : self._size + len(part)] = part
            self._size, view = self._size + len(part), view[len(part) :]
            if self._size == self._room:
                self.flush()

    def tell(self) -> int:
        return super().tell() + self._size

    def flush(self) -> None:
        """Gives the system what was held back. What it refuses is lost."""
        size, self._size = self._size, 0
        super()._put(self._held[:size])
        self._room = BLOCK_BYTES - super().tell() % BLOCK_BYTES


@contextlib.contextmanager
def replace_file(path: Path) -> Iterator[WholeFile]:
    """A file to write that takes the place of `path`, durably, when the block ends without an error. Of several threads
    or processes the last to end has its own there, whole."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        with WholeFile(temporary, "w") as file:
            yield file
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class WriterLock:
    """The right to write to a folder, such as a store's. The system takes it back from a process that dies."""

    def __init__(self, folder: Path, what: str = "store") -> None:
        self._file = (folder / "writer.lock").open("a+")
        if not self._taken():
            self._file.seek(0)
            owner = self._file.read().strip() or "another process"
            self._file.close()
            raise UsageError(f"{owner} writes to the {what} {folder} already; a {what} has one writer.") from None
        self._file.truncate(0)
        self._file.write(f"Process {os.getpid()} on {os.uname().nodename}")
        self._file.flush()

    def _taken(self) -> bool:
        """Tries more than once: `is_locked` of a reader holds the lock for an instant."""
        for attempt in range(TRIES):
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                time.sleep(RETRY_S if attempt + 1 < TRIES else 0)
        return False

    def release(self) -> None:
        self._file.close()


def is_locked(folder: Path, lock: str = "writer.lock") -> bool:
    """Whether a process holds the lock of the folder now; that of a store, who writes to it."""
    try:
        with (folder / lock).open("r") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no lock file yet, or not ours to open
        return False
    return False

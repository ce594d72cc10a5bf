"""Many commands in one go, and large values read straight from the socket of one of the client's connections.

The client's own way waits for the reply to each command, and copies a value three times; meanwhile it holds the
interpreter, from the thread that acts.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import redis

PIECE_BYTES = 256 << 10  # of a value at a time: it stays in the processor's cache until it is used
AHEAD = 2  # values that are asked for before they can be read; the server holds a copy of each meanwhile
_MAX_LINE = 64  # longer than the head of a value; only what the server says in words is longer
_NULLS = (b"$-1", b"_")  # of either version of the protocol


def together(client: redis.Redis, commands: Iterable[Sequence[Any]]) -> list[Any]:
    """Sends each command as it comes, and only then reads the replies. Those that are errors are among them."""
    with _connection(client) as connection:
        sent = 0
        for command in commands:
            connection.send_command(*command)
            sent += 1
        return [_reply(connection) for _ in range(sent)]


@contextlib.contextmanager
def values(client: redis.Redis, keys: Sequence[str], buffer: memoryview) -> Iterator[Values]:
    """The values of the keys, to be read in that order, by way of `buffer`: PIECE_BYTES will do."""
    with _connection(client) as connection:
        found = Values(client, connection, keys, buffer)
        yield found
        if not found.all_read:
            connection.disconnect()


class Values:
    """The replies to questions for values, on a connection of their own."""

    def __init__(self, client: redis.Redis, connection: Any, keys: Sequence[str], buffer: memoryview) -> None:
        self._client, self._connection, self._keys = client, connection, keys
        self._asked = self._answered = self._read = 0
        self._buffer, self._at, self._end = buffer, 0, 0  # what has come into it and is not read
        self._ask(AHEAD)

    @property
    def all_read(self) -> bool:
        """Whether nothing more will come on the connection."""
        return self._asked == self._read

    def next(self) -> tuple[int, Iterator[memoryview]] | None:
        """The next value: its size and its bytes in pieces, each good until the next. None where it is not there."""
        key = self._keys[self._answered]
        self._ask(1)
        self._answered += 1
        line = self._line()
        if line in _NULLS:
            self._read += 1
            return None
        if not (match := re.fullmatch(rb"\$(\d{1,10})", line)):
            self._connection.disconnect()
            self._client.get(key)  # it knows how to raise what the server has to say
            raise redis.ConnectionError(f"{line!r} instead of a value")
        return int(match[1]), self._pieces(int(match[1]))

    def _pieces(self, size: int) -> Iterator[memoryview]:
        while size:
            if self._at == self._end:
                self._fill()
            piece = self._buffer[self._at : min(self._end, self._at + size)]
            self._at, size = self._at + len(piece), size - len(piece)
            yield piece
        if self._line():
            raise redis.ConnectionError("a value is longer than was said")
        self._read += 1

    def _ask(self, more: int) -> None:
        commands = [("GET", key) for key in self._keys[self._asked : self._asked + more]]
        if commands:
            self._connection.send_packed_command(self._connection.pack_commands(commands))
            self._asked += len(commands)

    def _line(self) -> bytes:
        """Up to the end of the line; the beginning of a long one."""
        line = bytearray()
        while not line.endswith(b"\r\n") and len(line) < _MAX_LINE:
            if self._at == self._end:
                self._fill()
            line.append(self._buffer[self._at])
            self._at += 1
        return bytes(line.removesuffix(b"\r\n"))

    def _fill(self) -> None:
        try:
            received = self._connection._sock.recv_into(self._buffer)
        except TimeoutError as error:
            raise redis.TimeoutError(str(error)) from None
        except OSError as error:
            raise redis.ConnectionError(str(error)) from None
        if not received:
            raise redis.ConnectionError("the server closed the connection")
        self._at, self._end = 0, received


@contextlib.contextmanager
def _connection(client: redis.Redis) -> Iterator[Any]:
    """One of the client's; closed where the block fails, so that nothing comes on it that nobody waits for."""
    pool = client.connection_pool
    connection: Any = pool.get_connection()
    try:
        yield connection
    except BaseException:
        connection.disconnect()
        raise
    finally:
        pool.release(connection)


def _reply(connection: Any) -> Any:
    try:
        return connection.read_response()
    except redis.ResponseError as error:
        return error

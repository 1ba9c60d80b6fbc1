# SPDX-License-Identifier: GPL-3.0-or-later
"""Bodies that come in: their bytes as they are asked for, unpacked where need be, as a tar."""

import contextlib
import subprocess
import threading
import time
import zlib

PIECE = 1 << 18


class EarlyEnd(Exception):
    """The body ended, or what it holds did."""


class Body:
    """The bytes of a request; triggers happen at theirs, as in ``sinks.Counted``."""

    def __init__(self, connection, length, triggers=(), rate=None):
        self._connection = connection
        self._left = length     # None: up to the end of the connection
        self._triggers = sorted(triggers, key=lambda pair: pair[0])
        self._rate = rate
        self._start = time.monotonic()
        self._view = memoryview(bytearray(PIECE))
        self.position = 0

    def piece(self, most=PIECE):
        """The next bytes, valid until the next ones are asked for; empty at the end."""
        most = min(most, PIECE)
        if self._left is not None:
            most = min(most, self._left)
        while self._triggers and self._triggers[0][0] <= self.position:
            self._triggers.pop(0)[1]()
        if self._triggers:
            most = min(most, self._triggers[0][0] - self.position)
        try:
            count = self._connection.receive(self._view[:most]) if most else 0
        except (OSError, ValueError):
            count = 0
        self.position += count
        if self._left is not None:
            self._left -= count
        if self._rate:
            time.sleep(max(0.0, self._start + self.position / self._rate - time.monotonic()))
        return self._view[:count]

    def pieces(self):
        """All that is left."""
        return iter(lambda: bytes(self.piece()), b"")


class Source:
    """Exact numbers of bytes out of a function that gives pieces."""

    def __init__(self, piece, first=b""):
        self._piece = piece
        self._rest = memoryview(bytes(first))

    def read(self, size):
        """So many bytes; EarlyEnd where there are fewer."""
        made = bytearray(size)
        view = memoryview(made)
        done = 0
        while done < size:
            if not len(self._rest):
                self._rest = self._piece(size - done)
                if not len(self._rest):
                    raise EarlyEnd
            count = min(size - done, len(self._rest))
            view[done:done + count] = self._rest[:count]
            self._rest = self._rest[count:]
            done += count
        return made


def source_of(body):
    """(the bytes of the archive that comes in, whether it is compressed), by its first bytes."""
    first = b""
    while len(first) < 512:
        piece = bytes(body.piece(512 - len(first)))
        if not piece:
            break
        first += piece
    if first[:8] == b"ova.xml\0" and len(first) == 512:
        return Source(body.piece, first), False
    zstd = first[:4] == b"\x28\xb5\x2f\xfd"
    pieces = (_unzstd if zstd else _gunzip)(body, first)
    return Source(lambda _: next(pieces, b"")), True


def _gunzip(body, first):
    unpacker = zlib.decompressobj(31)
    data = first
    while True:
        try:
            made = unpacker.decompress(data)
        except zlib.error:
            return
        if made:
            yield made
        if unpacker.eof:
            return
        data = bytes(body.piece())
        if not data:
            return


def _unzstd(body, first):
    """By the library where it is installed, else by the command."""
    try:
        import zstandard
    except ImportError:
        yield from _by_command(body, first)
        return
    unpacker = zstandard.ZstdDecompressor().decompressobj()
    data = first
    while data:
        try:
            made = unpacker.decompress(data)
        except zstandard.ZstdError:
            return
        if made:
            yield made
        data = bytes(body.piece())


def _by_command(body, first):
    process = subprocess.Popen(["zstd", "-dcq"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL)
    errors = []

    def feed():
        try:
            process.stdin.write(first)
            for data in body.pieces():
                process.stdin.write(data)
        except BrokenPipeError:
            pass
        except Exception as error:
            errors.append(error)
        finally:
            with contextlib.suppress(OSError):
                process.stdin.close()

    feeder = threading.Thread(target=feed, daemon=True)
    feeder.start()
    try:
        yield from iter(lambda: process.stdout.read1(PIECE), b"")
        feeder.join()
        if errors:
            raise errors[0]
    finally:
        process.kill()
        process.stdout.close()
        process.wait()


def member(source):
    """(name, data) of the next member of a tar; EarlyEnd at its end."""
    head = source.read(512)
    if not any(head):
        raise EarlyEnd
    name = bytes(head[:100]).partition(b"\0")[0].decode("utf-8", "replace")
    try:
        size = int(bytes(head[124:136]).strip(b"\0 ") or b"0", 8)
    except ValueError:
        raise EarlyEnd from None
    data = source.read(size + -size % 512)
    return name, memoryview(data)[:size]

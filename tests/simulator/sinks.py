# SPDX-License-Identifier: GPL-3.0-or-later
"""The way of a body to the client: archive, then compressor, then wire.

Both ends count their bytes and can be made to stop at one (``triggers``): actions at the archive's
end happen before the compressor, which then still ends its stream properly; those at the wire's
end hit the bytes as the client sees them.
"""

import contextlib
import subprocess
import threading
import time
import zlib


class Counted:
    """Passes buffers on, counts their bytes, and calls the triggers on its way."""

    def __init__(self, send, triggers=()):
        self._send = send
        self.position = 0
        self._triggers = sorted(triggers, key=lambda pair: pair[0])

    def write(self, data):
        """Send a buffer; runs every trigger exactly at its byte."""
        if not self._triggers:
            self.position += len(data)
            self._send(data)
            return
        view = memoryview(data)
        while self._triggers and self._triggers[0][0] <= self.position + len(view):
            at = max(0, self._triggers[0][0] - self.position)
            if at:
                self._send(view[:at])
                self.position += at
                view = view[at:]
            _, action = self._triggers.pop(0)
            action()
        if len(view):
            self.position += len(view)
            self._send(view)

    def flush_triggers(self):
        """Run those that stand at the end of an empty body."""
        while self._triggers and self._triggers[0][0] <= self.position:
            self._triggers.pop(0)[1]()

    def finish(self):
        """Nothing is kept back here."""


class Gzip:
    """gzip; level 1, for speed."""

    def __init__(self, send):
        self._send = send
        self._compressor = zlib.compressobj(1, zlib.DEFLATED, 31)

    def write(self, data):
        data = self._compressor.compress(data)
        if data:
            self._send(data)

    def finish(self):
        self._send(self._compressor.flush())


class _ZstdLibrary:
    def __init__(self, send):
        import zstandard
        self._send = send
        self._compressor = zstandard.ZstdCompressor(level=1).compressobj()

    def write(self, data):
        data = self._compressor.compress(data)
        if data:
            self._send(data)

    def finish(self):
        self._send(self._compressor.flush())


class _ZstdCommand:
    """The zstd command, fed and read at the same time."""

    def __init__(self, send):
        self._send = send
        self._error = None
        self._process = subprocess.Popen(
            ["zstd", "-1", "-q", "-c"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._reader = threading.Thread(target=self._pump, daemon=True)
        self._reader.start()

    def _pump(self):
        try:
            for data in iter(lambda: self._process.stdout.read(1 << 18), b""):
                if self._error is None:
                    self._send(data)
        except Exception as error:
            self._error = error
            self._process.kill()

    def write(self, data):
        if self._error is not None:
            raise self._error
        try:
            self._process.stdin.write(data)
        except BrokenPipeError:
            self._reader.join()
            raise self._error or BrokenPipeError("zstd ended early") from None

    def finish(self):
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        self._reader.join()
        self._process.stdout.close()
        self._process.wait()
        if self._error is not None:
            raise self._error


def zstd(send):
    """zstd, by the library where it is installed, else by the command."""
    try:
        return _ZstdLibrary(send)
    except ImportError:
        return _ZstdCommand(send)


COMPRESSORS = {"gzip": Gzip, "true": Gzip, "zstd": zstd}


class Short:
    """Keeps back the last bytes of a body for ever."""

    def __init__(self, send, size):
        self._send = send
        self._size = size
        self._kept = b""

    def __call__(self, data):
        self._kept += bytes(data)
        at = max(0, len(self._kept) - self._size)
        if at:
            self._send(self._kept[:at])
            self._kept = self._kept[at:]


class Throttle:
    """Keeps a sender to a number of bytes a second."""

    def __init__(self, send, rate):
        self._send = send
        self._rate = rate
        self._start = time.monotonic()
        self._sent = 0

    def __call__(self, data):
        view = memoryview(data)
        step = max(1, int(self._rate / 20))
        for offset in range(0, len(view), step):
            part = view[offset:offset + step]
            self._send(part)
            self._sent += len(part)
            time.sleep(max(0.0, self._start + self._sent / self._rate - time.monotonic()))

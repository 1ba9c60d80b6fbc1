# SPDX-License-Identifier: GPL-3.0-or-later
"""What is on a simulated disk: generated content that costs neither memory nor time.

A disk is read in chunks of 1 MiB.  ``chunk(index)`` gives the bytes and remembers their XXH64, so
that an export of a disk of any size does no work per chunk but looking up.
"""

import ctypes
import ctypes.util
import hashlib
import os
import tempfile
import threading

MIB = 1 << 20
ZEROS = bytes(MIB)
_RANDOM_CHUNKS = 8


def _find_xxhash():
    try:
        import xxhash
        return lambda data: "%016X" % xxhash.xxh64_intdigest(data)
    except ImportError:
        pass
    path = ctypes.util.find_library("xxhash") or "libxxhash.so.0"
    library = ctypes.CDLL(path)
    library.XXH64.restype = ctypes.c_uint64
    library.XXH64.argtypes = (ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint64)
    return lambda data: "%016X" % library.XXH64(bytes(data), len(data), 0)


class _LazyHash:
    """XXH64 in the 16 upper-case hex digits of an archive; looked up at its first use."""

    def __init__(self):
        self._function = None

    def __call__(self, data):
        if self._function is None:
            self._function = _find_xxhash()
        return self._function(data)


xxh64 = _LazyHash()


def sha1(data):
    """SHA-1 in the 40 lower-case hex digits of an old archive."""
    return hashlib.sha1(data).hexdigest()  # noqa: S324 - the format's choice


class Content:
    """The bytes of a disk of ``size`` bytes; subclasses give them chunk by chunk."""

    def __init__(self, size):
        self.size = size
        self.chunks = max(1, -(-size // MIB))
        self._hashes = {}

    def length(self, index):
        """The length of a chunk: 1 MiB, but for the last."""
        return min(MIB, self.size - index * MIB)

    def chunk(self, index):
        """The bytes of a chunk, as a buffer."""
        view, _ = self._view(index)
        return view[:self.length(index)]

    def _view(self, index):
        """A buffer of at least the chunk's length, and a key that is equal for equal chunks."""
        raise NotImplementedError

    def hash(self, index, function):
        """The hash of a chunk, computed once for all chunks that are equal."""
        _, key = self._view(index)
        key = (key, self.length(index), function)
        if key[0] is None:
            return function(self.chunk(index))
        if key not in self._hashes:
            self._hashes[key] = function(self.chunk(index))
        return self._hashes[key]

    def populated(self):
        """The indexes, rising, of the chunks that are not all zeros."""
        return range(self.chunks)

    def sha256(self):
        """The SHA-256 of the whole disk."""
        digest = hashlib.sha256()
        for index in range(self.chunks):
            digest.update(self.chunk(index))
        return digest.hexdigest()


class Zeros(Content):
    """A disk of which nothing was ever written."""

    def _view(self, index):
        return memoryview(ZEROS), 0

    def populated(self):
        return ()


class _RandomPool:
    """Random bytes by seed, shared by the disks that use it."""

    _lock = threading.Lock()
    _pools = {}
    _most = 16

    @classmethod
    def get(cls, seed, chunks):
        """8 MiB (less for a small disk) of random bytes, with the first MiB repeated behind."""
        chunks = min(chunks, _RANDOM_CHUNKS)
        key = (str(seed), chunks)
        with cls._lock:
            if key not in cls._pools:
                if len(cls._pools) >= cls._most:
                    cls._pools.pop(next(iter(cls._pools)))
                data = hashlib.shake_128(key[0].encode("utf-8")).digest(chunks * MIB)
                cls._pools[key] = memoryview(data + data[:MIB])
            return cls._pools[key]


class Random(Content):
    """Incompressible bytes, all chunks of the first GiBs different from each other."""

    def __init__(self, size, seed, populated=None):
        super().__init__(size)
        self.seed = seed
        self._populated = None if populated is None else sorted(
            index for index in set(populated) if 0 <= index < self.chunks)
        self._set = None if populated is None else set(self._populated)

    def _view(self, index):
        if self._set is not None and index not in self._set:
            return memoryview(ZEROS), "zeros"
        pool = _RandomPool.get(self.seed, self.chunks)
        around = len(pool) - MIB
        offset = (index % _RANDOM_CHUNKS * MIB + index // _RANDOM_CHUNKS * 4096) % around
        return pool[offset:offset + MIB], offset

    def populated(self):
        return range(self.chunks) if self._populated is None else self._populated


class Pattern(Content):
    """The same bytes over and over, from the start of the disk."""

    def __init__(self, size, pattern):
        super().__init__(size)
        self._length = len(pattern)
        self._data = memoryview(pattern * (MIB // len(pattern) + 2))

    def _view(self, index):
        offset = index * MIB % self._length
        return self._data[offset:offset + MIB], offset


class File(Content):
    """The bytes of a file; zeros behind its end."""

    def __init__(self, size, path):
        super().__init__(size)
        self.path = path

    def _view(self, index):
        with open(self.path, "rb") as file:
            file.seek(index * MIB)
            data = file.read(MIB)
        return memoryview(data + bytes(MIB - len(data))), None

    def populated(self):
        for index in range(self.chunks):
            data = self.chunk(index)
            if data != ZEROS[:len(data)]:
                yield index


class Written(Content):
    """A disk that is written to: zeros, or what another holds, until then."""

    def __init__(self, size, other=None):
        super().__init__(size)
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the disk
        self._file.truncate(size)
        self._populated = set()
        for index in other.populated() if other is not None else ():
            self.write(index * MIB, other.chunk(index))

    def write(self, offset, data):
        """Put bytes at an offset."""
        if not len(data):
            return
        os.pwrite(self._file.fileno(), data, offset)
        self._populated.update(range(offset // MIB, (offset + len(data) - 1) // MIB + 1))

    def _view(self, index):
        data = os.pread(self._file.fileno(), MIB, index * MIB)
        return memoryview(data + bytes(MIB - len(data))), None

    def populated(self):
        return sorted(self._populated)


def content(description, size, default_seed):
    """The content that a pool description asks for.

    ``{"random": seed}``, ``"zeros"``, ``{"sparse": [MiB, ...], "random": seed}``,
    ``{"pattern": text}`` or ``{"file": path}``; nothing: random, by the disk's own uuid.
    """
    if description is None:
        return Random(size, default_seed)
    if description == "zeros":
        return Zeros(size)
    if "file" in description:
        if not os.path.isfile(description["file"]):
            raise ValueError("no such file: %s" % description["file"])
        return File(size, description["file"])
    if "pattern" in description:
        return Pattern(size, description["pattern"].encode("utf-8"))
    return Random(size, description.get("random", default_seed), description.get("sparse"))

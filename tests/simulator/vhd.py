# SPDX-License-Identifier: GPL-3.0-or-later
"""A disk as a dynamic VHD, written front to back."""

import struct
import uuid

from .disks import MIB, ZEROS

BLOCK = 2 * MIB
SECTOR = 512
_BITMAP = b"\xff" * SECTOR
_HEADER_AT = SECTOR
_TABLE_AT = SECTOR + 1024


def _checksum(block):
    return ~sum(block) & 0xFFFFFFFF


def _geometry(size):
    """Cylinders, heads, sectors of a disk, as the format's specification computes them."""
    total = min(size // SECTOR, 65535 * 16 * 255)
    if total >= 65535 * 16 * 63:
        return total // 255 // 16, 16, 255
    sectors = 17
    by_sector = total // sectors
    heads = max(4, (by_sector + 1023) // 1024)
    if by_sector >= heads * 1024 or heads > 16:
        sectors, heads = 31, 16
        by_sector = total // sectors
    if by_sector >= heads * 1024:
        sectors, heads = 63, 16
        by_sector = total // sectors
    return by_sector // heads, heads, sectors


def _footer(size, identity):
    cylinders, heads, sectors = _geometry(size)
    footer = bytearray(struct.pack(
        ">8sIIQI4sI4sQQHBBII16sB", b"conectix", 2, 0x00010000, SECTOR, 0, b"tap\0", 0x00010003,
        b"\0\0\0\0", size, size, cylinders, heads, sectors, 3, 0, identity, 0).ljust(SECTOR, b"\0"))
    footer[64:68] = struct.pack(">I", _checksum(footer))
    return bytes(footer)


def _header(entries):
    header = bytearray(struct.pack(
        ">8sQQIIII", b"cxsparse", 0xFFFFFFFFFFFFFFFF, _TABLE_AT, 0x00010000, entries, BLOCK, 0
    ).ljust(1024, b"\0"))
    header[36:40] = struct.pack(">I", _checksum(header))
    return bytes(header)


def stream(content, vdi_uuid):
    """The whole file, as a sequence of buffers."""
    size = -(-content.size // SECTOR) * SECTOR
    entries = max(1, -(-size // BLOCK))
    blocks = sorted({index * MIB // BLOCK for index in content.populated()})
    table_size = -(-entries * 4 // SECTOR) * SECTOR
    sector = (_TABLE_AT + table_size) // SECTOR
    table = [0xFFFFFFFF] * (table_size // 4)
    for block in blocks:
        table[block] = sector
        sector += (SECTOR + BLOCK) // SECTOR
    footer = _footer(size, uuid.UUID(vdi_uuid).bytes)
    yield footer + _header(entries) + struct.pack(">%dI" % len(table), *table)
    for block in blocks:
        yield _BITMAP
        for index in (2 * block, 2 * block + 1):
            data = content.chunk(index) if index < content.chunks else b""
            yield data
            if len(data) < MIB:
                yield ZEROS[len(data):]
    yield footer


def apply(source, content, length, broken):
    """Write the allocated sectors of a whole vhd file to a disk (serve_vhd_to_raw).

    ``source.read(n)`` gives its bytes in order, ``length`` is how many there are, or None;
    ``broken`` is raised where it does not fit.
    """
    at = 0

    def read(size):
        nonlocal at
        at += size
        return bytes(source.read(size))

    def skip(to):
        if to < at:
            raise broken
        while at < to:
            read(min(to - at, MIB))

    footer = read(SECTOR)
    if footer[:8] != b"conectix":
        raise broken
    skip(struct.unpack(">Q", footer[16:24])[0])
    header = read(1024)
    table_at, _, entries, block = struct.unpack(">QIII", header[16:36])
    if header[:8] != b"cxsparse" or not block:
        raise broken
    skip(table_at)
    table = struct.unpack(">%dI" % entries, read(4 * entries))
    bitmap_size = -(-(block // SECTOR) // 8 // SECTOR) * SECTOR
    for sector, index in sorted((sector, index) for index, sector in enumerate(table)
                                if sector != 0xFFFFFFFF):
        skip(sector * SECTOR)
        bitmap, data = read(bitmap_size), read(block)
        _write_block(content, index * block, bitmap, data, broken)
    if length is not None:
        skip(length - SECTOR)
        if read(SECTOR)[:8] != b"conectix":
            raise broken


def _write_block(content, start, bitmap, data, broken):
    sectors = len(data) // SECTOR
    if bitmap[:sectors // 8] == b"\xff" * (sectors // 8):
        runs = [(0, sectors)]
    else:
        runs = [(k, k + 1) for k in range(sectors) if bitmap[k // 8] & 0x80 >> k % 8]
    for first, end in runs:
        part = data[first * SECTOR:end * SECTOR]
        beyond = start + first * SECTOR + len(part) - content.size
        if beyond > 0:
            if any(part[len(part) - beyond:]):
                raise broken
            part = part[:max(0, len(part) - beyond)]
        content.write(start + first * SECTOR, part)

# SPDX-License-Identifier: GPL-3.0-or-later
"""The proofs that decide whether an export is whole: what they accept, and all they refuse.

The archives are the simulator's, real ones, and both with every kind of damage.
"""
import contextlib
import ctypes
import functools
import gzip
import io
import itertools
import os
import random
import re
import shutil
import struct
import subprocess
import sys
import threading
import xmlrpc.client

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from simulator import vhd, xva
from simulator.disks import Random
from simulator.pool import MIB, Pool, cd, disk, vif
from simulator.world import Builder
from support.harness import ROOT

import vmbackup

DATA = ROOT.parent / "shared" / "data"
QUICK = settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
ZSTD = shutil.which("zstd")
needs_zstd = pytest.mark.skipif(ZSTD is None, reason="no zstd here")
needs_qemu = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="no qemu-img here")
ERROR_PAGE = (b"HTTP/1.1 500 Internal Error\r\ncontent-length: 99\r\n\r\n<html><body>"
              b"<h1> Additional information </h1>VDI_IO_ERROR: [ Device I/O errors ]</body></html>")


def archive(*disks, cds=(), first_id=1, **options):
    """An XVA of a VM with these disks; options as in xva.DiskOptions."""
    pool = Pool()
    pool.vm("vm", disks=disks, cds=cds, vifs=[vif()])
    world = Builder(pool.description).build()
    (vm,) = [ref for ref, record in world.db.tables["VM"].items() if record["name_label"] == "vm"]
    metadata = xva.Metadata(world, xva.Ids(first_id), [vm])
    how = xva.DiskOptions()
    vars(how).update(options)
    parts = [xva.ova_member(metadata.ova_xml())]
    for identity, vdi in metadata.disks():
        parts += xva.disk_members(identity, world.content(vdi), how)
    return b"".join(map(bytes, parts)) + xva.END


def split(data):
    """[(name, bytes)] of an archive's members with their padding; the end has the name ''."""
    found, at = [], 0
    while data[at]:
        name = data[at:at + 100].split(b"\0")[0].decode()
        end = at + 512 + (int(data[at + 124:at + 135], 8) + 511) // 512 * 512
        found.append((name, data[at:end]))
        at = end
    return found + [("", data[at:])]


def join(members):
    return b"".join(data for _, data in members)


def pieces_of(data, step=1 << 20):
    """The data as a stream gives them: views of one buffer that is used again and again."""
    buffer = bytearray(step)
    for at in range(0, len(data), step):
        piece = data[at:at + step]
        buffer[:] = b"\xaa" * step
        buffer[:len(piece)] = piece
        yield memoryview(buffer)[:len(piece)]


def check(prove, data, step=1 << 20):
    """What a proof says of these bytes: phrases, or ArchiveError."""
    return prove(pieces_of(data, step))


def refused(prove, data, why="."):
    with pytest.raises(vmbackup.ArchiveError, match=why):
        check(prove, data)


def raw(size):
    return functools.partial(vmbackup.prove_raw, size=size)


def vhd_of(size=None):
    return functools.partial(vmbackup.prove_vhd, size=size)


def zstd(data):
    return subprocess.run([ZSTD, "-1q"], input=data, stdout=subprocess.PIPE, check=True).stdout


PACKED = {
    "xva": bytes,
    "xva.gz": lambda data: gzip.compress(data, 0),
    "xva.zst": zstd,
}
packed = pytest.mark.parametrize("form", [
    "xva", "xva.gz", pytest.param("xva.zst", marks=needs_zstd)])

TWO = (disk(2 * MIB + 512, seed=1), disk(6 * MIB, seed=2, sparse=[0, 3]))
GOOD = {
    "two disks, one sparse, one of odd size": lambda: archive(*TWO),
    "ids across ten: Ref:10 stands before Ref:9": lambda: archive(*TWO, first_id=4),
    "no disks": archive,
    "an ISO and an empty drive, no disks": lambda: archive(cds=[cd("debian.iso"), cd()]),
    "an empty ISO": lambda: archive(disk(MIB), cds=[cd("empty.iso", size=0)]),
    "a disk of no bytes, not in the archive": lambda: replaced(b">700<", b">0<")(
        split(archive(disk(700)))[:1] + [("", xva.END)]),
    "a disk of 700 bytes": lambda: archive(disk(700)),
    "a disk of exactly one chunk": lambda: archive(disk(MIB)),
    "nothing ever written": lambda: archive(disk(5 * MIB + 512, content="zeros")),
    "all zero chunks written": lambda: archive(*TWO, all_chunks=True),
    "keep-alives": lambda: archive(*TWO, keepalive=(1, 3)),
    "SHA-1 as before 2019": lambda: archive(*TWO, sha1=True),
    "SHA-1 and keep-alives": lambda: archive(*TWO, sha1=True, keepalive=(1,)),
    "ova.xml with a prolog": lambda: with_prolog(b'<?xml version="1.0"?>'),
    "ova.xml with a prolog and blanks": lambda: with_prolog(
        b"\n <?xml version='1.0' encoding='UTF-8' ?>\r\n"),
    "zeros behind the end": lambda: archive(*TWO) + bytes(9216),
}


@packed
@pytest.mark.parametrize("what", GOOD)
def test_whole_archives_are_accepted(what, form):
    proved = check(vmbackup.prover("x." + form), PACKED[form](GOOD[what]()))
    assert proved[-1] == "chunk hashes"


# --- damage ---------------------------------------------------------------------------------------

def flipped(data, at, bit=0):
    changed = bytearray(data)
    changed[at] ^= 1 << bit
    return bytes(changed)


def change(ending, how):
    """A damage: `how` changes the bytes of the members whose names end so."""
    return lambda members: join((name, how(data) if name.endswith(ending) else data)
                                for name, data in members)


def without(*names):
    return lambda members: join(one for one in members if not one[0].endswith(names))


def renumbered(members):
    """Chunk 1 of the first disk is gone, and those behind it have moved up."""
    out, gone = [], False
    for name, data in members:
        if name.endswith(("/00000001", "/00000001.xxhash")) and not gone:
            gone = name.endswith("hash")
            continue
        if name.endswith(("/00000002", "/00000002.xxhash")):
            size = int(data[124:135], 8)
            new = name.replace("/00000002", "/00000001")
            data = xva.tar_header(new, size) + data[512:]
        out.append((name, data))
    return join(out)


def swapped(members):
    members = list(members)
    members[1:3], members[3:5] = members[3:5], members[1:3]
    return join(members)


def resized(member, size):
    """The header tells another size."""
    return xva.tar_header(member[:100].split(b"\0")[0].decode(), size) + member[512:]


def with_ova(text):
    return lambda members: xva.ova_member(text) + join(members[1:])


def with_prolog(prolog):
    return replaced(b"<value>", prolog + b"<value>")(split(archive(*TWO)))


def replaced(old, new):
    """ova.xml with other words in it."""
    def damage(members):
        size = int(members[0][1][124:135], 8)
        text = members[0][1][512:512 + size]
        assert old in text
        return with_ova(text.replace(old, new, 1))(members)
    return damage


LAUGHS = b'<!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]><value>&b;</value>'
DAMAGE = {
    "nothing": (lambda m: b"", "cut off at the very beginning"),
    "an error page alone": (lambda m: ERROR_PAGE + bytes(512), "tar header"),
    "an error page behind": (lambda m: join(m) + ERROR_PAGE, "data after the end"),
    "an error page in place of the end": (
        lambda m: join(m[:-1]) + ERROR_PAGE + bytes(512), "tar header"),
    "an error page between chunks": (lambda m: join(m[:5]) + ERROR_PAGE + bytes(512), "tar header"),
    "an error page within a chunk": (
        lambda m: join(m[:3]) + m[3][1][:9999] + ERROR_PAGE, "cut off at"),
    "text behind": (lambda m: join(m) + b"x", "data after the end"),
    "text far behind": (lambda m: join(m) + bytes(MIB) + b"x", "data after the end"),
    "two archives joined": (lambda m: join(m) * 2, "data after the end"),
    "no end": (lambda m: join(m[:-1]), "cut off"),
    "one zero block only": (lambda m: join(m[:-1]) + bytes(512), "cut off"),
    "one zero block, then more": (
        lambda m: join(m[:-1]) + bytes(512) + m[1][1] + xva.END, "one zero block"),
    "a flipped bit in ova.xml's header": (change("ova.xml", lambda d: flipped(d, 3)), "tar header"),
    "a flipped bit at a chunk's start": (change("/00000001", lambda d: flipped(d, 512)), "match"),
    "a flipped bit at a chunk's end": (change("/00000001", lambda d: flipped(d, -1)), "match"),
    "a flipped bit in the last chunk": (change("/00000005", lambda d: flipped(d, 999)), "match"),
    "a flipped bit in a chunk's header": (
        change("/00000001", lambda d: flipped(d, 130)), "tar header"),
    "a flipped bit in a hash": (change("/00000001.xxhash", lambda d: flipped(d, 512)), "match"),
    "a hash cut short": (change("/00000001.xxhash", lambda d: resized(d, 15)), "match"),
    "the first chunk is missing": (without("/00000000", "/00000000.xxhash"), "unexpected member"),
    "the last chunk is missing": (without("/00000002", "/00000002.xxhash"), "ends at .* of"),
    "the last chunk of the last disk is missing": (
        without("/00000005", "/00000005.xxhash"), "ends at .* of"),
    "a chunk in the middle is missing": (renumbered, "ends at .* of"),
    "a chunk is missing, its hash is there": (without("/00000001"), "unexpected member|hash of"),
    "a hash is missing": (without("/00000001.xxhash"), "hash of chunk"),
    "chunks change places": (swapped, "unexpected member"),
    "a chunk twice": (lambda m: join(m[:5] + m[3:]), "out of order"),
    "a disk is missing": (lambda m: join(m[:7] + m[-1:]), "is missing"),
    "a disk twice": (lambda m: join(m[:-1] + m[1:7] + m[-1:]), "unexpected member"),
    "one chunk too many": (
        lambda m: join(m[:7]) + xva.tar_header(m[1][0][:-1] + "3", 512) + bytes(512), "order"),
    "no ova.xml": (lambda m: join(m[1:]), "begin with ova.xml"),
    "ova.xml alone": (lambda m: m[0][1] + m[-1][1], "is missing"),
    "ova.xml empty": (with_ova(b""), "begin with ova.xml"),
    "ova.xml of 8 GiB": (change("ova.xml", lambda d: resized(d, 0o77777777777)), "begin with"),
    "a chunk of 8 GiB": (change("/00000001", lambda d: resized(d, 0o77777777777)), "unexpected"),
    "a link among the members": (
        lambda m: join(m[:1]) + flipped_type(m[1][1]) + join(m[2:]), "kind of member"),
    "a member of somebody else": (
        lambda m: join(m[:1]) + xva.small_member("../passwd", b"x") + join(m[1:]), "unexpected"),
    "ova.xml is no XML": (with_ova(b"<value>"), "ova.xml"),
    "ova.xml is another XML": (with_ova(b"<value><int>1</int></value>"), "ova.xml"),
    "ova.xml with entities": (with_ova(LAUGHS), "ova.xml is not XAPI's"),
    "ova.xml is binary": (with_ova(bytes(range(256))), "ova.xml"),
    "ova.xml names a larger disk": (replaced(b">2097664<", b">3000000<"), "ends at"),
    "ova.xml names a smaller disk": (replaced(b">2097664<", b">2097152<"), "out of order"),
    "ova.xml names a disk of no size": (replaced(b">2097664<", b">x<"), "ova.xml"),
}


def flipped_type(member):
    """The member as a symbolic link, its header's checksum right."""
    header = bytearray(member[:512])
    header[148:157] = b" " * 8 + b"2"
    header[148:156] = b"%07o\0" % sum(header)
    return bytes(header) + member[512:]


@pytest.fixture(scope="module")
def members():
    return split(archive(*TWO))


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_refused_and_named(members, what):
    damage, why = DAMAGE[what]
    refused(vmbackup.prove_xva, damage(members), why)


@packed
@pytest.mark.parametrize("what", [
    "nothing", "an error page behind", "two archives joined", "no end", "one zero block only",
    "a flipped bit in the last chunk", "the last chunk is missing", "a disk is missing"])
def test_damage_is_found_inside_a_compressed_stream(members, what, form):
    damage, why = DAMAGE[what]
    refused(vmbackup.prover("x." + form), PACKED[form](damage(members)), why)


@pytest.mark.parametrize("what, options, why", [
    ("numbers that begin again", {"restart": 0}, "out of order"),
    ("a wrong hash", {"wrong_hash": [1]}, "match"),
    ("a wrong SHA-1", {"wrong_hash": [1], "sha1": True}, "match"),
    ("a flipped bit under SHA-1", {"flip": {-1: 5}, "sha1": True}, "match"),
    ("a missing last chunk", {"missing": [-1]}, "ends at"),
])
def test_what_xapi_itself_may_write_wrong_is_refused(what, options, why):
    refused(vmbackup.prove_xva, archive(*TWO, **options), why)


def test_a_sparse_disk_behind_one_of_less_than_a_chunk_is_refused():
    """XAPI counts skipped chunks in units of the archive's first one: its import would fail."""
    refused(vmbackup.prove_xva, archive(disk(700), disk(6 * MIB, sparse=[0, 3])), "ends at")


# --- cut anywhere ---------------------------------------------------------------------------------

def assert_never_whole(prove, data, places):
    """Cut at none of these places the data are whole."""
    assert check(prove, data)
    for at in places:
        with pytest.raises(vmbackup.ArchiveError):
            check(prove, data[:at])


def ends_of(data):
    """Where the members of an archive end."""
    return list(itertools.accumulate(len(member) for _, member in split(data)))[:-1]


def test_an_archive_cut_anywhere_is_refused():
    data, dice = archive(*TWO), random.Random(1)
    near = [end + more for end in [0] + ends_of(data) for more in (0, 1, 512)]
    assert_never_whole(vmbackup.prove_xva, data, near + [
        dice.randrange(len(data)) for _ in range(50)] + [len(data) - 1])


@pytest.mark.parametrize("disks", [[disk(700)], []])
def test_a_small_archive_cut_at_any_byte_is_refused(disks):
    data = archive(*disks)
    assert_never_whole(vmbackup.prove_xva, data, range(0, len(data), 7))


@packed
def test_a_compressor_that_ended_properly_around_a_cut_archive_proves_nothing(form):
    """xapi's compressors do: so gzip -t and zstd -t are content, and only we can tell."""
    data = archive(disk(MIB + 700, seed=1))
    dice = random.Random(form)
    cuts = [0] + ends_of(data) + [len(data) - 512] + [dice.randrange(len(data)) for _ in range(10)]
    for at in cuts:
        stream = PACKED[form](data[:at])
        with pytest.raises(vmbackup.ArchiveError):
            check(vmbackup.prover("x." + form), stream)


@pytest.mark.parametrize("form", ["xva.gz", pytest.param("xva.zst", marks=needs_zstd)])
def test_a_compressed_stream_cut_damaged_or_followed_is_refused(form):
    data = PACKED[form](archive(disk(MIB, seed=1)))
    places = [0, 1, 9, 100, len(data) // 2, len(data) - 9, len(data) - 1]
    for at in places:
        refused(vmbackup.prover("x." + form), data[:at])
    for at in [0, 1, len(data) // 3, len(data) // 2, len(data) - 2]:
        refused(vmbackup.prover("x." + form), flipped(data, at, 2))
    for tail in (ERROR_PAGE, b"x", b"\0", data):
        refused(vmbackup.prover("x." + form), data + tail)


# --- through gzip and zstd ------------------------------------------------------------------------

def test_without_the_command_zstd_nothing_claims_a_proof(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(vmbackup.BackupError, match="install the command zstd"):
        check(vmbackup.prover("a.xva.zst"), b"x")


def children():
    """Processes of this one, zombies too."""
    with open("/proc/self/task/%d/children" % os.getpid()) as file:
        return file.read().split()


@pytest.fixture
def nothing_left():
    before = threading.active_count(), children()
    yield
    assert (threading.active_count(), children()) == before


@needs_zstd
@pytest.mark.parametrize("count", [0, 1, 3])
def test_zstd_is_gone_when_nobody_reads_on(count, nothing_left):
    stream = vmbackup.unzstd(pieces_of(zstd(os.urandom(8 * MIB))))
    with contextlib.closing(stream):
        for _ in range(count):
            next(stream)


@needs_zstd
def test_zstd_is_gone_when_the_pieces_end_in_an_error(nothing_left):
    def broken():
        yield from pieces_of(zstd(os.urandom(4 * MIB))[:3 * MIB])
        raise ConnectionResetError("the stream broke")

    with pytest.raises(ConnectionResetError, match="the stream broke"):
        list(vmbackup.unzstd(broken()))


@needs_zstd
@pytest.mark.parametrize("damage, why", [
    (lambda data: data[:-1], "zstd stream is cut off"), (lambda data: data + b"x", "followed"),
    (lambda data: b"x" + data, "damaged"), (lambda data: b"", "cut off")])
def test_damage_leaves_nothing_of_zstd(damage, why, nothing_left):
    refused(vmbackup.prover("a.xva.zst"), damage(zstd(archive(*TWO))), why)


def test_what_expands_without_end_is_given_up():
    """16 GiB of zeros in 16 MiB: neither read to their end nor held."""
    one = gzip.compress(bytes(64 * MIB))
    head = archive(disk(700))
    data = gzip.compress(head + bytes(64 * MIB)) + one
    refused(vmbackup.prover("a.xva.gz"), data, "more than 1.0 MiB of zeros")


# --- where XXH64 comes from -----------------------------------------------------------------------

@pytest.fixture(params=["package", "library", "neither"])
def source_of_xxh64(request, monkeypatch):
    if request.param == "package":
        pytest.importorskip("xxhash")
        monkeypatch.setattr(ctypes, "CDLL", None)
    else:
        monkeypatch.setitem(sys.modules, "xxhash", None)
    if request.param == "library":
        try:
            ctypes.CDLL("libxxhash.so.0")
        except OSError:
            pytest.skip("no libxxhash here")
    elif request.param == "neither":
        monkeypatch.setitem(sys.modules, "ctypes", None)    # as in a Python built without it
    return request.param


def test_xxh64_is_had_from_the_package_or_the_library_or_not_at_all(source_of_xxh64):
    good, bad = archive(*TWO), archive(*TWO, wrong_hash=[1])
    proved = check(vmbackup.prove_xva, good)
    if source_of_xxh64 == "neither":
        assert proved == ["archive (2 disks, 6 chunks)",
            "NOT 6 chunk hashes (install libxxhash or python3-xxhash)"]
        assert check(vmbackup.prove_xva, bad) == proved
    else:
        assert proved == ["archive (2 disks, 6 chunks)", "chunk hashes"]
        refused(vmbackup.prove_xva, bad, "match")
        # vectors of the reference implementation
        for data, told in ((b"", "EF46DB3751D8E999"), (b"abc", "44BC2CF5AD770999"),
                           (bytes(MIB), "87D2A1B6E1163EF1")):
            made = vmbackup.find_xxh64()()
            for half in (data[:1], data[1:]):
                made.update(memoryview(half))
            assert made.hexdigest().upper() == told


def test_sha1_needs_no_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "xxhash", None)
    monkeypatch.setitem(sys.modules, "ctypes", None)
    assert check(vmbackup.prove_xva, archive(*TWO, sha1=True))[-1] == "chunk hashes"


# --- raw disks and VHDs ---------------------------------------------------------------------------

@pytest.mark.parametrize("data, why", [
    (b"", "5000 bytes .byte 0"), (bytes(4999), "byte 4999"), (b"x" * 5001, "more than"),
    (bytes(5000) + ERROR_PAGE, "more than"), (ERROR_PAGE, "byte %d" % len(ERROR_PAGE)),
    (bytes(4000) + ERROR_PAGE, "5000 bytes"),
])
def test_a_raw_disk_has_its_size_or_is_refused(data, why):
    refused(raw(5000), data, why)


@pytest.mark.parametrize("size", [0, 1, 512, 5000])
def test_a_whole_raw_disk_is_accepted(size):
    assert check(raw(size), ERROR_PAGE.ljust(size, b"x")[:size], 100) == [
        "size (%d bytes)" % size]


UUID = "8a1c3a5e-0000-4000-8000-000000000000"


def a_vhd(size=5 * MIB, populated=(0, 4)):
    return b"".join(map(bytes, vhd.stream(Random(size, 1, populated), UUID)))


@needs_qemu
@pytest.mark.parametrize("size, written", [
    (8 * MIB, 0), (8 * MIB, 3 * MIB), (100 * MIB, 100), (5000 * MIB, 0), (512, 512)])
def test_vhds_of_qemu_img_are_accepted_and_cut_ones_refused(tmp_path, size, written):
    raw, made = tmp_path / "x.raw", tmp_path / "x.vhd"
    with raw.open("wb") as file:
        file.write(b"\1" * written)
        file.truncate(size)
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "vpc", "-o",
                    "subformat=dynamic,force_size=on", str(raw), str(made)], check=True)
    data = made.read_bytes()
    assert check(vhd_of(size), data)[0].startswith("VHD (footers, header, ")
    assert_never_whole(vhd_of(size), data, list(range(0, min(3072, len(data)), 512)) + [
        len(data) - 513, len(data) - 512, len(data) - 1, len(data) // 2])
    refused(vhd_of(size + 512), data, "the VHD is for")


@pytest.mark.parametrize("size, populated", [
    (5 * MIB, (0, 4)), (5 * MIB + 512, (5,)), (700, (0,)), (MIB, ()), (3000 * MIB, (0, 2999))])
def test_whole_vhds_are_accepted_in_any_pieces(size, populated):
    data, rounded = a_vhd(size, populated), -(-size // 512) * 512
    for step in (100, 512, 1 << 20):
        assert check(vhd_of(rounded), data, step)
    assert check(vhd_of(), data)


TABLE = 512 + 1024
VHD_DAMAGE = {
    "nothing": (lambda d: b"", "cut off"),
    "the copy of the footer": (lambda d: flipped(d, 511), "no VHD footer"),
    "a footer's size": (lambda d: flipped(d, 48), "no VHD footer"),
    "the header": (lambda d: flipped(d, 512 + 1023), "header"),
    "a block behind the end": (lambda d: flipped(d, TABLE + 2, 6), "table"),
    "a block in the header": (lambda d: d[:TABLE] + bytes(4) + d[TABLE + 4:], "table"),
    "a block twice": (lambda d: d[:TABLE] + d[TABLE:TABLE + 4] * 3 + d[TABLE + 12:], "table"),
    "the last block left out": (lambda d: d[:TABLE + 8] + b"\xff" * 4 + d[TABLE + 12:], "table"),
    "the last footer": (lambda d: flipped(d, -1), "no footer at|cut off|after the end"),
    "the last footer's missing": (lambda d: d[:-512], "no footer at|cut off|after the end"),
    "text behind": (lambda d: d + b"x", "no footer at|cut off|after the end"),
    "an error page behind": (lambda d: d + ERROR_PAGE, "after the end"),
    "an error page alone": (lambda d: ERROR_PAGE + bytes(512), "no VHD footer"),
    "an error page in place of the end": (lambda d: d[:-512] + ERROR_PAGE, "cut off"),
    "two joined": (lambda d: d + d, "after the end"),
    "blocks cut out": (lambda d: d[:-MIB] + d[-512:], "cut off"),
    "blocks put in": (lambda d: d[:-512] + bytes(MIB) + d[-512:], "table"),
    "a fixed VHD": (lambda d: bytes(5 * MIB) + d[-512:], "no VHD footer"),
}


@pytest.mark.parametrize("what", VHD_DAMAGE)
def test_a_damaged_vhd_is_refused(what):
    damage, why = VHD_DAMAGE[what]
    refused(vhd_of(5 * MIB), damage(a_vhd()), why)


def test_a_vhd_with_a_table_beyond_measure_costs_no_memory():
    header = bytearray(a_vhd()[:TABLE])
    struct.pack_into(">I", header, 512 + 28, 0xFFFFFFFF)
    struct.pack_into(">I", header, 512 + 36, 0)
    struct.pack_into(">I", header, 512 + 36, ~sum(header[512:]) & 0xFFFFFFFF)
    refused(vhd_of(5 * MIB), bytes(header) + bytes(4096), "header")


# --- single disks: what XAPI rounds ---------------------------------------------------------------

@pytest.mark.parametrize("size", [512, 5000, 3 * MIB])
@pytest.mark.parametrize("more", [1, 512, 2 * MIB])
def test_zeros_behind_a_raw_disk_are_its_rounding(size, more):
    assert check(raw(size), b"x" * size + bytes(more), 1000 * 1000)
    refused(raw(size), b"x" * size + bytes(more - 1) + b"x", "data after the end")
    refused(raw(size), b"x" * size + bytes(2 * MIB + 1), "data after the end")


def test_a_raw_disk_of_unknown_size_is_not_proved():
    assert check(raw(None), b"anything")[0].startswith("NOT its size")


@pytest.mark.parametrize("size, fits", [
    (6 * MIB, True), (6 * MIB - 1, True), (4 * MIB + 512, True), (4 * MIB, True),
    (4 * MIB - 512, False), (6 * MIB + 512, False), (64 * MIB, False)])
def test_a_vhd_may_be_of_a_rounded_size(size, fits):
    if fits:
        assert check(vhd_of(size), a_vhd(6 * MIB))
    else:
        refused(vhd_of(size), a_vhd(6 * MIB), "the VHD is for")


@pytest.mark.parametrize("size, populated", [(5 * MIB, (0, 4)), (64 * MIB, ()), (512, (0,))])
def test_a_sector_more_or_less_anywhere_in_a_vhd_is_refused(size, populated):
    data = a_vhd(size, populated)
    places = list(range(0, 8192, 512)) + list(range(8192, len(data), 64 * 1024)) + [len(data)]
    for at in places:
        for sector in (bytes(512), b"\xff" * 512, data[:512]):
            refused(vhd_of(size), data[:at] + sector + data[at:])
        if at < len(data):
            refused(vhd_of(size), data[:at] + data[at + 512:])


def endless(data):
    """The data, then zeros without end; not asked for more than a little of them."""
    yield memoryview(data)
    for _ in range(64):
        yield memoryview(bytes(MIB))
    raise AssertionError("it reads on")


@pytest.mark.parametrize("prove, data", [
    (vmbackup.prove_xva, archive(disk(700))), (raw(700), bytes(700)), (vhd_of(5 * MIB), a_vhd())],
    ids=["xva", "raw", "vhd"])
def test_what_has_no_end_is_refused_soon(prove, data):
    with pytest.raises(vmbackup.ArchiveError):
        prove(endless(data))


def test_a_vhd_with_more_blocks_than_its_disk_is_refused():
    data = bytearray(a_vhd(5 * MIB, (0,)))
    struct.pack_into(">I", data, 512 + 28, 128)    # as many as the table's sector holds
    struct.pack_into(">I", data, 512 + 36, 0)
    struct.pack_into(">I", data, 512 + 36, ~sum(data[512:TABLE]) & 0xFFFFFFFF)
    assert check(vhd_of(5 * MIB), bytes(data))
    struct.pack_into(">I", data, TABLE + 4 * 100, 5000)
    refused(vhd_of(5 * MIB), bytes(data), "table is damaged")


# --- what XAPI itself writes ----------------------------------------------------------------------

def doubled(data, number=1, count=2):
    """A chunk and its hash come several times."""
    parts = split(data)
    return join(parts[:number] + parts[number:number + 2] * count + parts[number + 2:])


@pytest.mark.parametrize("size", [512, 700, MIB - 512, MIB])
def test_a_small_vhd_whose_only_chunk_comes_twice(size):
    """So xapi writes it from 26.16 on, and reads it where no disk stands behind it."""
    seen = bytearray(size)
    one, two = archive(disk(size)), archive(disk(2 * MIB), disk(size, seed=2))
    assert check(vmbackup.prove_xva, doubled(one))
    assert check(vmbackup.prove_xva, doubled(two, 5))
    sink = functools.partial(mark_place, seen)
    check(functools.partial(vmbackup.prove_xva, sink=sink), doubled(one))
    assert seen == b"x" * size
    refused(vmbackup.prove_xva, doubled(one, count=3), "out of order")
    behind = archive(disk(size), disk(2 * MIB, seed=2))
    assert check(vmbackup.prove_xva, behind)
    refused(vmbackup.prove_xva, doubled(behind), "only chunk twice.*enlarge the disk")


def mark_place(seen, ref, offset, view):
    if ref != "ova.xml":
        seen[offset : offset + len(view)] = b"x" * len(view)


@pytest.mark.parametrize("size", [MIB + 512, 3 * MIB])
def test_no_other_chunk_may_come_twice(size):
    for number in (1, 3):
        refused(vmbackup.prove_xva, doubled(archive(disk(size)), number), "out of order")


def test_a_first_disk_under_a_chunk_is_named_where_nothing_can_import_it():
    disks = disk(700), disk(6 * MIB, sparse=[0, 3])
    refused(vmbackup.prove_xva, archive(*disks), "enlarge the disk")


@pytest.mark.parametrize("more, fits", [(0, True), (512, True), (MIB, True), (MIB + 1, False)])
def test_zeros_behind_an_archive(more, fits):
    if fits:
        assert check(vmbackup.prove_xva, archive(disk(700)) + bytes(more))
    else:
        refused(vmbackup.prove_xva, archive(disk(700)) + bytes(more), "more than 1.0 MiB of zeros")


TRUE = {    # name: (size of the disk, what XAPI's importer makes of it)
    "no_disk.xva": (None, "."), "odd.xva": (None, "."), "odd_empty.xva": (None, "."),
    "one_chunk.xva": (None, "."), "only_zero_size.xva": (None, "."), "tiny.xva": (None, "."),
    "vhd_empty.xva": (None, "."), "vhd_1048576.xva": (None, "."),
    "xo-h67108864__fo.xva": (None, "."), "small_first_then_sparse.xva": (None, "enlarge the disk"),
    "r68157440_0-3.nbd-vhd.vhd": (68157440, "."), "r512_.nbd-vhd.vhd": (512, "."),
    "r67108864_.nbd-vhd.vhd": (67108864, "."), "r2097152_0.raw-vhd.vhd": (2097152, "."),
    "qemu-dynamic.vhd": (4212736, "."), "windows-differencing.vhd": (4194304, "not a whole"),
}


@needs_zstd
@pytest.mark.skipif(not (DATA / "true-streams").is_dir(), reason="no ../shared/data/true-streams")
@pytest.mark.parametrize("name", sorted(TRUE))
def test_true_streams_are_judged_as_xapi_does(name):
    size, verdict = TRUE[name]
    data = subprocess.run([ZSTD, "-dqc", str(DATA / "true-streams" / (name + ".zst"))],
                          stdout=subprocess.PIPE, check=True).stdout
    prove = vmbackup.prover(name, size)
    if verdict != ".":
        refused(prove, data, verdict)
        return
    for step in (1 << 20, 100 * 1000):
        assert check(prove, data, step)
    dice = random.Random(name)
    for at in [0, len(data) - 1] + [dice.randrange(len(data)) for _ in range(10)]:
        refused(prove, data[:at])
        if size:    # the data of a vhd bear no hashes
            refused(prove, data[:at // 512 * 512] + bytes(512) + data[at // 512 * 512:])


@packed
@pytest.mark.skipif(not DATA.is_dir(), reason="no ../shared/data")
def test_a_real_export_is_accepted(form):
    data = (DATA / "real-export.xva").read_bytes()
    proved = check(vmbackup.prover("x." + form), PACKED[form](data))
    assert proved[-2:] == ["archive (1 disks, 2 chunks)", "chunk hashes"]


# --- what is in an archive ------------------------------------------------------------------------

def content_of(spec):
    """The bytes that the simulator gives such a disk."""
    pool = Pool()
    pool.vm("vm", disks=[spec])
    world = Builder(pool.description).build()
    (ref,) = [ref for ref, vdi in world.db.tables["VDI"].items() if vdi["type"] != "iso"][:1]
    return world.content(ref)


@packed
@pytest.mark.parametrize("step", [1 << 20, 70001])
def test_the_sink_gets_the_disks_byte_for_byte(form, step):
    specs = (disk(2 * MIB + 512, seed=1, device="xvda"),
             disk(6 * MIB, "data", seed=2, sparse=[0, 3], device="xvdb"))
    data = archive(*specs, first_id=4, keepalive=(1,))
    size = int(data[124:135], 8)
    disks = vmbackup.parse_ova(data[512:512 + size])[2]
    images = {ref: bytearray(item.size) for ref, item in disks.items()}
    metadata = []

    def sink(ref, offset, view):
        if ref == "ova.xml":
            metadata.append(bytes(view))
        else:
            images[ref][offset:offset + len(view)] = view

    check(vmbackup.prover("x." + form, sink=sink), PACKED[form](data), step)
    assert metadata == [data[512:512 + size]]
    assert [(item.label, item.size, item.name) for item in disks.values()] == [
        ("xvda", 2 * MIB + 512, specs[0]["name"]), ("xvdb", 6 * MIB, "data")]
    for ref, spec in zip(disks, specs):
        expected = b"".join(bytes(piece) for piece in xva.raw(content_of(spec)))
        assert bytes(images[ref]) == expected


# --- the pool's database --------------------------------------------------------------------------

ROW = '<row ref="OpaqueRef:%d" __ctime="1" _ref="OpaqueRef:%d" name__label="&lt;a &amp; b&gt;"/>'
TABLES = ("Bond", "VM", "VDI", "host")


def a_dump(tables=TABLES, rows=3, minor=711):
    inner = "".join('<table name="%s">%s</table>' % (
        name, "".join(ROW % (row, row) for row in range(rows))) for name in tables)
    return ('<?xml version="1.0" encoding="UTF-8"?>\n<database><manifest>'
            '<pair key="schema_major_vsn" value="5"/><pair key="schema_minor_vsn" value="%d"/>'
            '</manifest>%s</database>' % (minor, inner)).encode()


def test_a_dump_and_what_its_tables_tell():
    tables = vmbackup.dump_tables(pieces_of(a_dump(), 100))
    assert tables == set(TABLES) | {"schema 5.711"}
    assert check(functools.partial(vmbackup.prove_dump, tables=tables), a_dump() + b"\n", 7)


@pytest.mark.parametrize("data, why", [
    (b"", "damaged"), (a_dump()[:-1], "lacks </database>"), (a_dump() + b"x", "damaged"),
    (a_dump() + ERROR_PAGE, "damaged"), (ERROR_PAGE, "damaged"),
    (a_dump(rows=0), "lists no VM"), (a_dump(("VDI", "host")), "lists no VM"),
    (b"<!DOCTYPE x [<!ENTITY a 'b'>]><database>&a;</database>", "not XAPI's"),
    (b"<a>" * 100, "damaged"), (a_dump()[:300] + a_dump()[345:], "damaged"),
])
def test_a_dump_that_is_not_whole(data, why):
    refused(vmbackup.prove_dump, data, why)


def test_a_table_that_the_last_dump_had_must_not_be_gone():
    tables = vmbackup.dump_tables(pieces_of(a_dump()))
    prove = functools.partial(vmbackup.prove_dump, tables=tables)
    refused(prove, a_dump(("VM", "host")), "lacks what the last one has: table Bond, VDI")
    assert check(prove, a_dump(TABLES + ("Cluster",)))
    assert check(prove, a_dump(("VM", "host"), minor=775))    # another version of XAPI


def test_a_dump_without_end_is_given_up(monkeypatch):
    monkeypatch.setattr(vmbackup, "DUMP_LIMIT", 8 * MIB)
    monkeypatch.setattr(vmbackup, "METADATA_LIMIT", 2 * MIB)
    start = a_dump()[:-11]
    for more in (b'<table name="x"/>', b"x", b"<x", b'<x y="'):
        repeated = itertools.chain([memoryview(start + more)], itertools.repeat(
            memoryview(b"<x/>" * 1000 if more.endswith(b">") else b"x" * 4000)))
        with pytest.raises(vmbackup.ArchiveError, match="no end|damaged"):
            vmbackup.prove_dump(repeated)


@pytest.mark.skipif(not DATA.is_dir(), reason="no ../shared/data")
def test_a_real_database_and_a_piece_cut_out_of_it():
    data = (DATA / "real-pool-database.xml").read_bytes()
    tables = vmbackup.dump_tables(pieces_of(data))
    prove = functools.partial(vmbackup.prove_dump, tables=tables)
    assert check(prove, data)
    begin = data.index(b'<table name="VBD"')
    refused(prove, data[:begin] + data[data.index(b"<table", begin + 9):], "lacks .* VBD")
    dice, found = random.Random(1), 0
    for _ in range(100):
        at = dice.randrange(len(data) // 2)
        with contextlib.suppress(vmbackup.ArchiveError):
            check(prove, data[:at] + data[at + dice.randrange(10000, 100000):])
            found -= 1
        found += 1
    assert found >= 90    # who cuts at the same field of two rows is not found out


# --- from one to many -----------------------------------------------------------------------------

def filled(count, size=MIB):
    """readinto() of `count` pieces, each full of its number."""
    numbers = iter(range(count))

    def readinto(view):
        number = next(numbers, None)
        if number is None:
            return 0
        view[:size] = bytes([number % 251]) * size
        return size

    return readinto


def slowly(pieces, lag=0.002):
    found = []
    for piece in pieces:
        threading.Event().wait(lag)
        found.append((bytes(piece[:1]), bytes(piece[-1:]), len(piece)))
    return found


def test_every_consumer_gets_every_piece_unspoiled(nothing_left):
    one, two, three = vmbackup.fan_out(
        vmbackup.ring(filled(40, 1000)), slowly, functools.partial(slowly, lag=0), list_of_sizes)
    assert one == two == [(bytes([number]),) * 2 + (1000,) for number in range(40)]
    assert three == [1000] * 40


def list_of_sizes(pieces):
    return [len(piece) for piece in pieces]


@pytest.mark.parametrize("after", [0, 1, 5, 39])
def test_a_consumer_that_dies_ends_all(after, nothing_left):
    def dies(pieces):
        for number, _ in enumerate(pieces):
            if number == after:
                raise vmbackup.ArchiveError("broken at %d" % number)

    with pytest.raises(vmbackup.ArchiveError, match="broken at %d" % after):
        vmbackup.fan_out(vmbackup.ring(filled(10 ** 6, 100)), list_of_sizes, dies, slowly)


def test_a_consumer_that_dies_ends_the_wait_for_the_next_piece(nothing_left):
    """The host may be silent for an hour: the stream is shut, and the consumer's error counts."""
    shut = threading.Event()

    def source():
        yield memoryview(b"x")
        assert shut.wait(10)
        raise vmbackup.ConnectionLost("it was shut")

    def dies(pieces):
        next(pieces)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        vmbackup.fan_out(source(), list_of_sizes, dies, abort=shut.set)


def test_a_consumer_that_has_seen_enough_holds_nobody_up(nothing_left):
    assert vmbackup.fan_out(vmbackup.ring(filled(40, 100)), len_of_first, list_of_sizes) == [
        100, [100] * 40]


def len_of_first(pieces):
    return len(next(pieces))


def test_an_error_of_the_source_is_no_end_of_the_export(nothing_left):
    ended = []

    def source():
        yield memoryview(b"x")
        raise vmbackup.Interrupted(15)

    def consumer(pieces):
        ended.append(list(pieces))

    with pytest.raises(vmbackup.Interrupted):
        vmbackup.fan_out(source(), consumer, consumer)
    assert not ended


def test_a_stop_counts_more_than_what_it_did_to_a_consumer(nothing_left):
    died = threading.Event()

    def source():
        yield memoryview(b"x")
        died.wait(10)
        raise vmbackup.Interrupted(15)

    def consumer(pieces):
        next(pieces)
        died.set()
        raise vmbackup.ArchiveError("it is cut off")

    with pytest.raises(vmbackup.Interrupted):
        vmbackup.fan_out(source(), consumer)


@needs_zstd
@pytest.mark.parametrize("damage, why", [
    (lambda data: data, None), (lambda data: data[:-9], "zstd"), (lambda data: data + b"x", "zstd"),
    (lambda data: zstd(b"no archive" * MIB), "tar header|begin with")])
def test_zstd_as_one_of_several(damage, why, nothing_left):
    data = damage(zstd(archive(disk(20 * MIB, seed=3))))
    arguments = vmbackup.ring(io.BytesIO(data).readinto), vmbackup.hash_all, vmbackup.prover(
        "a.xva.zst")
    if why:
        with pytest.raises(vmbackup.ArchiveError, match=why):
            vmbackup.fan_out(*arguments)
    else:
        assert vmbackup.fan_out(*arguments)[1][0] == "zstd"


def test_the_file_is_a_new_one(tmp_path, nothing_left):
    fd = os.open(str(tmp_path), os.O_RDONLY)
    (tmp_path / "there").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for name in ("there", "link"):
        with pytest.raises(FileExistsError):
            vmbackup.write_all(name, fd, iter(()))
    assert vmbackup.write_all("new", fd, pieces_of(bytes(200 * MIB))) == 200 * MIB
    os.close(fd)
    assert (tmp_path / "new").stat().st_size == 200 * MIB
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o600
    assert not (tmp_path / "elsewhere").exists()


# --- any bytes, any pieces ------------------------------------------------------------------------

SMALL_XVA = archive(disk(700, seed=1))
SMALL = {
    "xva": SMALL_XVA, "xva.gz": gzip.compress(SMALL_XVA), "vhd": a_vhd(MIB, ()),
    "raw": bytes(700),
}
if ZSTD:
    SMALL["xva.zst"] = zstd(SMALL_XVA)


def small_prover(form):
    return vmbackup.prover("x." + form, {"vhd": MIB, "raw": 700}.get(form))


def in_pieces(data, sizes):
    """The data in pieces of these sizes, over and over."""
    at, number = 0, 0
    while at < len(data):
        size = sizes[number % len(sizes)]
        yield memoryview(data)[at:at + size]
        at, number = at + size, number + 1


sizes_of_pieces = st.lists(st.integers(1, 5000), min_size=1, max_size=5)
edits = st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 600), st.binary(max_size=40)),
                 max_size=4)


@QUICK
@given(sizes=sizes_of_pieces)
@pytest.mark.parametrize("form", sorted(set(SMALL) - {"xva.zst"}))
def test_any_pieces_of_a_whole_export_are_accepted(form, sizes):
    assert small_prover(form)(in_pieces(SMALL[form], sizes))


@QUICK
@given(start=st.integers(0, 1 << 20), noise=st.binary(max_size=3000), sizes=sizes_of_pieces,
       changes=edits)
@pytest.mark.parametrize("form", sorted(set(SMALL) - {"xva.zst"}))
def test_no_bytes_raise_anything_but_ArchiveError(form, start, noise, sizes, changes):
    """A good export up to some place, changed at others, noise behind."""
    data = SMALL[form][:start % (len(SMALL[form]) + 1)]
    for at, length, new in changes:
        at %= len(data) + 1
        data = data[:at] + new + data[at + length:]
    with contextlib.suppress(vmbackup.ArchiveError):
        small_prover(form)(in_pieces(data + noise, sizes))


@needs_zstd
@settings(QUICK, max_examples=15)
@given(start=st.integers(0, 1 << 20), noise=st.binary(max_size=300), sizes=sizes_of_pieces)
def test_no_bytes_through_zstd_raise_anything_but_ArchiveError(start, noise, sizes):
    whole = SMALL["xva.zst"]
    data = whole[:start % (len(whole) + 1)] + noise
    if data == whole:
        assert small_prover("xva.zst")(in_pieces(data, sizes))
    else:
        with pytest.raises(vmbackup.ArchiveError):
            small_prover("xva.zst")(in_pieces(data, sizes))


# --- ova.xml for people ---------------------------------------------------------------------------

@pytest.mark.parametrize("value", [
    "", " ", "\n", "a\nb", "x <y> & z", "a > b", "><", [], {}, [[]], {"": ""}, True,
    ["", {"a": []}]])
def test_indented_xml_says_the_same(value):
    value = {"version": {"xapi": value}, "objects": [value, {"class": "VM", "snapshot": value}]}
    text = xmlrpc.client.dumps((value,))
    dense = re.sub(r"(?<!<string)>\n<", "><", text)  # as XAPI writes it
    for given_text in (text, dense, '<?xml version="1.0"?>' + dense):
        assert xmlrpc.client.loads(vmbackup.indented(given_text))[0][0] == value
    assert "\n            <struct>\n" in vmbackup.indented(dense)

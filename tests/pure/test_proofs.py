# SPDX-License-Identifier: GPL-3.0-or-later
"""The checkers that decide whether an export is whole: what they accept, and all they refuse.

The archives are the simulator's, real ones, and both with every kind of damage.
"""
import contextlib
import ctypes
import gzip
import random
import shutil
import struct
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from simulator import vhd, xva
from simulator.disks import Random
from simulator.pool import MIB, Pool, cd, disk, vif
from simulator.world import Builder
from support.harness import ROOT

import vmbackup

REAL = ROOT.parent / "shared" / "data" / "real-export.xva"
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


def check(checker, data, step=1 << 20):
    """What a checker says of these bytes: phrases, or ArchiveError."""
    with contextlib.closing(checker):
        for at in range(0, len(data), step):
            checker.feed(data[at:at + step])
        return checker.finish()


def refused(checker, data, why="."):
    with pytest.raises(vmbackup.ArchiveError, match=why):
        check(checker, data)


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
    proved = check(vmbackup.make_checker("x." + form), PACKED[form](GOOD[what]()))
    assert proved[-1] == "chunk hashes"


@packed
@pytest.mark.skipif(not REAL.exists(), reason="the real export is not there")
def test_a_real_export_is_accepted(form):
    proved = check(vmbackup.make_checker("x." + form), PACKED[form](REAL.read_bytes()))
    assert proved[-2:] == ["archive (1 disks, 2 chunks)", "chunk hashes"]


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
    "an error page alone": (lambda m: ERROR_PAGE + bytes(512), "error page"),
    "an error page behind": (lambda m: join(m) + ERROR_PAGE, "error page: VDI_IO_ERROR"),
    "an error page in place of the end": (
        lambda m: join(m[:-1]) + ERROR_PAGE + bytes(512), "error page: VDI_IO_ERROR"),
    "an error page between chunks": (lambda m: join(m[:5]) + ERROR_PAGE + bytes(512), "error page"),
    "an error page within a chunk": (
        lambda m: join(m[:3]) + m[3][1][:9999] + ERROR_PAGE, "cut off|match"),
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
    refused(vmbackup.XvaCheck(), damage(members), why)


@packed
@pytest.mark.parametrize("what", [
    "nothing", "an error page behind", "two archives joined", "no end", "one zero block only",
    "a flipped bit in the last chunk", "the last chunk is missing", "a disk is missing"])
def test_damage_is_found_inside_a_compressed_stream(members, what, form):
    damage, why = DAMAGE[what]
    refused(vmbackup.make_checker("x." + form), PACKED[form](damage(members)), why)


@pytest.mark.parametrize("what, options, why", [
    ("numbers that begin again", {"restart": 0}, "out of order"),
    ("a wrong hash", {"wrong_hash": [1]}, "match"),
    ("a wrong SHA-1", {"wrong_hash": [1], "sha1": True}, "match"),
    ("a flipped bit under SHA-1", {"flip": {-1: 5}, "sha1": True}, "match"),
    ("a missing last chunk", {"missing": [-1]}, "ends at"),
])
def test_what_xapi_itself_may_write_wrong_is_refused(what, options, why):
    refused(vmbackup.XvaCheck(), archive(*TWO, **options), why)


def test_a_sparse_disk_behind_one_of_less_than_a_chunk_is_refused():
    """XAPI counts skipped chunks in units of the archive's first one: its import would fail."""
    refused(vmbackup.XvaCheck(), archive(disk(700), disk(6 * MIB, sparse=[0, 3])), "ends at")


# --- cut anywhere ---------------------------------------------------------------------------------

def assert_never_whole(checker, data, step):
    """At no multiple of `step` before the end is the data whole."""
    for at in range(0, len(data), step):
        with pytest.raises(vmbackup.ArchiveError):
            checker.finish()
        checker.feed(data[at:at + step])
    assert checker.finish()


@pytest.mark.parametrize("disks, step", [(TWO, 512), ([disk(700)], 1), ([], 1)])
def test_an_archive_cut_anywhere_is_refused(disks, step):
    assert_never_whole(vmbackup.XvaCheck(), archive(*disks), step)


@packed
def test_a_compressor_that_ended_properly_around_a_cut_archive_proves_nothing(form):
    """xapi's compressors do: so gzip -t and zstd -t are content, and only we can tell."""
    data = archive(disk(MIB + 700, seed=1))
    ends = [0]
    for _, member in split(data):
        ends.append(ends[-1] + len(member))
    dice = random.Random(form)
    cuts = ends[:-1] + [len(data) - 512] + [dice.randrange(len(data)) for _ in range(10)]
    for at in cuts:
        stream = PACKED[form](data[:at])
        with pytest.raises(vmbackup.ArchiveError):
            check(vmbackup.make_checker("x." + form), stream)


@pytest.mark.parametrize("form", ["xva.gz", pytest.param("xva.zst", marks=needs_zstd)])
def test_a_compressed_stream_cut_damaged_or_followed_is_refused(form):
    data = PACKED[form](archive(disk(MIB, seed=1)))
    places = [0, 1, 9, 100, len(data) // 2, len(data) - 9, len(data) - 1]
    for at in places:
        refused(vmbackup.make_checker("x." + form), data[:at])
    for at in [0, 1, len(data) // 3, len(data) // 2, len(data) - 2]:
        refused(vmbackup.make_checker("x." + form), flipped(data, at, 2))
    for tail in (ERROR_PAGE, b"x", b"\0", data):
        refused(vmbackup.make_checker("x." + form), data + tail)


# --- zstd without the command ---------------------------------------------------------------------

@needs_zstd
@pytest.mark.parametrize("options", [["-1"], ["-9"], ["--no-check"], ["--no-content-size"]])
def test_the_frame_of_zstd_is_followed_without_zstd(options, tmp_path):
    path = tmp_path / "x"
    path.write_bytes(archive(*TWO))
    data = subprocess.run([ZSTD, "-qc"] + options + [str(path)], stdout=subprocess.PIPE,
                          check=True).stdout
    assert check(vmbackup.ZstdFrameCheck(), data)[-1] == (
        "NOT the archive inside (no zstd command here)")
    for at in (0, 4, 5, 20, len(data) // 2, len(data) - 1):
        refused(vmbackup.ZstdFrameCheck(), data[:at], "cut off")
    refused(vmbackup.ZstdFrameCheck(), data + ERROR_PAGE, "error page: VDI_IO_ERROR")
    refused(vmbackup.ZstdFrameCheck(), data + data, "data after the end")
    refused(vmbackup.ZstdFrameCheck(), ERROR_PAGE, "not a zstd stream")


def test_the_checker_goes_by_the_file_name(monkeypatch):
    kinds = {name: type(vmbackup.make_checker("a." + name, 512)).__name__
             for name in ("xva", "xva.gz", "vhd", "raw")}
    assert kinds == {"xva": "XvaCheck", "xva.gz": "GzipCheck", "vhd": "VhdCheck", "raw": "RawCheck"}
    monkeypatch.setenv("PATH", "/nonexistent")
    assert isinstance(vmbackup.make_checker("a.xva.zst"), vmbackup.ZstdFrameCheck)


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
    proved = check(vmbackup.XvaCheck(), good)
    if source_of_xxh64 == "neither":
        assert proved == ["archive (2 disks, 6 chunks)", "NOT 6 chunk hashes (no libxxhash here)"]
        assert check(vmbackup.XvaCheck(), bad) == proved
    else:
        assert proved == ["archive (2 disks, 6 chunks)", "chunk hashes"]
        refused(vmbackup.XvaCheck(), bad, "match")
        xxh64 = vmbackup.find_xxh64()    # vectors of the reference implementation
        for data, told in ((b"", "EF46DB3751D8E999"), (b"abc", "44BC2CF5AD770999"),
                           (bytes(MIB), "87D2A1B6E1163EF1")):
            for view in (memoryview(data), memoryview(bytearray(data))):
                mine = xxh64()
                mine.update(view[:70000])
                mine.update(view[70000:])
                assert mine.hexdigest().upper() == told


def test_sha1_needs_no_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "xxhash", None)
    monkeypatch.setitem(sys.modules, "ctypes", None)
    assert check(vmbackup.XvaCheck(), archive(*TWO, sha1=True))[-1] == "chunk hashes"


# --- raw disks and VHDs ---------------------------------------------------------------------------

@pytest.mark.parametrize("data, why", [
    (b"", "0 of 5000 bytes"), (bytes(4999), "4999 of 5000"), (bytes(5001), "more bytes"),
    (bytes(5000) + ERROR_PAGE, "more bytes"), (ERROR_PAGE, "error page: VDI_IO_ERROR"),
    (bytes(4000) + ERROR_PAGE, "of 5000 bytes"),
])
def test_a_raw_disk_has_its_size_or_is_refused(data, why):
    refused(vmbackup.RawCheck(5000), data, why)


@pytest.mark.parametrize("size", [0, 1, 512, 5000])
def test_a_whole_raw_disk_is_accepted(size):
    assert check(vmbackup.RawCheck(size), ERROR_PAGE.ljust(size, b"x")[:size], 100) == [
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
    assert check(vmbackup.VhdCheck(size), data)[0].startswith("VHD (footers, header, ")
    assert_never_whole(vmbackup.VhdCheck(size), data, 512)
    refused(vmbackup.VhdCheck(size + 512), data, "the VHD is for")


@pytest.mark.parametrize("size, populated", [
    (5 * MIB, (0, 4)), (5 * MIB + 512, (5,)), (700, (0,)), (MIB, ()), (3000 * MIB, (0, 2999))])
def test_whole_vhds_are_accepted_in_any_pieces(size, populated):
    data, rounded = a_vhd(size, populated), -(-size // 512) * 512
    for step in (100, 512, 1 << 20):
        assert check(vmbackup.VhdCheck(rounded), data, step)
    assert check(vmbackup.VhdCheck(), data)


TABLE = 512 + 1024
VHD_DAMAGE = {
    "nothing": (lambda d: b"", "cut off"),
    "the copy of the footer": (lambda d: flipped(d, 511), "no VHD footer"),
    "a footer's size": (lambda d: flipped(d, 48), "no VHD footer"),
    "the header": (lambda d: flipped(d, 512 + 1023), "header"),
    "a block behind the end": (lambda d: flipped(d, TABLE + 2, 6), "table"),
    "a block in the header": (lambda d: d[:TABLE] + bytes(4) + d[TABLE + 4:], "overlap"),
    "a block twice": (lambda d: d[:TABLE] + d[TABLE:TABLE + 4] * 3 + d[TABLE + 12:], "overlap"),
    "the last block left out": (lambda d: d[:TABLE + 8] + b"\xff" * 4 + d[TABLE + 12:], "table"),
    "the last footer": (lambda d: flipped(d, -1), "does not end in its footer"),
    "the last footer's missing": (lambda d: d[:-512], "does not end in its footer"),
    "text behind": (lambda d: d + b"x", "does not end in its footer"),
    "an error page behind": (lambda d: d + ERROR_PAGE, "error page: VDI_IO_ERROR"),
    "an error page alone": (lambda d: ERROR_PAGE + bytes(512), "error page"),
    "an error page in place of the end": (lambda d: d[:-512] + ERROR_PAGE, "error page"),
    "two joined": (lambda d: d + d, "table"),
    "blocks cut out": (lambda d: d[:-MIB] + d[-512:], "table"),
    "blocks put in": (lambda d: d[:-512] + bytes(MIB) + d[-512:], "table"),
    "a fixed VHD": (lambda d: bytes(5 * MIB) + d[-512:], "no VHD footer"),
}


@pytest.mark.parametrize("what", VHD_DAMAGE)
def test_a_damaged_vhd_is_refused(what):
    damage, why = VHD_DAMAGE[what]
    refused(vmbackup.VhdCheck(5 * MIB), damage(a_vhd()), why)


def test_a_vhd_with_a_table_beyond_measure_costs_no_memory():
    header = bytearray(a_vhd()[:TABLE])
    struct.pack_into(">I", header, 512 + 28, 0xFFFFFFFF)
    struct.pack_into(">I", header, 512 + 36, 0)
    struct.pack_into(">I", header, 512 + 36, ~sum(header[512:]) & 0xFFFFFFFF)
    refused(vmbackup.VhdCheck(5 * MIB), bytes(header) + bytes(4096), "header")


# --- any bytes, any pieces ------------------------------------------------------------------------

SMALL_XVA = archive(disk(700, seed=1))
SMALL = {
    "xva": SMALL_XVA, "xva.gz": gzip.compress(SMALL_XVA), "vhd": a_vhd(MIB, ()),
    "raw": bytes(700),
}
if ZSTD:
    SMALL["xva.zst"] = zstd(SMALL_XVA)
    SMALL["frame"] = SMALL["xva.zst"]


def small_checker(form):
    if form == "frame":
        return vmbackup.ZstdFrameCheck()
    return vmbackup.make_checker("x." + form, {"vhd": MIB, "raw": 700}.get(form))


def in_pieces(data, sizes):
    """The data in pieces of these sizes, over and over."""
    at, number = 0, 0
    while at < len(data):
        size = sizes[number % len(sizes)]
        yield data[at:at + size]
        at, number = at + size, number + 1


sizes_of_pieces = st.lists(st.integers(1, 5000), min_size=1, max_size=5)
edits = st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 600), st.binary(max_size=40)),
                 max_size=4)


@QUICK
@given(sizes=sizes_of_pieces)
@pytest.mark.parametrize("form", sorted(set(SMALL) - {"xva.zst"}))
def test_any_pieces_of_a_whole_export_are_accepted(form, sizes):
    checker = small_checker(form)
    for piece in in_pieces(SMALL[form], sizes):
        checker.feed(piece)
    assert checker.finish()


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
    checker = small_checker(form)
    with contextlib.suppress(vmbackup.ArchiveError):
        for piece in in_pieces(data + noise, sizes):
            checker.feed(piece)
        checker.finish()


@needs_zstd
@settings(QUICK, max_examples=15)
@given(start=st.integers(0, 1 << 20), noise=st.binary(max_size=300), sizes=sizes_of_pieces)
def test_no_bytes_through_zstd_raise_anything_but_ArchiveError(start, noise, sizes):
    whole = SMALL["xva.zst"]
    data = whole[:start % (len(whole) + 1)] + noise
    with contextlib.closing(small_checker("xva.zst")) as checker:
        if data == whole:
            assert check(checker, data)
            return
        with pytest.raises(vmbackup.ArchiveError):
            for piece in in_pieces(data, sizes):
                checker.feed(piece)
            checker.finish()

# SPDX-License-Identifier: GPL-3.0-or-later
"""The archive checkers, fed a real XVA (in any pieces) and what damage makes of it."""
import gzip
import shutil
import subprocess

import pytest
from harness import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

import vmbackup

REAL = ROOT.parent / "shared" / "data" / "real-export.xva"
needs_real = pytest.mark.skipif(not REAL.exists(), reason="the real XVA is not there")
KINDS = [("a.xva", bytes), ("a.xva.gz", gzip.compress)]
if shutil.which("zstd"):
    KINDS.append(("a.xva.zst", lambda data: subprocess.run(
        ["zstd", "-qc"], input=data, stdout=subprocess.PIPE, check=True).stdout))
PAGE = b"HTTP/1.1 500 Internal Error\r\n\r\n<h1> Additional information </h1>VDI_IO_ERROR: [ ]"


def check(checker, data, step=300000):
    try:
        for start in range(0, len(data), step):
            checker.feed(data[start:start + step])
        return checker.finish()
    finally:
        checker.close()


@needs_real
@pytest.mark.parametrize("name, pack", KINDS)
@pytest.mark.parametrize("step", [511, 70000, 1 << 22])
def test_a_real_export_is_accepted_in_pieces_of_any_size(name, pack, step):
    proved = check(vmbackup.make_checker(name), pack(REAL.read_bytes()), step)
    assert proved[-2:] == ["archive (1 disks, 2 chunks)", "chunk hashes"]


@needs_real
def test_a_cut_anywhere_is_refused():
    data, checker = REAL.read_bytes(), vmbackup.XvaCheck()
    for start in range(0, len(data), 512):
        with pytest.raises(vmbackup.ArchiveError):
            checker.finish()
        checker.feed(data[start:start + 512])
    assert checker.finish()


def members(data):
    """[(name, offset of the header, offset behind the data)]"""
    found, at = [], 0
    while data[at]:
        size = int(data[at + 124:at + 135], 8)
        end = at + 512 + size + -size % 512
        found.append((data[at:at + 100].rstrip(b"\0").decode(), at, end))
        at = end
    return found


@needs_real
@pytest.mark.parametrize("name, pack", KINDS)
def test_damage_is_refused_inside_any_compression(name, pack):
    data = REAL.read_bytes()
    parts = members(data)
    flipped = bytearray(data)
    flipped[parts[1][1] + 512 + 77777] ^= 4
    wrong_hash = bytearray(data)
    wrong_hash[parts[2][1] + 512] ^= 1
    bad = {
        "flipped bit": bytes(flipped), "wrong hash": bytes(wrong_hash),
        "last chunk missing": data[:parts[3][1]] + data[parts[4][2]:],
        "first chunk missing": data[:parts[1][1]] + data[parts[3][1]:],
        "chunk twice": data[:parts[3][1]] + data[parts[1][1]:],
        "hash missing": data[:parts[2][1]] + data[parts[2][2]:],
        "no ova.xml": data[parts[0][2]:], "joined": data + data, "page": data + PAGE,
        "no end": data[:-1024], "half an end": data[:-512], "letter behind": data + b"x",
    }
    bad.update(("cut before " + part[0], data[:part[1]]) for part in parts)
    for what, damaged in bad.items():
        with pytest.raises(vmbackup.ArchiveError):
            pytest.fail("%s: %s" % (what, check(vmbackup.make_checker(name), pack(damaged))))


@needs_real
@pytest.mark.parametrize("name, pack", KINDS[1:])
def test_something_behind_the_compressed_stream_is_refused(name, pack):
    data = pack(REAL.read_bytes())
    for damaged in (data + PAGE, data[:-3], data + data):
        with pytest.raises(vmbackup.ArchiveError):
            check(vmbackup.make_checker(name), damaged)


@needs_real
def test_without_libxxhash_and_zstd_the_result_says_what_was_not_checked(monkeypatch):
    monkeypatch.setattr(vmbackup, "find_xxh64", lambda: None)
    assert "chunk hashes" in check(vmbackup.XvaCheck(), REAL.read_bytes())  # SHA-1 is always there
    if len(KINDS) > 2:
        packed = KINDS[2][1](REAL.read_bytes())
        assert "NOT the archive inside" in check(vmbackup.ZstdFrameCheck(), packed)[-1]
        for damaged in (packed[:-1], packed + b"x", packed + PAGE):
            with pytest.raises(vmbackup.ArchiveError):
                check(vmbackup.ZstdFrameCheck(), damaged)


@given(data=st.binary(max_size=3000), step=st.integers(1, 2000))
@settings(max_examples=150, deadline=None)
def test_any_bytes_raise_nothing_but_the_programs_own_error(data, step):
    for make in (vmbackup.XvaCheck, vmbackup.VhdCheck, vmbackup.ZstdFrameCheck,
                 lambda: vmbackup.RawCheck(4096), lambda: vmbackup.GzipCheck(vmbackup.XvaCheck())):
        for prefix in (b"", b"\x28\xb5\x2f\xfd", b"conectix", b"\x1f\x8b\x08\0"):
            with pytest.raises(vmbackup.ArchiveError):
                check(make(), prefix + data, step)

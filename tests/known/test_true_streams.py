# SPDX-License-Identifier: GPL-3.0-or-later
"""True exports are accepted and broken ones refused: streams written by xen-api's own stream code,
judged as its importer does.

They are read from ../shared/data beside the project; where that folder is not, those tests skip.
What can be had without it is made by the simulator.
"""
import contextlib
import re
import shutil
import socket
import subprocess
import threading

import pytest
from simulator.pool import MIB, Pool, disk
from support.harness import ROOT, hasty, vmbackup
from support.relay import Relay, address_of
from support.upstream import folder_name, leave_backup
from support.world import IMPATIENT, one_vm, pool_of

STREAMS = ROOT.parent / "shared" / "data" / "true-streams"
IMPORTS = ["tiny.xva", "odd.xva", "odd_empty.xva", "one_chunk.xva", "no_disk.xva",
           "only_zero_size.xva", "vhd_empty.xva", "xo-h67108864__fo.xva", "vhd_1048576.xva",
           "r68157440_0-3.nbd-vhd.vhd", "r512_.nbd-vhd.vhd", "r67108864_.nbd-vhd.vhd",
           "r2097152_0.raw-vhd.vhd", "qemu-dynamic.vhd"]
REFUSED = ["small_first_then_sparse.xva", "windows-differencing.vhd"]


def stream(name):
    """The bytes of a true stream."""
    path = STREAMS / (name + ".zst")
    if not path.exists():
        pytest.skip("the true streams are not here: %s" % STREAMS)
    if not shutil.which("zstd"):
        pytest.skip("no zstd here")
    return subprocess.check_output(["zstd", "-dcq", str(path)])


def verify(tmp_path, name, data, size=None):
    """Result of verifying a lone file, or as a backup whose vdi.cfg tells the disk's size."""
    kind = name.rpartition(".")[2]
    path = tmp_path / ("it." + kind)
    if size is not None:
        folder = leave_backup(tmp_path, "it", 5, suffix=kind)
        text = (folder / "DISK-xvda" / "vdi.cfg").read_text()
        (folder / "DISK-xvda" / "vdi.cfg").write_text(
            re.sub("virtual_size=.*", "virtual_size=%d" % size, text))
        path = folder / ("it." + kind)
    path.write_bytes(data)
    return vmbackup("verify", tmp_path / "it" / folder_name(5) if size is not None else path)


@pytest.mark.parametrize("name", IMPORTS)
def test_what_xapi_imports_is_a_success(tmp_path, name):
    result = verify(tmp_path, name, stream(name))
    assert result.status == 0, result


@pytest.mark.parametrize("name", REFUSED)
def test_what_xapi_cannot_import_is_none(tmp_path, name):
    result = verify(tmp_path, name, stream(name))
    assert result.status == 2, result
    assert result.has("***ERROR***")


@pytest.mark.parametrize("name, size", [
    ("r68157440_0-3.nbd-vhd.vhd", 68157440), ("r512_.nbd-vhd.vhd", 512),
    ("r67108864_.nbd-vhd.vhd", 67108864), ("r2097152_0.raw-vhd.vhd", 2097152)])
def test_the_footer_of_a_vhd_is_rounded_up(tmp_path, name, size):
    """The record tells the disk's true size."""
    assert verify(tmp_path, name, stream(name), size).status == 0
    shutil.rmtree(str(tmp_path / "it"))
    assert verify(tmp_path, name, stream(name), size + 4 * MIB).status == 2


@pytest.mark.parametrize("sectors", [1, 3, 8])
@pytest.mark.parametrize("place", [0.3, 0.9])
def test_sectors_put_into_a_vhds_data(tmp_path, sectors, place):
    """All behind them are shifted, and no XAPI leaves a gap there."""
    data = stream("r2097152_0.raw-vhd.vhd")
    at = int(len(data) * place) // 512 * 512
    result = verify(tmp_path, "x.vhd", data[:at] + data[at - 512:at] * sectors + data[at:])
    assert result.status == 2, result


@pytest.mark.parametrize("more, byte, status", [
    (0, b"\0", 0), (512, b"\0", 0), (2 * MIB, b"\0", 0), (2 * MIB + 512, b"\0", 2),
    (512, b"x", 2), (-512, b"\0", 2)])
def test_the_host_rounds_a_raw_disk_up_with_zeros(tmp_path, more, byte, status):
    size = 3 * MIB + 512
    data = bytes(size) + byte * more if more >= 0 else bytes(size + more)
    result = verify(tmp_path, "x.raw", data, size)
    assert result.status == status, result


@pytest.mark.parametrize("form", ["raw", "vhd"])
@pytest.mark.parametrize("size", [512, MIB, 3 * MIB + 512])
def test_a_disk_that_is_no_multiple_of_2_mib(turn, form, size):
    pool = Pool()
    pool.setting(round_disks=False)
    pool.vm("web", disks=[disk(size, seed=1)])
    site = turn(pool)
    site.configure("vdi-export=web", "vdi_export_format=" + form)
    result = site.run()
    assert result.status == 0, result
    assert vmbackup("verify", site.config).status == 0


# --- what comes over the wire ---------------------------------------------------------------------

class Altering(Relay):
    """Passes all on to a host, but changes the body that answers a request with `alter(bytes)`."""

    def __init__(self, site, path, alter):
        self.to, self.path, self.alter, self.altered = address_of(site.sim), path, alter, 0
        super().__init__()

    def serve(self, client, _number):
        head = client.recv(4096, socket.MSG_PEEK)
        server = socket.create_connection(self.to)
        if not head.startswith(("GET " + self.path).encode()):
            self.pass_on(client, server)
            return
        threading.Thread(target=self.copy, args=(client, server), daemon=True).start()
        with contextlib.suppress(OSError):
            answer = b"".join(iter(lambda: server.recv(65536), b""))
            head, end, body = answer.partition(b"\r\n\r\n")
            head = re.sub(rb"(?i)\r\ncontent-length:[^\r]*", b"", head)
            self.altered += 1
            client.sendall(head + end + self.alter(body))
            client.shutdown(socket.SHUT_RDWR)


def cut_out(data, first, last):
    """Without what is from the first to the second place, where some text begins."""
    begin, end = data.index(first), data.index(last)
    assert begin < end
    return data[:begin] + data[end:]


DUMPS = {
    "bytes of the middle": lambda data: data[:len(data) // 2] + data[len(data) // 2 + 1700:],
    "a whole table": lambda data: re.sub(rb'<table name="VBD">.*?</table>', b"", data,
                                         flags=re.DOTALL),
    "half a tag": lambda data: data[:data.index(b"<row", len(data) // 2) + 3]
    + data[data.index(b"<row", len(data) // 2) + 9:],
    "the end": lambda data: data[:-20],
    "the end twice": lambda data: data + b"</database>",
}


@pytest.mark.parametrize("what", sorted(DUMPS))
def test_a_dump_with_a_piece_cut_out_is_no_backup(turn, what):
    """Its closing tag and its VMs are there. The last dump tells which tables there are."""
    site = turn(pool_of("web", "db"))
    site.configure("exclude=nobody", "pool_db_backup=1", "max_backups=1")
    assert site.run().status in (0, 1)
    (before,) = site.backups.glob("METADATA_*/*.dump")
    with Altering(site, "/pool/xmldbdump", DUMPS[what]) as way:
        result = site.run("host=" + way.url, constants=IMPATIENT)
        assert way.altered
    assert result.status == 2, result
    assert result.has("***ERROR - pool database backup failed")
    assert list(site.backups.glob("METADATA_*/*")) == [before]


def test_what_of_a_dump_is_not_proved_is_said(turn):
    site = turn(pool_of("web"))
    site.configure("exclude=nobody", "pool_db_backup=1")
    result = site.run()
    assert result.status in (0, 1), result
    assert result.has("not: every row")


@pytest.mark.parametrize("sectors", [1, 7])
def test_a_vhd_with_sectors_put_in_on_the_way(turn, sectors):
    site = turn(one_vm(4 * MIB))
    site.configure("vdi-export=web", "vdi_export_format=vhd")
    with Altering(site, "/export_raw_vdi", lambda data: data[:MIB] + bytes(512 * sectors)
                  + data[MIB:]) as way:
        result = site.run("host=" + way.url, constants=IMPATIENT)
        assert way.altered
    assert result.status == 2, result
    assert not site.folders("web", marked=False)


@pytest.mark.parametrize("more, status", [(bytes(2 * MIB), 0), (bytes(2 * MIB + 1), 2),
                                          (b"x" * 512, 2)])
def test_a_raw_disk_that_comes_larger(turn, more, status):
    site = turn(one_vm(2 * MIB))
    site.configure("vdi-export=web")
    with Altering(site, "/export_raw_vdi", lambda data: data + more) as way:
        result = site.run("host=" + way.url, constants=IMPATIENT)
        assert way.altered
    assert result.status == status, result
    assert len(site.folders("web", marked=False)) == (not status)


def test_a_true_stream_as_an_export(turn):
    """The host sends a disk of 65 MiB that it rounded up; its record tells the true size."""
    data = stream("r68157440_0-3.nbd-vhd.vhd")
    pool = Pool()
    pool.setting(round_disks=False)
    pool.vm("web", disks=[disk(68157440, content="zeros")])
    site = turn(pool)
    site.configure("vdi-export=web", "vdi_export_format=vhd")
    with Altering(site, "/export_raw_vdi", lambda _: data) as way:
        result = site.run("host=" + way.url)
        assert way.altered
    assert result.status == 0, result
    assert site.file("web", "vhd").read_bytes() == data
    assert vmbackup("verify", site.config).status == 0


def test_no_table_of_a_vhd_makes_it_large(tmp_path, turn):
    """A table of 2^32 blocks is refused before anything is made for it."""
    site = turn(one_vm(2 * MIB))
    site.configure("vdi-export=web", "vdi_export_format=vhd")

    def claims(data):
        header = bytearray(data[512:1536])
        header[28:32] = b"\xff\xff\xff\xff"
        header[36:40] = bytes(4)
        header[36:40] = (~sum(header) & 0xFFFFFFFF).to_bytes(4, "big")
        return data[:512] + bytes(header) + data[1536:]

    with Altering(site, "/export_raw_vdi", claims) as way:
        process = hasty(site, "host=" + way.url, TASK_ENDS=0.5, FAILURE_ENDS=0.2)
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 2, out
    assert b"header is damaged" in out

# SPDX-License-Identifier: GPL-3.0-or-later
"""extract: the disks of an archive as sparse images, anywhere and without a host. What they hold is
judged by the simulator's own disks, by sha256sum and, where it is there, by qemu-img."""
import hashlib
import os
import re
import shutil
import subprocess

import pytest
import xxhash
from simulator import xva
from simulator.client import Simulator
from simulator.pool import MIB, Pool, disk
from support.harness import Site, finish, start, vmbackup
from support.world import everything_below, wait_until

FORMS = {"xva": [], "xva.gz": ["compress=gzip"], "xva.zst": ["compress=zstd"],
         "raw": ["vdi_export_format=raw"], "vhd": ["vdi_export_format=vhd"]}
ARCHIVES = ["xva", "xva.gz", "xva.zst"]
SIZES = {"xvda": 4 * MIB + 512, "xvdb": 64 * MIB, "xvdc": 700}
needs_qemu = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="no qemu-img here")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """{form: the folder of a backup}, and under "hashes" the SHA-256 of the disks by label."""
    disks = [disk(SIZES["xvda"], "root", seed=1, device="xvda"),
             disk(SIZES["xvdb"], "data", seed=2, sparse=[0, 7, 40], device="xvdb"),
             disk(SIZES["xvdc"], "tiny", seed=3, device="xvdc")]
    pool, found = Pool(), {}
    pool.vm("web 1", disks=disks)
    with Simulator.start(pool) as sim:
        vdis = sim.records("VDI")
        found["hashes"] = {vbd["device"]: sim.disk_sha256(vdis[vbd["VDI"]]["uuid"])
                           for vbd in sim.records("VBD").values() if vbd["type"] == "Disk"}
        for form, words in FORMS.items():
            here = Site(sim, tmp_path_factory.mktemp("form"))
            kind = "vdi-export" if form in ("raw", "vhd") else "vm-export"
            here.configure(kind + "=web 1")
            result = here.run(*words)
            assert result.status == 0, result
            (found[form],) = here.folders("web 1")
    return found


def export_in(folder):
    (path,) = folder.glob("web 1.*")
    return path


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def extracted(*words, status=0, **options):
    result = vmbackup("extract", *words, **options)
    assert result.status == status, result
    return result


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def damaged(made, tmp_path, form, damage):
    """A copy of the backup's folder, damaged; its sums fit where damage is of the archive alone."""
    folder = tmp_path / "damaged" / made[form].name
    shutil.copytree(str(made[form]), str(folder))
    damage(export_in(folder))
    return folder


@pytest.mark.parametrize("form", ARCHIVES)
@pytest.mark.parametrize("lone", [False, True])
def test_the_disks_byte_for_byte_and_sparse(made, tmp_path, form, lone):
    before = everything_below(made[form])
    source = export_in(made[form]) if lone else made[form]
    result = extracted(source, "to=%s" % tmp_path)
    assert everything_below(made[form]) == before
    assert names(tmp_path) == ["web 1-%s.raw" % label for label in sorted(SIZES)]
    for label, size in SIZES.items():
        path = tmp_path / ("web 1-%s.raw" % label)
        assert path.stat().st_size == size
        assert path.stat().st_mode & 0o777 == 0o600
        assert sha256(path) == made["hashes"][label]
        assert any(re.match("disk %s is Ref:" % label, line) for line in result.lines), result
    assert (tmp_path / "web 1-xvdb.raw").stat().st_blocks * 512 < 5 * MIB
    assert result.lines[-1].startswith("VmBackup extract ended - Success - 3 images")
    assert ("NOT sha256" in result.lines[-1]) == lone


@needs_qemu
def test_qemu_img_reads_them(made, tmp_path):
    extracted(made["xva"], "to=%s" % tmp_path)
    for label in SIZES:
        path = str(tmp_path / ("web 1-%s.raw" % label))
        subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", path, path + ".qcow2"],
                       check=True)
        subprocess.run(["qemu-img", "compare", "-f", "raw", "-F", "qcow2", path, path + ".qcow2"],
                       check=True, stdout=subprocess.DEVNULL)


def test_one_disk_alone_and_into_the_current_folder(made, tmp_path):
    extracted(made["xva"], "disk=xvdc", cwd=tmp_path)
    assert names(tmp_path) == ["web 1-xvdc.raw"]
    assert sha256(tmp_path / "web 1-xvdc.raw") == made["hashes"]["xvdc"]
    extracted(made["xva"], "DISK=xvda", "To=.", cwd=tmp_path)
    assert names(tmp_path) == ["web 1-xvda.raw", "web 1-xvdc.raw"]


def test_an_unknown_disk_names_those_that_are_there(made, tmp_path):
    result = extracted(made["xva"], "disk=xvdq", "to=%s" % tmp_path, status=2)
    assert result.has("xvda, xvdb, xvdc")
    assert names(tmp_path) == []


@pytest.mark.parametrize("there", ["web 1-xvdb.raw", "web 1-xvdc.raw.partial"])
@pytest.mark.parametrize("kind", ["file", "link", "folder"])
def test_what_exists_is_not_replaced(made, tmp_path, there, kind):
    path = tmp_path / there
    if kind == "link":
        path.symlink_to(tmp_path / "elsewhere")
    else:
        path.mkdir() if kind == "folder" else path.write_text("mine")
    result = extracted(made["xva"], "to=%s" % tmp_path, status=2)
    assert result.has(there), result
    assert names(tmp_path) == [there]
    assert kind != "file" or path.read_text() == "mine"


def flip(at):
    def damage(path):
        data = bytearray(path.read_bytes())
        data[at if at >= 0 else len(data) + at] ^= 1
        path.write_bytes(bytes(data))
    return damage


@pytest.mark.parametrize("form", ARCHIVES)
@pytest.mark.parametrize("damage", [
    flip(3 * MIB), lambda path: os.truncate(str(path), path.stat().st_size - 512),
    lambda path: os.truncate(str(path), 0),
    lambda path: path.write_bytes(path.read_bytes() + b"HTTP/1.1 500 Internal Error\r\n\r\n"),
], ids=["a bit", "cut", "empty", "error page"])
def test_a_damaged_archive_leaves_no_image(made, tmp_path, form, damage):
    folder = damaged(made, tmp_path, form, damage)
    images = tmp_path / "images"
    images.mkdir()
    extracted(folder, "to=%s" % images, status=2)
    assert names(images) == []
    extracted(export_in(folder), "to=%s" % images, status=2)
    assert names(images) == []


def test_the_sum_counts_where_the_structure_is_right(made, tmp_path):
    def rename(path):
        data = path.read_bytes()
        assert b">root<" in data
        path.write_bytes(data.replace(b">root<", b">ruut<", 1))

    folder = damaged(made, tmp_path, "xva", rename)
    result = extracted(folder, "to=%s" % tmp_path, status=2)
    assert result.has("does not match SHA256SUMS")
    assert names(tmp_path) == ["damaged"]
    extracted(export_in(folder), "to=%s" % tmp_path)


@pytest.mark.parametrize("label", ["../../x", "/etc/x", "a/b", ".x", "x\ny", "", "x" * 300])
def test_no_label_leads_out_of_the_folder(made, tmp_path, label):
    def rename(path):
        data = path.read_bytes()
        size = int(data[124:135], 8)
        ova = data[512:512 + size].replace(b">xvda<", b">%s<" % label.encode())
        header = bytearray(data[:512])
        header[124:136] = b"%011o\0" % len(ova)
        header[148:156] = b" " * 8
        header[148:156] = b"%07o\0" % sum(header)
        path.write_bytes(bytes(header) + ova + bytes(-len(ova) % 512)
                         + data[512 + size + -size % 512:])

    source = export_in(damaged(made, tmp_path, "xva", rename))
    images = tmp_path / "images"
    images.mkdir()
    before = everything_below(tmp_path / "damaged")
    vmbackup("extract", source, "to=%s" % images)
    assert everything_below(tmp_path / "damaged") == before
    assert names(tmp_path) == ["damaged", "images"]
    assert all(path.is_file() for path in images.iterdir())


@pytest.mark.parametrize("form", ["raw", "vhd"])
def test_a_disk_image_needs_none(made, tmp_path, form):
    for source in (made[form], export_in(made[form])):
        result = extracted(source, "to=%s" % tmp_path)
        assert result.has("is a disk image already")
        assert result.has("qemu-img convert -f %s" % {"raw": "raw", "vhd": "vpc"}[form])
        assert names(tmp_path) == []


@pytest.mark.parametrize("words, why", [
    (["{top}/none"], "no such"), (["{top}/a.txt"], "no such"), (["{top}/fifo.xva"], "no such"),
    (["{folder}", "to={top}/no"], "no such folder"), (["{folder}", "x"], "invalid parameter x"),
    (["{folder}", "sr=x"], "invalid parameter"), (["{folder}", "to="], "invalid parameter")])
def test_words_that_mean_nothing_are_exit_3(made, tmp_path, words, why):
    (tmp_path / "a.txt").write_text("x")
    os.mkfifo(str(tmp_path / "fifo.xva"))
    result = extracted(*[word.format(top=tmp_path, folder=made["xva"]) for word in words], status=3)
    assert result.has(why), result
    assert len(result.lines) == 1


def test_a_folder_that_is_no_backup(made, tmp_path):
    folder = damaged(made, tmp_path, "xva", lambda path: None)
    (folder / "success").unlink()
    assert extracted(folder, "to=%s" % tmp_path, status=2).has("no marker")
    assert extracted(folder.parent, "to=%s" % tmp_path, status=2).has("no marker")
    assert names(tmp_path) == ["damaged"]


def endless(archive, path):
    """An archive that takes minutes: its first disk is 512 GiB, of zeros that are holes here."""
    data, chunk, size = archive.read_bytes(), 64 * MIB, 512 << 30
    ova = data[512:512 + int(data[124:135], 8)].replace(b">%d<" % SIZES["xvda"], b">%d<" % size)
    name = re.search(rb"(Ref:[0-9]+)/00000000\0", data).group(1).decode()
    digest = xxhash.xxh64(bytes(chunk)).hexdigest().upper().encode()
    with path.open("wb") as file:
        file.write(xva.ova_member(ova))
        for number in range(size // chunk):
            file.write(xva.tar_header("%s/%08d" % (name, number), chunk))
            file.seek(chunk, os.SEEK_CUR)
            file.write(xva.small_member("%s/%08d.xxhash" % (name, number), digest))
    return path


@pytest.mark.parametrize("signum", [2, 15])
def test_a_stop_leaves_nothing(made, tmp_path, signum):
    process = start("extract", endless(export_in(made["xva"]), tmp_path / "big.xva"), cwd=tmp_path)
    wait_until(lambda: (tmp_path / "big-xvda.raw.partial").exists())
    process.send_signal(signum)
    result = finish(process, timeout=20)
    assert result.status == 128 + signum, result
    assert names(tmp_path) == ["big.xva"]

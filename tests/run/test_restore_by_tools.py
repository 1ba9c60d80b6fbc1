# SPDX-License-Identifier: GPL-3.0-or-later
"""The archive's side of each way to restore that the README shows, by the tools named there."""
import filecmp
import os
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree

import pytest
from simulator.pool import GIB, MIB, Pool, disk, vif

NAME = "web server (1)"
SIZES = {"root": 3 * MIB + 512, "data": 40 * MIB}


@pytest.fixture
def here(turn):
    pool = Pool(name="Büro & Co")
    pool.vm(NAME, vifs=[vif()], memory=2 * GIB, vcpus=2, description="Größe & <Art>", disks=[
        disk(SIZES["root"], "root", seed=1, bootable=True, device="xvda"),
        disk(SIZES["data"], "data", seed=2, sparse=[0, 1, 17, 39], device="xvdb")])
    return turn(pool)


@pytest.fixture
def shell(tmp_path):
    """shell(command, **variables) runs what an administrator types, in a folder of its own."""
    folder = tmp_path / "restore"
    folder.mkdir()

    def run(command, cwd=folder, **variables):
        for tool in ("qemu-img", "xva-img", "zstd"):
            if tool in command and not shutil.which(tool):
                pytest.skip("%s is not installed" % tool)
        done = subprocess.run(["sh", "-euc", command], cwd=str(cwd), stdout=subprocess.PIPE,
                              env=dict(os.environ, **variables), check=True)
        return done.stdout.decode()

    run.folder = folder
    return run


def export(here, line, suffix, *more):
    here.configure(line, *more)
    result = here.run()
    assert result.status == 0, result
    return here.file(NAME, suffix)


def source(here, shell, name):
    """The disk on the pool, as a file."""
    path = shell.folder / ("%s.source" % name)
    here.sim.disk_bytes_to(name, path)
    assert path.stat().st_size == SIZES[name]
    return path


def assert_same(one, other):
    assert filecmp.cmp(str(one), str(other), shallow=False)


@pytest.mark.parametrize("compress, suffix, command", [
    ("False", "xva", 'tar -xf "$file"'),
    ("gzip", "xva.gz", 'tar -xzf "$file"'),
    ("zstd", "xva.zst", 'zstd -dcq "$file" | tar -xf -'),
])
def test_tar_gives_the_disks_of_an_xva(here, shell, compress, suffix, command):
    """Each chunk is a MiB at its number's place; chunks of zeros are left out of the archive."""
    xva = export(here, "vm-export=.*", suffix, "compress=" + compress)
    shell(command, file=str(xva))
    disks = {}
    for folder in shell.folder.glob("Ref:*"):
        image = shell.folder / (folder.name + ".img")
        shell('''for chunk in "$folder"/????????; do
                     number=$(basename "$chunk" | sed 's/^0*\\(.\\)/\\1/')
                     dd if="$chunk" of="$image" bs=1M seek="$number" conv=notrunc status=none
                 done''', folder=str(folder), image=str(image))
        disks[image.stat().st_size] = image
    assert sorted(disks) == sorted(SIZES.values())
    for name, size in SIZES.items():
        assert_same(disks[size], source(here, shell, name))
    assert (shell.folder / "ova.xml").exists()


def test_xva_img_gives_the_disks_of_an_xva(here, shell):
    """With hashes as hosts wrote them before 2019: the tool's release at hand knows no newer."""
    here.sim.fault("sha1_checksums")
    xva = export(here, "vm-export=.*", "xva")
    shell('tar -xf "$file"', file=str(xva))
    listed = sorted(shell.folder.glob("Ref:*"))
    assert len(listed) == 2
    for folder in listed:
        image = shell.folder / (folder.name + ".img")
        shell('xva-img -p disk-export "$folder/" "$image"', folder=str(folder), image=str(image))
        (name,) = [name for name in SIZES if SIZES[name] == image.stat().st_size]
        assert_same(image, source(here, shell, name))


def test_a_raw_disk_is_the_disk_and_converts(here, shell):
    raw = export(here, "vdi-export=.*", "raw")
    assert_same(raw, source(here, shell, "root"))
    shell('qemu-img convert -f raw -O qcow2 "$file" disk.qcow2', file=str(raw))
    assert "Images are identical" in shell(
        'qemu-img compare -f raw -F qcow2 "$file" disk.qcow2', file=str(raw))
    sizes = [line for line in (raw.parent / "DISK-xvda" / "vdi.cfg").read_text().splitlines()
             if line.startswith("virtual_size=")]
    assert sizes == ["virtual_size=%d" % raw.stat().st_size]  # for xe vdi-create


def test_a_vhd_is_sound_and_converts_to_the_disk(here, shell):
    vhd = export(here, "vdi-export=.*", "vhd", "vdi_export_format=vhd")
    root = source(here, shell, "root")
    assert "Images are identical" in shell(
        'qemu-img compare -f vpc -F raw "$file" root.source', file=str(vhd))
    shell('qemu-img convert -f vpc -O raw "$file" disk.img', file=str(vhd))
    assert_same(shell.folder / "disk.img", root)


@pytest.mark.parametrize("line", ["vm-export=.*", "vdi-export=.*"])
def test_sha256sum_finds_every_file_as_written_and_each_change(here, shell, line):
    suffix = "xva" if line.startswith("vm") else "raw"
    folder = export(here, line, suffix).parent
    told = shell("sha256sum --strict -c SHA256SUMS", cwd=folder).splitlines()
    files = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    assert sorted(told) == sorted(
        "%s: OK" % name for name in files if name not in ("SHA256SUMS", "success"))
    for name in ("%s.%s" % (NAME, suffix), "DISK-xvda/vdi.cfg", "vm-metadata.xml"):
        good = (folder / name).read_bytes()
        (folder / name).write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        with pytest.raises(subprocess.CalledProcessError):
            shell("sha256sum --quiet -c SHA256SUMS 2>&1", cwd=folder)
        (folder / name).write_bytes(good)


def test_vm_metadata_is_the_ova_xml_for_people(here, shell):
    xva = export(here, "vm-export=.*", "xva")
    shell('tar -xf "$file" ova.xml', file=str(xva))
    path = xva.parent / "vm-metadata.xml"
    told = ["".join(ElementTree.parse(str(file)).getroot().itertext()) for file in (
        path, shell.folder / "ova.xml")]
    for text in ("Größe & <Art>", "root", "data"):
        assert text in told[0]
        assert text in told[1]
    assert max(map(len, path.read_text(encoding="utf-8").splitlines())) < 300


def test_the_pool_database_dump_is_well_formed_and_tells_the_pool(here):
    here.configure("vm-export=.*", "pool_db_backup=1")
    result = here.run()
    assert result.status == 0, result
    (dump,) = here.backups.glob("METADATA_*/pool_db_*.dump")
    assert dump.stat().st_mode & 0o777 == 0o600
    root = ElementTree.parse(str(dump)).getroot()
    assert root.tag == "database"
    tables = {table.get("name"): table for table in root.iter("table")}
    assert [row.get("name_label") for row in tables["pool"]] == ["Büro & Co"]
    assert NAME in [row.get("name__label") for row in tables["VM"]]

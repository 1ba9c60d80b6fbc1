# SPDX-License-Identifier: GPL-3.0-or-later
"""vdi-export: the first disk of a VM, raw or vhd, and what is beside it."""
import shutil
import subprocess

import pytest
from simulator.pool import MIB, Pool, cd, disk
from support.harness import vmbackup

RAW = "/export_raw_vdi"


def disks_of_a_vm(*disks, name="web", **fields):
    pool = Pool()
    pool.vm(name, disks=disks, **fields)
    pool.vm("db", disks=[disk(MIB, seed=9)])
    return pool


@pytest.mark.parametrize("disks, chosen", [
    ([disk(MIB, "a"), disk(MIB, "b")], "a"),
    ([disk(MIB, "a", device="xvdb", userdevice="1"),
      disk(MIB, "b", device="xvda", userdevice="2")], "b"),
    ([disk(MIB, "a", device="hda", userdevice="0")], "a"),
    ([disk(MIB, "a", device="sda", userdevice="3")], "a"),
    ([disk(MIB, "a", device="", userdevice="0"), disk(MIB, "b", device="", userdevice="1")], "a"),
    ([disk(MIB, "a", device="xvdc", userdevice="2")], None),
])
def test_the_first_disk_is_exported(turn, disks, chosen):
    here = turn(disks_of_a_vm(*disks, cds=[cd("x.iso", userdevice="9", device="xvdz")]))
    here.configure("vdi-export=web")
    result = here.run()
    if chosen is None:
        assert result.status == 2
        assert result.has("no first disk")
        assert not here.folders("web", marked=False)
    else:
        assert result.status == 0, result
        (vdi,) = [vdi for _, vdi in here.sim.disks_of("web") if vdi["name_label"] == chosen]
        source = here.path / "source"
        here.sim.disk_bytes_to(vdi["uuid"], source)
        assert here.file("web", "raw").read_bytes() == source.read_bytes()
    here.assert_pool_is_clean()


def test_the_snapshot_is_called_by_vm_and_disk_and_the_disk_verifies(turn):
    here = turn(disks_of_a_vm(disk(MIB, "root", seed=1), name="web one"))
    here.configure("vdi-export=web one")
    result = here.run()
    assert result.status == 0, result
    assert result.has("VmBackup vdi-export web one - ***Success*** t:0")
    assert [call["args"][2] for call in here.sim.calls()
            if call["method"] == "VDI.set_name_label"] == ["SNAP_web-one_root"]
    assert vmbackup("verify", here.config).status == 0
    here.assert_pool_is_clean()


@pytest.mark.skipif(shutil.which("qemu-img") is None, reason="no qemu-img here")
@pytest.mark.parametrize("size, sparse", [(5 * MIB, None), (9 * MIB + 512, [0, 8]), (4 * MIB, [])])
def test_qemu_img_finds_the_vhd_sound_and_equal_to_the_disk(turn, size, sparse):
    here = turn(disks_of_a_vm(disk(size, seed=3, sparse=sparse)))
    here.configure("vdi-export=web", "vdi_export_format=vhd")
    assert here.run().status == 0
    source = here.path / "source"
    here.sim.disk_bytes_to(here.sim.disks_of("web")[0][1]["uuid"], source)
    export = str(here.file("web", "vhd"))
    subprocess.run(["qemu-img", "info", "-f", "vpc", export], check=True,
                   stdout=subprocess.DEVNULL)
    subprocess.run(["qemu-img", "compare", "-f", "vpc", "-F", "raw", export, str(source)],
                   check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("form", ["raw", "vhd"])
def test_an_error_page_in_place_of_the_disk_leaves_the_older_backup(turn, form):
    here = turn(disks_of_a_vm(disk(3 * MIB, seed=1)))
    here.configure("vdi-export=web", "vdi_export_format=" + form, "max_backups=1")
    assert here.run().status == 0
    (good,) = here.folders("web")
    here.sim.fault("export_fail", path=RAW, error_info=["SR_BACKEND_FAILURE_46", "", "x", ""])
    result = here.run()
    assert result.status == 2
    assert result.has("SR_BACKEND_FAILURE_46")
    assert here.folders("web", marked=False) == [good]
    here.assert_pool_is_clean()


def test_backups_of_the_vm_and_of_its_disk_are_one_series(turn):
    here = turn(disks_of_a_vm(disk(2 * MIB, seed=1)))
    suffixes = []
    for line in ("vm-export=web:2", "vdi-export=web:2", "vm-export=web:2"):
        here.configure(line)
        assert here.run().status == 0
    for folder in here.folders("web", marked=False):
        suffixes += [path.suffix for path in folder.glob("web.*")]
    assert suffixes == [".raw", ".xva"]

# SPDX-License-Identifier: GPL-3.0-or-later
"""A disk of the snapshot that is gone before or while it is exported: no backup lacks it unseen.

XAPI leaves a VDI that was destroyed out of the export, which then is whole in itself (VDI.destroy
takes the VBD with it); so nothing in the archive tells of it.
"""
import os
import shutil

import pytest
from simulator.pool import MIB, Pool, disk
from support.harness import finish, vmbackup
from support.world import destroy_as_an_administrator, wait_until


def server():
    pool = Pool()
    pool.vm("web", power_state="Running", disks=[
        disk(2 * MIB, name, seed=name) for name in ("root", "data", "logs")])
    return pool


def destroy_snapshot_of(site, name):
    destroy_as_an_administrator(site, [
        ref for ref, vdi in site.sim.records("VDI").items()
        if vdi["is_a_snapshot"] and vdi["name_label"] == name])


@pytest.mark.parametrize("compress, suffix", [("False", "xva"), ("gzip", "xva.gz"),
                                              ("zstd", "xva.zst")])
@pytest.mark.parametrize("fault, seen", [
    (("rpc_hang", {"method": "VM.add_to_other_config"}), "VM.add_to_other_config"),
    (("export_slow_start", {"path": "/export_metadata"}), "GET /export_metadata")])
def test_a_disk_that_somebody_destroys_before_the_export(site, fault, seen, compress, suffix):
    if compress == "zstd" and not shutil.which("zstd"):
        pytest.skip("zstd is not installed")
    here = site(server())
    here.configure("vm-export=web", "max_backups=1", "compress=" + compress)
    assert here.run().status == 0
    (good,) = here.folders("web")
    here.sim.reset_calls()
    number = here.sim.fault(fault[0], seconds=3600, times=1, **fault[1])
    process = here.start()
    wait_until(lambda: seen in here.sim.methods())
    destroy_snapshot_of(here, "data")
    here.sim.clear_faults(number)
    result = finish(process)
    assert result.status == 2, result
    assert result.has("a disk of the snapshot is not in it") or result.has("lacks the disk xvdb")
    assert here.folders("web", marked=False) == [good]
    here.assert_pool_is_clean()
    assert vmbackup("verify", here.config).status == 0
    assert (good / ("web." + suffix)).stat().st_size > 2 * MIB


def test_two_runs_into_two_places(site, tmp_path):
    """Each has a lock of its own. The second takes the snapshot of the first for a leftover; the
    first has to notice, and the second to leave it alone while it is being exported."""
    here = site(server())
    here.configure("vm-export=web", "max_backups=1")
    assert here.run().status == 0
    (good,) = here.folders("web")
    other = tmp_path / "other"
    other.mkdir()
    here.sim.reset_calls()
    number = here.sim.fault("export_silence", vm="web", after=3 * MIB, seconds=3600, times=1)
    first = here.start()
    wait_until(lambda: "GET /export" in here.sim.methods())
    taken = {ref for ref, vdi in here.sim.records("VDI").items() if vdi["is_a_snapshot"]}
    second = here.run("backup_dir=%s" % other, constants={"DETACH_PAUSES": (0.1, 0.1)})
    assert second.status == 1, second
    assert second.has("could not be destroyed")
    assert taken <= set(here.sim.records("VDI")), "not even a disk that is already exported"
    here.sim.clear_faults(number)
    first = finish(first)
    assert first.status == 0, first
    assert here.folders("web") != [good]
    for top in (here.backups, other):
        assert vmbackup("verify", top).status == 0
        (folder,) = (top / "web").iterdir()
        assert len([name for name in os.listdir(str(folder)) if name.startswith("DISK-")]) == 3
    here.assert_pool_is_clean()

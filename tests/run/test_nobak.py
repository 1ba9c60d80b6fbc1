# SPDX-License-Identifier: GPL-3.0-or-later
"""[NOBAK] in a disk's name: it is left out of the VM's backup, on hosts of any age."""
import hashlib
import shutil
import subprocess

import pytest
from simulator.pool import MIB, Pool, disk
from support.harness import vmbackup
from support.world import disks_in

SCRATCH = "[NOBAK] scratch"


def pool_with_scratch():
    pool = Pool()
    pool.vm("web", power_state="Running", disks=[
        disk(2 * MIB + 512, "root", seed=1, device="xvda"),
        disk(5 * MIB, SCRATCH, seed=2, device="xvdb"),
        disk(MIB, "data", seed=3, device="xvdc")])
    return pool


@pytest.fixture(params=["ignore_vdis", "before 21.4"])
def here(request, turn):
    made = turn(pool_with_scratch())
    if request.param == "before 21.4":
        made.sim.fault("snapshot_no_ignore_vdis")
    made.old = request.param == "before 21.4"
    made.configure("vm-export=web")
    return made


def originals(sim):
    return {record["name_label"]: (ref, sim.disk_sha256(record["uuid"]))
            for ref, record in sim.records("VDI").items() if not record["is_a_snapshot"]}


def test_a_marked_disk_is_in_no_backup_and_is_not_harmed(here):
    before = originals(here.sim)
    result = here.run()
    assert result.status == 0, result
    disks = disks_in(here.file("web").read_bytes()).values()
    found = {hashlib.sha256(data).hexdigest() for data in disks}
    assert found == {before["root"][1], before["data"][1]}
    assert originals(here.sim) == before
    destroyed = [item["record"] for item in here.sim.destroyed() if item["class"] == "VDI"]
    assert all(record["is_a_snapshot"] for record in destroyed)
    assert sorted(record["name_label"] for record in destroyed) == sorted(
        ["root", "data"] + [SCRATCH] * here.old)
    here.assert_pool_is_clean()
    assert vmbackup("verify", here.config).status == 0


def test_the_host_is_asked_to_leave_it_out_or_the_disk_goes_before_the_export(here):
    """By snapshot alone it never comes to be; else its snapshot is destroyed, and only that."""
    before = {record["name_label"]: ref for ref, record in here.sim.records("VDI").items()}
    assert here.run().status == 0
    calls = here.sim.calls()
    snapshots = [call for call in calls if call["method"] == "Async.VM.snapshot"]
    assert snapshots[0]["args"][3] == [before[SCRATCH]]
    assert [len(call["args"]) for call in snapshots] == ([4, 3] if here.old else [4])
    order = [call["method"] for call in calls]
    early = [call["args"][1] for call in calls[:order.index("GET /export")]
             if call["method"] == "VDI.destroy"]
    gone = {item["ref"]: item["record"] for item in here.sim.destroyed()}
    assert [gone[ref]["snapshot_of"] for ref in early] == [before[SCRATCH]] * here.old


def test_the_log_tells_it(here):
    result = here.run()
    assert result.has("web: disk xvdb (%s) is left out" % SCRATCH)
    (folder,) = here.folders("web")
    assert sorted(path.name for path in folder.glob("DISK-*")) == ["DISK-xvda", "DISK-xvdc"]
    here.sim.set("VDI", SCRATCH, "name_label", "scratch")
    result = here.run()
    assert result.status == 0, result
    assert not result.has("left out")
    assert (here.folders("web")[-1] / "DISK-xvdb").is_dir()


def test_preview_tells_it_and_does_not_count_it(here):
    result = here.run("preview")
    assert result.status == 0, result
    assert result.has("web: disk xvdb (%s) is left out" % SCRATCH)
    assert result.has("together about 3.0 MiB to expect")


@pytest.mark.parametrize("compress, suffix, unpack", [
    ("False", "xva", 'tar -xf "$1"'), ("gzip", "xva.gz", 'tar -xzf "$1"'),
    ("zstd", "xva.zst", 'zstd -dcq "$1" | tar -xf -')])
def test_the_tools_find_nothing_of_it_in_an_xva(here, tmp_path, compress, suffix, unpack):
    if suffix.endswith("zst") and not shutil.which("zstd"):
        pytest.skip("zstd is not installed")
    here.sim.fault("sha1_checksums")  # the xva-img at hand knows no newer ones
    assert here.run("compress=" + compress).status == 0
    folder = tmp_path / "unpacked"
    folder.mkdir()
    subprocess.run(["sh", "-euc", unpack, "sh", str(here.file("web", suffix))], cwd=str(folder),
                   check=True)
    disks = sorted(folder.glob("Ref:*"))
    assert len(disks) == 2
    assert SCRATCH not in (folder / "ova.xml").read_text()
    if shutil.which("xva-img"):
        sizes = []
        for item in disks:
            image = folder / (item.name + ".img")
            subprocess.run(["xva-img", "-p", "disk-export", "%s/" % item, str(image)], check=True,
                           stdout=subprocess.DEVNULL)
            sizes.append(image.stat().st_size)
        assert sorted(sizes) == [MIB, 2 * MIB + 512]


@pytest.mark.parametrize("times", [1, 1000])
def test_a_disk_that_the_old_host_will_not_let_go(turn, times):
    """That is an error of this VM, nothing is exported with the disk in it, and the original is not
    touched."""
    pool = pool_with_scratch()
    pool.vm("db", disks=[disk(MIB, "db", seed=4)])
    here = turn(pool)
    here.sim.fault("snapshot_no_ignore_vdis")
    here.sim.fault("vdi_destroy_error", vdi=SCRATCH, times=times,
                   error_info=["SR_BACKEND_FAILURE_46"])
    here.configure("vm-export=web", "vm-export=db")
    before = originals(here.sim)
    result = here.run()
    assert result.status == 2, result
    (line,) = [line for line in result.lines if "vm-export web - ***ERROR***" in line]
    assert "SR_BACKEND_FAILURE_46" in line
    assert result.lines[-1] == "VmBackup ended - **ERRORS DETECTED** - S:1 W:0 E:1"
    assert here.sim.methods().count("GET /export") == 1, "that of db"
    assert not here.folders("web", marked=False)
    assert len(here.folders("db")) == 1
    assert originals(here.sim) == before
    if times > 1:  # the snapshot is still there, and goes with the next run
        assert here.snapshots() == ["RESTORE_web"]
        here.sim.clear_faults("vdi_destroy_error")
        assert here.run().status == 0
    here.assert_pool_is_clean()


def test_all_disks_marked(turn):
    pool = Pool()
    pool.vm("web", disks=[disk(MIB, SCRATCH, seed=1)])
    here = turn(pool)
    here.configure("vm-export=web")
    before = originals(here.sim)
    result = here.run()
    assert result.status == 0, result
    assert disks_in(here.file("web").read_bytes()) == {}
    assert originals(here.sim) == before
    assert vmbackup("verify", here.config).status == 0


@pytest.mark.parametrize("name", ["nobak scratch", "[nobak]", "NOBAK", "[NO BAK]", "[NOBAK"])
def test_other_words_leave_nothing_out(turn, name):
    pool = Pool()
    pool.vm("web", disks=[disk(MIB, name, seed=1)])
    here = turn(pool)
    here.configure("vm-export=web")
    result = here.run()
    assert result.status == 0, result
    assert len(disks_in(here.file("web").read_bytes())) == 1


def test_vdi_export_of_a_marked_disk_is_refused_before_anything_is_done(turn):
    pool = Pool()
    pool.vm("web", disks=[disk(MIB, SCRATCH, seed=1), disk(MIB, "data", seed=2)])
    here = turn(pool)
    here.configure("vdi-export=web")
    assert here.run("preview").status == 2
    result = here.run()
    assert result.status == 2, result
    assert result.has("vdi-export web - ***ERROR*** its first disk is marked [NOBAK]")
    assert "Async.VDI.snapshot" not in here.sim.methods()
    assert not here.folders("web", marked=False)

# SPDX-License-Identifier: GPL-3.0-or-later
"""preview: upstream's block, what a run would do, and nothing changed on pool or disk."""

import pytest
from simulator.client import Simulator
from simulator.pool import GIB, MIB, Pool, cd, disk, snapshot, vif
from support.harness import ROOT, Site, vmbackup
from support.world import everything_below

DATABASE = ROOT.parent / "shared" / "data" / "real-pool-database.xml"
CLASSES = ("VM", "VDI", "VBD", "VIF", "SR", "PBD", "host", "pool", "network", "task", "session")


def pool_state(sim):
    return {name: sim.records(name) for name in CLASSES}


def some_vms():
    pool = Pool()
    pool.vm("web", power_state="Running", disks=[disk(3 * MIB, device="xvda"), disk(
        5 * MIB, "[NOBAK] scratch", device="xvdb")], vifs=[vif()], snapshots=[snapshot("mine")])
    for name in ("PROD-b", "PROD-a", "DEV-RH7", "DEV-RH6", "Zoe", "äther", "twin", "twin"):
        pool.vm(name, disks=[disk(2 * MIB)])
    pool.vm("no disk")
    pool.template("PROD-template")
    return pool


def test_the_block_of_upstream_to_the_letter(turn):
    here = turn(some_vms())
    here.configure("vm-export=PROD-b", "vm-export=DEV.*:3", "vm-export=PROD.*", "vm-export=gone",
                   "vdi-export=web:2", "vdi-export=Zoe", "exclude=nobody", "exclude=DEV-RH6",
                   "compress=zstd", "max_backups=9", "vdi_export_format=VHD", "pool_db_backup=1")
    result = here.run("preview")
    begin = result.lines.index("VmBackup.py running with these settings:")
    assert result.lines[begin:begin + 13] == [
        "VmBackup.py running with these settings:",
        "  backup_dir        = %s" % here.backups,
        "  status_log        = %s" % here.status_log,
        "  compress          = zstd",
        "  max_backups       = 9",
        "  vdi_export_format = vhd",
        "  pool_db_backup    = 1",
        "  exclude (cnt)= 2",
        "  exclude: DEV-RH6, nobody",
        "  vdi-export (cnt)= 2",
        "  vdi-export: Zoe, web:2",
        "  vm-export (cnt)= 4",
        "  vm-export: DEV-RH7:3, PROD-a, PROD-b, gone",
    ]
    assert "ERROR - vm(s) List does not exist: gone" in result.lines[begin + 13:]
    assert "***WARNING - vm(s) Exclude does not exist: nobody" in result.lines[begin + 13:]
    assert result.status == 2, result


def test_the_block_with_nothing_given_but_a_name(turn, tmp_path):
    here = turn(some_vms())
    result = vmbackup(here.sim.password, "web", "preview", "host=" + here.sim.url,
                      "backup_dir=%s" % tmp_path)
    begin = result.lines.index("VmBackup.py running with these settings:")
    assert result.lines[begin + 2:begin + 13] == [
        "  status_log        = /snapshots/NAUbackup/status.log",
        "  compress          = False",
        "  max_backups       = 4",
        "  vdi_export_format = raw",
        "  pool_db_backup    = 0",
        "  exclude (cnt)= 0",
        "  exclude:",
        "  vdi-export (cnt)= 0",
        "  vdi-export:",
        "  vm-export (cnt)= 1",
        "  vm-export: web",
    ]
    assert result.lines[-1] == "SUCCESS preview parameters"
    assert result.status == 0, result


@pytest.mark.parametrize("lines, status, last", [
    (["vm-export=web", "vdi-export=Zoe"], 0, "SUCCESS preview parameters"),
    (["vm-export=web", "vm-export=x.*"], 1,
     "SUCCESS preview parameters - WARNINGS found (see above)"),
    (["vm-export=web", "vm-export=gone"], 2, "ERROR preview parameters"),
    (["vm-export=twin"], 2, "ERROR preview parameters"),
    (["vdi-export=no disk"], 2, "ERROR preview parameters"),
    (["vm-export=web", "max_backups=0"], 3, "ERROR - "),
    (["vm-export=w("], 3, "***ERROR - invalid regex: vm-export=w("),
])
def test_preview_ends_as_the_run_would(turn, lines, status, last):
    here = turn(some_vms())
    here.configure(*lines)
    result = here.run("preview")
    assert result.status == status, result
    assert result.lines[-1].startswith(last)
    assert here.run().status == status


def test_vms_that_nothing_chose_are_listed(turn):
    here = turn(some_vms())
    here.configure("vm-export=PROD.*", "exclude=PROD-b", "vdi-export=web", "exclude=web")
    left = "VMs-not-in-backup: DEV-RH6, DEV-RH7, PROD-b, Zoe, no disk, twin, web, äther"
    assert left in here.run("preview").lines
    here.configure("vm-export=")
    assert [line.strip() for line in here.run("preview").lines
            if line.startswith("VMs-not-in-backup")] == ["VMs-not-in-backup:"]


def test_preview_changes_nothing(turn):
    """With all there that a run would remove: old, unfinished, unknown folders, own snapshots."""
    pool = some_vms()
    pool.vm("left", disks=[disk(MIB)], snapshots=[
        snapshot("RESTORE_left", other_config={"vmbackup": "1"})])
    here = turn(pool)
    for number in range(1, 7):
        folder = here.backups / "web" / ("backup-2026-01-0%d-(02:00:00)" % number)
        folder.mkdir(parents=True)
        (folder / "web.xva").write_bytes(b"x" * number)
        (folder / "success").write_text("")
    unfinished = here.backups / "web" / "backup-2026-01-09-(02:00:00)"
    unfinished.mkdir()
    (unfinished / "web.xva.partial").write_bytes(b"half")
    (here.backups / "web" / "@keep").mkdir()
    here.configure("vm-export=.*", "exclude=twin", "pool_db_backup=1", "pre_clean=True",
                   "report_json=%s" % (here.path / "report.json"))
    before, files = pool_state(here.sim), everything_below(here.path)
    here.sim.reset_calls()
    result = here.run("preview")
    assert result.status == 0, result
    assert pool_state(here.sim) == before
    assert everything_below(here.path) == files
    for method in here.sim.methods():
        assert method.startswith("session.log") or ".get_" in method
    assert result.has("web: has 6 backups, keeps 4, would delete backup-2026-01-01-(02:00:00),"
                      " backup-2026-01-02-(02:00:00), backup-2026-01-03-(02:00:00)")
    assert result.has("web: would remove the unfinished backup backup-2026-01-09-(02:00:00)")
    assert result.has("left out [NOBAK]")


def test_a_disk_too_small_is_foretold(turn):
    pool = Pool()
    pool.vm("web", disks=[disk(4 << 50, content="zeros")])
    here = turn(pool)
    here.configure("vm-export=web", "compress=zstd")
    result = here.run("preview", "space_check=False")
    assert result.status == 0
    assert result.has("free: the last ones may not fit")
    result = here.run("preview", "compress=False")
    assert result.status == 2, result
    assert result.has("ERROR - web: ")
    assert result.has("4096.0 TiB")
    assert here.snapshots() == []


def test_an_iso_whose_storage_is_unplugged_is_foretold(turn):
    pool = Pool()
    pool.vm("web", disks=[disk(MIB)], cds=[cd("tools.iso")])
    here = turn(pool)
    here.configure("vm-export=web")
    assert here.run("preview").status == 0
    iso = here.sim.ref("SR", "ISOs")
    for pbd in here.sim.records("PBD").values():
        if pbd["SR"] == iso:
            here.sim.set("PBD", pbd["uuid"], "currently_attached", False)
    result = here.run("preview")
    assert result.status == 1, result
    assert result.has("***WARNING - web: the ISO tools.iso in its drive")


def calls_of_preview(tmp_path, vms, line):
    """The methods that a preview calls in a pool of so many VMs."""
    pool = Pool()
    for number in range(vms):
        pool.vm("vm%05d" % number)
    with Simulator.start(pool) as sim:
        here = Site(sim, tmp_path)
        here.configure(line)
        result = here.run("preview", timeout=500)
        assert result.status == 0, result
        return sim.methods()


@pytest.mark.timeout(600)  # 10,000 records are 50 MB of XML
def test_the_number_of_calls_does_not_depend_on_the_pool(tmp_path):
    few = calls_of_preview(tmp_path, 60, "vm-export=.*")
    assert len(few) < 12
    assert calls_of_preview(tmp_path, 10000, "vm-export=.*") == few


def test_what_one_vm_costs_does_not_depend_on_the_pool(tmp_path):
    few = calls_of_preview(tmp_path, 2, "vm-export=vm00001")
    assert calls_of_preview(tmp_path, 500, "vm-export=vm00001") == few


@pytest.mark.skipif(not DATABASE.exists(), reason="no ../shared/data/real-pool-database.xml here")
def test_a_real_pool(tmp_path):
    with Simulator.start(database=DATABASE) as sim:
        here = Site(sim, tmp_path)
        here.configure("vm-export=.*")
        own = sorted(vm["name_label"] for vm in sim.records("VM").values()
                     if not (vm["is_a_template"] or vm["is_a_snapshot"] or vm["is_control_domain"]))
        assert len(own) == 2
        before = pool_state(sim)
        result = here.run("preview", "space_check=False")
        assert "  vm-export: %s" % ", ".join(own) in result.lines
        assert "  vm-export (cnt)= 2" in result.lines
        assert result.status in (0, 1), result
        assert pool_state(sim) == before


def test_size_and_way_of_each_vm_are_shown(turn):
    pool = Pool()
    pool.vm("web", disks=[disk(GIB, content="zeros")])
    here = turn(pool)
    here.configure("vm-export=web")
    result = here.run("preview")
    assert result.has("web: vm-export, chosen by its name; halted; disks: xvda 1.0 GiB")
    assert result.lines[-2].startswith("together about ")

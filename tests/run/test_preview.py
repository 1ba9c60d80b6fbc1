# SPDX-License-Identifier: GPL-3.0-or-later
"""preview: upstream's block, what a run would do, and nothing changed on pool or disk."""
import os
import re
import shutil

import pytest
from simulator.client import Simulator
from simulator.pool import GIB, MIB, Pool, disk, snapshot, vif
from support.harness import ROOT, Site, vmbackup
from support.world import everything_below

DATABASE = ROOT.parent / "shared" / "data" / "real-pool-database.xml"
STATUS_LOG = "/snapshots/NAUbackup/status.log"
CLASSES = ("VM", "VDI", "VBD", "VIF", "SR", "PBD", "host", "pool", "network", "task", "session")


def pool_state(sim):
    return {name: sim.records(name) for name in CLASSES}


def only_looks(sim):
    """Whether nothing was called that changes anything on the pool."""
    return all(method.startswith("session.log") or ".get_" in method for method in sim.methods())


def rows_of(result):
    """{VM: {head of a column: text}} of preview's table, whose columns two blanks set apart."""
    heads = ["VM", "kind", "disks", "to expect", "there/kept", "would go"]
    lines = [re.split(" {2,}", line) for line in result.lines]
    begin = lines.index(heads) + 1
    rows = [dict(zip(heads, cells)) for cells in lines[begin:] if len(cells) == len(heads)]
    assert all(len(line) <= 100 for line in result.lines[begin:begin + len(rows)])
    return {row["VM"]: row for row in rows}


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
        "  status_log        = %s" % (STATUS_LOG if os.path.isdir(os.path.dirname(STATUS_LOG))
                                      else "none"),
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


@pytest.mark.parametrize("lines, status, text", [
    (["vm-export=web", "vdi-export=Zoe"], 0, "SUCCESS preview parameters"),
    (["vm-export=Zoe", "colour=red", "ignore_extra_keys=True"], 0, "ignoring config key: colour"),
    (["vm-export=Zoe", "vm-export=x.*:3"], 1, "***WARNING - vm not found: vm-export=x.*:3"),
    (["vm-export=Zoe", "vdi-export=x."], 1, "***WARNING - vm not found: vdi-export=x."),
    (["vm-export=Zoe", "exclude=x1", "exclude=y.*"], 1,
     "***WARNING - vm(s) Exclude does not exist: x1 y.*"),
    (["vm-export=Zoe", "exclude="], 1, "***WARNING - empty exclude= is passed over"),
    (["vm-export=Zoe", "vdi-export="], 1, "***WARNING - empty vdi-export= is passed over"),
    (["vm-export=Zoe", "max_backups=2", "max_backups=3"], 1, "max_backups is given twice"),
    (["vm-export=x1", "vm-export=x2"], 2, "ERROR - vm(s) List does not exist: x1 x2"),
    (["vm-export=Zoe", "vm-export=PROD-template"], 2,
     "ERROR - vm(s) List does not exist: PROD-template"),
    (["vm-export=Zoe", "vm-export=twin"], 2, "*** ERROR: duplicate VM name found: twin"),
    (["vm-export=Zoe", "vdi-export=no disk"], 2, "no first disk"),
    (["vm-export=Zoe", "vm-export=a[b"], 3, "***ERROR - invalid regex: vm-export=a[b"),
    (["vm-export=Zoe", "max_backups=0"], 3, "max_backups=0"),
    (["vm-export=Zoe:0"], 3, "vm-export=Zoe:0"),
    (["vm-export=Zoe", "colour=red"], 3, "unknown setting colour"),
    ([], 3, "no VMs loaded"),
])
def test_preview_ends_as_the_run_would(turn, lines, status, text):
    here = turn(some_vms())
    here.configure(*lines)
    here.sim.reset_calls()
    result = here.run("preview")
    assert result.status == status, result
    assert result.has(text), result
    assert result.lines[-1].startswith(
        ("SUCCESS preview parameters", "SUCCESS preview parameters - WARNINGS found (see above)",
         "ERROR preview parameters", ("ERROR - ", "***ERROR - "))[status])
    # A regular expression that does not compile may still be the name of a VM.
    assert status != 3 or "invalid regex" in text or not here.sim.calls()
    assert only_looks(here.sim)
    assert here.run().status == status
    assert bool(here.folders("Zoe") + here.folders("web")) == (
        status < 3 and "vm-export=x1" not in lines)


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
    after = everything_below(here.path)
    for path in (str(here.backups), os.path.join(str(here.backups), ".")):
        # One probe of the file system, gone by now, may have changed the folder's times.
        files[path], after[path] = files[path][:4], after[path][:4]
    assert after == files
    assert only_looks(here.sim)
    assert rows_of(result)["web"]["there/kept"] == "6/4"
    assert result.has("web: would delete %s (" % ", ".join(
        "backup-2026-01-0%d-(02:00:00)" % day for day in (1, 2, 3)))
    assert result.has("web: would remove the unfinished backup backup-2026-01-09-(02:00:00)")
    assert result.has("web: disk xvdb ([NOBAK] scratch) is left out")


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
        assert here.run().status in (0, 2)
        assert not [name for name in here.snapshots() if name.startswith("RESTORE_")]


def test_the_table_tells_kind_disks_and_size_of_each_vm(turn):
    pool = Pool()
    pool.vm("web", disks=[disk(GIB, content="zeros")])
    here = turn(pool)
    here.configure("vm-export=web")
    result = here.run("preview")
    assert rows_of(result) == {"web": {
        "VM": "web", "kind": "vm-export", "disks": "1", "to expect": "1.0 GiB",
        "there/kept": "0/1", "would go": "-"}}
    assert result.lines[-3].startswith("together about 1.0 GiB to expect, ")
    assert re.match("pool .+, host .+, parallel=1, mail: none, report", result.lines[-2])


# --- what is said of each VM, and that the run does as it said ------------------------------------

HOUR = "(02:00:00)"


def four_vms():
    pool = Pool()
    pool.vm("web", power_state="Running", disks=[
        disk(3 * MIB + 512, "root", seed=1, device="xvda"), disk(MIB, "data", device="xvdb")])
    pool.vm("web-2", power_state="Suspended", disks=[disk(2 * MIB, seed=2)])
    pool.vm("db", disks=[disk(4 * MIB, seed=3, device="")])
    pool.vm("empty")
    return pool


def leave(here, vm, day, suffix="xva", size=5, marker="success"):
    """A backup of this January, unlike any that a run makes in its size."""
    folder = here.backups / vm / ("backup-2026-01-%02d-%s" % (day, HOUR))
    folder.mkdir(parents=True)
    with (folder / ("%s.%s" % (vm, suffix))).open("wb") as file:
        file.truncate(size)
    if marker:
        (folder / marker).write_text("")
    return folder.name


def lines_of(result, vm):
    return [line[len(vm) + 2:] for line in result.lines if line.startswith(vm + ": ")]


@pytest.mark.parametrize("lines, chosen", [
    (["vm-export=web:3"], {"web": "vm-export 3"}),
    (["vm-export=web.*:3"], dict.fromkeys(("web", "web-2"), "vm-export 3")),
    (["vm-export=.*:2", "vm-export=web:3"], {
        "web": "vm-export 3", "web-2": "vm-export 2", "db": "vm-export 2", "empty": "vm-export 2"}),
    (["vm-export=web.*:9", "vm-export=w.*:2"], dict.fromkeys(("web", "web-2"), "vm-export 2")),
    (["vm-export="], dict.fromkeys(("web", "web-2", "db", "empty"), "vm-export 4")),
    (["vdi-export=d.:2", "vm-export=.*:3", "exclude=(web|empty)"], {"db": "vdi-export 2"}),
])
def test_the_rule_that_chose_a_vm_shows_in_its_kind_and_number(turn, lines, chosen):
    here = turn(four_vms())
    here.configure(*lines)
    for vm in chosen:
        for day in range(1, 10):
            leave(here, vm, day)
    result = here.run("preview")
    assert result.status == 0, result
    assert {vm: "%s %s" % (row["kind"], row["there/kept"].split("/")[1])
            for vm, row in rows_of(result).items()} == chosen


def test_disks_and_sizes(turn):
    here = turn(four_vms())
    here.configure("vm-export=.*")
    result = here.run("preview")
    assert {vm: (row["disks"], row["to expect"]) for vm, row in rows_of(result).items()} == {
        "web": ("2", "4.0 MiB"), "web-2": ("1", "2.0 MiB"), "db": ("1", "4.0 MiB"),
        "empty": ("0", "0 bytes")}
    number = r"\d+(\.\d)? (bytes|[KMGT]iB)"
    assert re.match("together about 10.0 MiB to expect, %s free" % number, result.lines[-3])


@pytest.mark.parametrize("words, suffix, size, told", [
    (["compress=False"], "xva", 7 * MIB, "7.0 MiB"),         # what the last one had
    (["compress=gzip"], "xva.gz", 9 * MIB, "9.0 MiB"),
    (["compress=zstd"], "xva.zst", 9 * MIB, "9.0 MiB"),
    (["compress=zstd"], "xva", 9 * MIB, "4.0 MiB"),          # not that of another form
    (["compress=False"], "raw", 9 * MIB, "4.0 MiB"),
])
def test_the_size_to_expect_is_that_of_the_last_backup_of_the_form(turn, words, suffix, size, told):
    here = turn(four_vms())
    here.configure("vm-export=web")
    leave(here, "web", 1, suffix, 90 * MIB)
    leave(here, "web", 2, suffix, size)
    leave(here, "web", 3, suffix, 80 * MIB, marker=None)
    result = here.run("preview", *words)
    assert rows_of(result)["web"]["to expect"] == told, result


def test_the_size_of_a_raw_disk_is_its_own(turn):
    here = turn(four_vms())
    here.configure("vdi-export=web")
    leave(here, "web", 1, "raw", 90 * MIB)
    assert rows_of(here.run("preview"))["web"]["to expect"] == "3.0 MiB"
    vhd = here.run("preview", "vdi_export_format=vhd")
    assert rows_of(vhd)["web"]["to expect"] == "3.0 MiB"
    leave(here, "web", 2, "vhd", 8 * MIB)
    vhd = here.run("preview", "vdi_export_format=vhd")
    assert rows_of(vhd)["web"]["to expect"] == "8.0 MiB"


def test_what_the_disks_occupy_counts_where_the_host_tells_it(turn):
    pool = Pool()
    pool.vm("web", disks=[disk(GIB, "root", content="zeros"),
                          disk(2 * GIB, "more", content="zeros")])
    here = turn(pool)
    here.configure("vm-export=web")
    here.sim.set("VDI", "root", "physical_utilisation", 10 * MIB)
    here.sim.set("VDI", "more", "physical_utilisation", 3 * GIB)  # with its chain; or unknown, -1
    assert here.run("preview").has("about 2.0 GiB to expect")
    here.sim.set("VDI", "more", "physical_utilisation", -1)
    assert here.run("preview").has("about 2.0 GiB to expect")
    here.sim.set("VDI", "more", "physical_utilisation", 5 * MIB)
    assert here.run("preview").has("about 15.0 MiB to expect")


@pytest.mark.parametrize("keep, there, doomed", [
    (4, 0, 0), (4, 3, 0), (4, 4, 1), (4, 6, 3), (1, 1, 1), (1, 3, 3), (2, 1, 0)])
@pytest.mark.parametrize("pre_clean", ["False", "True"])
def test_the_run_deletes_what_preview_said_and_why(turn, keep, there, doomed, pre_clean):
    here = turn(four_vms())
    here.configure("vm-export=web:%d" % keep, "max_backups=9", "pre_clean=" + pre_clean)
    names = [leave(here, "web", day) for day in range(1, there + 1)]
    result = here.run("preview")
    assert lines_of(result, "web") == ["would delete %s (beyond last %d)" % (
        ", ".join(names[:doomed]), keep)] * bool(doomed), result
    row = rows_of(result)["web"]
    assert row["there/kept"] == "%d/%d" % (there, min(keep, there + 1))  # with the new one
    assert row["would go"] == ("%d backups" % doomed if doomed > 1 else
                               names[0][len("backup-"):] if doomed else "-")
    assert [folder.name for folder in here.folders("web")] == names
    assert here.run().status == 0
    left = [folder.name for folder in here.folders("web")]
    assert left[:-1] == names[doomed:]
    assert left[-1] not in names


def test_what_is_no_backup_is_neither_counted_nor_doomed(turn):
    here = turn(four_vms())
    here.configure("vm-export=web", "max_backups=1")
    (here.backups / "web" / "@snapshots").mkdir(parents=True)
    (here.backups / "web" / "old" / "success").mkdir(parents=True)
    (here.backups / "web" / "notes.txt").write_text("mine")
    leave(here, "web", 1, marker=None)
    row = rows_of(here.run("preview"))["web"]
    assert (row["there/kept"], row["would go"]) == ("0/1", "-")
    name = leave(here, "web", 2, marker="success_compress")
    row = rows_of(here.run("preview"))["web"]
    assert (row["there/kept"], row["would go"]) == ("1/1", name[len("backup-"):])


def test_backups_in_another_pattern_count_beside_those_in_the_usual_one(turn):
    here = turn(four_vms())
    here.configure("vm-export=web", "max_backups=2", "backup_dir_pattern=%Y%m%d-%H%M%S")
    usual = leave(here, "web", 2)
    for name in ("20260101-020000", "20260103-020000"):
        folder = here.backups / "web" / name
        folder.mkdir()
        (folder / "success").write_text("")
    result = here.run("preview")
    assert rows_of(result)["web"]["there/kept"] == "3/2"
    assert result.has("web: would delete 20260101-020000, %s (beyond last 2)" % usual)
    assert here.run().status == 0
    assert [folder.name for folder in here.folders("web")][0] == "20260103-020000"


@pytest.mark.parametrize("name, value, noted", [
    ("a.b", "a.b", True), ("a.b", r"a\.b", False), ("a.b", "a.*", False), ("a-b", "a-b", False),
    ("a+b c", "a+b c", True), ("a b.", "a b.", True)])
def test_a_name_that_is_a_regular_expression_is_noted(turn, name, value, noted):
    pool = Pool()
    pool.vm(name, disks=[disk(MIB)])
    here = turn(pool)
    here.configure("vm-export=" + value)
    result = here.run("preview")
    note = r"NOTE - vm-export=%s: .*name is meant.* regular expression" % re.escape(name)
    assert any(re.match(note, line) for line in result.lines) == noted, result
    assert list(rows_of(result)) == [name]
    assert result.status == 0


def test_several_warnings_of_one_preview_each_on_its_line_and_once(turn):
    pool = Pool()
    for vm in ("web", "db"):
        pool.vm(vm, disks=[disk(MIB)], cds=[{"iso": "tools of %s.iso" % vm}])
    here = turn(pool)
    here.configure("vm-export=.*", "exclude=nobody", "vm-export=gone.*")
    iso = here.sim.ref("SR", "ISOs")
    for pbd in here.sim.records("PBD").values():
        if pbd["SR"] == iso:
            here.sim.set("PBD", pbd["uuid"], "currently_attached", False)
    result = here.run("preview")
    warned = [line for line in result.lines if line.startswith("***WARNING - ")]
    assert len(warned) == len(set(warned)) == 4, result
    for vm in ("web", "db"):
        assert sum("the ISO tools of %s.iso in its drive" % vm in line for line in warned) == 1
        assert any("xe vm-cd-eject" in line for line in warned if vm + ":" in line)
    assert result.lines[-1] == "SUCCESS preview parameters - WARNINGS found (see above)"
    assert result.status == 1


def test_too_little_space_is_told_with_both_figures_and_space_check_passes_it_over(turn):
    here = turn(four_vms())
    here.sim.add_vm({"name": "huge", "disks": [disk(4 << 50, content="zeros")]})
    here.configure("vm-export=web", "vm-export=db", "vm-export=huge")
    free = shutil.disk_usage(str(here.backups)).free
    leave(here, "web", 1, "xva", 3 * free)
    result = here.run("preview")
    assert result.status == 2, result
    for vm, size in (("web", "[0-9.]+ [GT]iB"), ("huge", "4096 TiB")):
        (line,) = [line for line in result.lines if line.startswith("***ERROR - %s: " % vm)]
        assert re.search(size + " to expect, [0-9.]+ [GT]iB free", line)
    assert result.lines[-1].startswith("ERROR preview parameters: 2 VMs could not be backed up")
    result = here.run("preview", "space_check=False", "compress=zstd")
    assert result.status == 0, result
    assert here.snapshots() == []


def test_vms_of_which_each_fits_and_not_all_together_are_told_of(turn):
    here = turn(four_vms())
    here.configure("vm-export=web", "vm-export=db")
    free = shutil.disk_usage(str(here.backups)).free
    leave(here, "web", 1, "xva", free * 7 // 10)
    assert not here.run("preview").has("may not fit")
    leave(here, "db", 1, "xva", free * 7 // 10)
    result = here.run("preview")
    assert result.status == 0, result
    assert result.has("free: the last ones may not fit")


@pytest.mark.parametrize("what", ["link", "file"])
def test_what_stands_in_place_of_a_folder_is_foretold(turn, tmp_path, what):
    here = turn(four_vms())
    here.configure("vm-export=.*")
    path = here.backups / "web"
    if what == "link":
        (tmp_path / "elsewhere").mkdir()
        path.symlink_to(str(tmp_path / "elsewhere"))
    else:
        path.write_text("mine")
    for words in (["preview"], []):
        result = here.run(*words)
        assert result.status == 2, result
        assert result.has("web is a symbolic link or no folder: refused")
    assert not here.folders("web", marked=False) if what == "link" else path.read_text() == "mine"

# SPDX-License-Identifier: GPL-3.0-or-later
"""What preview says of each VM beyond upstream's block, and that the run does as it said."""
import re
import shutil

import pytest
from simulator.pool import GIB, MIB, Pool, disk

HOUR = "(02:00:00)"


def some_vms():
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
    (["vm-export=web"], {"web": "vm-export, chosen by its name"}),
    (["vm-export=web.*"], dict.fromkeys(("web", "web-2"), "vm-export, chosen by vm-export=web.*")),
    (["vm-export=.*", "vm-export=web"], {
        "web": "vm-export, chosen by its name", "web-2": "vm-export, chosen by vm-export=.*",
        "db": "vm-export, chosen by vm-export=.*", "empty": "vm-export, chosen by vm-export=.*"}),
    (["vm-export=web.*:9", "vm-export=w.*:2"], dict.fromkeys(
        ("web", "web-2"), "vm-export, chosen by vm-export=w.*:2")),
    (["vm-export="], dict.fromkeys(
        ("web", "web-2", "db", "empty"), "vm-export, chosen by vm-export=")),
    (["vdi-export=d.", "vm-export=.*", "exclude=(web|empty)"], {
        "db": "vdi-export, chosen by vdi-export=d."}),
])
def test_how_each_vm_was_chosen(turn, lines, chosen):
    here = turn(some_vms())
    here.configure(*lines)
    result = here.run("preview")
    assert result.status == 0, result
    told = {vm: lines_of(result, vm)[0] for vm in ("web", "web-2", "db", "empty")
            if lines_of(result, vm)}
    assert {vm: text.split(";")[0] for vm, text in told.items()} == chosen


def test_power_state_and_disks(turn):
    here = turn(some_vms())
    here.configure("vm-export=.*")
    result = here.run("preview")
    told = {vm: lines_of(result, vm)[0].split("; ", 1)[1]
            for vm in ("web", "web-2", "db", "empty")}
    assert told == {
        "web": "running; disks: xvda 3.0 MiB, xvdb 1.0 MiB; about 4.0 MiB to expect",
        "web-2": "suspended; disks: xvda 2.0 MiB; about 2.0 MiB to expect",
        "db": "halted; disks: 0 4.0 MiB; about 4.0 MiB to expect",
        "empty": "halted; disks: none; about 0 bytes to expect",
    }
    number = r"\d+(\.\d)? (bytes|[KMGT]iB)"
    assert re.match("together about 10.0 MiB to expect, %s free" % number, result.lines[-2])


@pytest.mark.parametrize("words, suffix, size, told", [
    (["compress=False"], "xva", 7 * MIB, "about 7.0 MiB"),         # what the last one had
    (["compress=gzip"], "xva.gz", 9 * MIB, "about 9.0 MiB"),
    (["compress=zstd"], "xva.zst", 9 * MIB, "about 9.0 MiB"),
    (["compress=zstd"], "xva", 9 * MIB, "about 4.0 MiB"),          # not that of another form
    (["compress=False"], "raw", 9 * MIB, "about 4.0 MiB"),
])
def test_the_size_to_expect_is_that_of_the_last_backup_of_the_form(turn, words, suffix, size, told):
    here = turn(some_vms())
    here.configure("vm-export=web")
    leave(here, "web", 1, suffix, 90 * MIB)
    leave(here, "web", 2, suffix, size)
    leave(here, "web", 3, suffix, 80 * MIB, marker=None)
    result = here.run("preview", *words)
    assert lines_of(result, "web")[0].endswith("; %s to expect" % told), result


def test_the_size_of_a_raw_disk_is_its_own(turn):
    here = turn(some_vms())
    here.configure("vdi-export=web")
    leave(here, "web", 1, "raw", 90 * MIB)
    assert lines_of(here.run("preview"), "web")[0].endswith("; about 3.0 MiB to expect")
    vhd = here.run("preview", "vdi_export_format=vhd")
    assert lines_of(vhd, "web")[0].endswith("; about 3.0 MiB to expect")
    leave(here, "web", 2, "vhd", 8 * MIB)
    vhd = here.run("preview", "vdi_export_format=vhd")
    assert lines_of(vhd, "web")[0].endswith("; about 8.0 MiB to expect")


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


def test_too_little_space_is_told_with_both_figures_and_space_check_passes_it_over(turn):
    here = turn(some_vms())
    here.configure("vm-export=web", "vm-export=db")
    free = shutil.disk_usage(str(here.backups)).free
    leave(here, "web", 1, "xva", 3 * free)
    result = here.run("preview")
    assert result.status == 2, result
    (line,) = [line for line in result.lines if line.startswith("***ERROR - web: ")]
    assert re.search("[0-9.]+ [GT]iB to expect, [0-9.]+ [GT]iB free", line)
    assert result.lines[-1].startswith("ERROR preview parameters: 1 VM(s)")
    assert here.run("preview", "space_check=False").status == 0


@pytest.mark.parametrize("keep, there, doomed", [
    (4, 0, 0), (4, 3, 0), (4, 4, 1), (4, 6, 3), (1, 1, 1), (1, 3, 3), (2, 1, 0)])
@pytest.mark.parametrize("pre_clean", ["False", "True"])
def test_the_run_deletes_what_preview_said_and_why(turn, keep, there, doomed, pre_clean):
    here = turn(some_vms())
    here.configure("vm-export=web:%d" % keep, "max_backups=9", "pre_clean=" + pre_clean)
    names = [leave(here, "web", day) for day in range(1, there + 1)]
    result = here.run("preview")
    text = ("would delete %s (the oldest beyond %d)" % (", ".join(names[:doomed]), keep)
            if doomed else "would delete none")
    assert lines_of(result, "web")[1:] == [
        "has %d backups, keeps %d, %s" % (there, keep, text)], result
    assert [folder.name for folder in here.folders("web")] == names
    assert here.run().status == 0
    left = [folder.name for folder in here.folders("web")]
    assert left[:-1] == names[doomed:]
    assert left[-1] not in names


def test_what_is_no_backup_is_neither_counted_nor_doomed(turn):
    here = turn(some_vms())
    here.configure("vm-export=web", "max_backups=1")
    (here.backups / "web" / "@snapshots").mkdir(parents=True)
    (here.backups / "web" / "old" / "success").mkdir(parents=True)
    (here.backups / "web" / "notes.txt").write_text("mine")
    leave(here, "web", 1, marker=None)
    assert lines_of(here.run("preview"), "web")[1] == "has 0 backups, keeps 1, would delete none"
    name = leave(here, "web", 2, marker="success_compress")
    assert lines_of(here.run("preview"), "web")[1] == (
        "has 1 backups, keeps 1, would delete %s (the oldest beyond 1)" % name)


def test_backups_in_another_pattern_count_beside_those_in_the_usual_one(turn):
    here = turn(some_vms())
    here.configure("vm-export=web", "max_backups=2", "backup_dir_pattern=%Y%m%d-%H%M%S")
    usual = leave(here, "web", 2)
    for name in ("20260101-020000", "20260103-020000"):
        folder = here.backups / "web" / name
        folder.mkdir()
        (folder / "success").write_text("")
    assert lines_of(here.run("preview"), "web")[1] == (
        "has 3 backups, keeps 2, would delete 20260101-020000, %s (the oldest beyond 2)" % usual)
    assert here.run().status == 0
    assert [folder.name for folder in here.folders("web")][0] == "20260103-020000"


def test_a_link_in_place_of_a_folder_is_foretold(turn, tmp_path):
    here = turn(some_vms())
    here.configure("vm-export=.*")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (here.backups / "web").symlink_to(str(elsewhere))
    result = here.run("preview")
    assert result.status == 2, result
    assert result.has("***ERROR - web: %s is a symbolic link" % (here.backups / "web"))


@pytest.mark.parametrize("name, value, noted", [
    ("a.b", "a.b", True), ("a.b", r"a\.b", False), ("a.b", "a.*", False), ("a-b", "a-b", False),
    ("a+b c", "a+b c", False), ("a b.", "a b.", True)])
def test_a_name_that_is_a_regular_expression_is_noted(turn, name, value, noted):
    pool = Pool()
    pool.vm(name, disks=[disk(MIB)])
    here = turn(pool)
    here.configure("vm-export=" + value)
    result = here.run("preview")
    note = "NOTE - %s: not a simple name but a regular expression" % name
    assert result.has(note) == noted, result
    assert result.status == (1 if name == "a+b c" else 0)  # which does not match itself


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

# SPDX-License-Identifier: GPL-3.0-or-later
"""The way over from VmBackup 3.25: its folders, config files, cron lines and monitors go on.

What 3.25 prints and writes is taken from its README and its source, and was compared with a run
of its own script at the simulator.
"""
import re

import pytest
from simulator.pool import MIB, Pool, cd, disk, vif
from support.harness import vmbackup
from support.upstream import (
    MARKERS,
    folder_name,
    leave_backup,
    leave_password_file,
    leave_pool_dump,
)
from support.world import SERVER

# The effective lines of the example.cfg that came with 3.25 (and a comment of its kind).
EXAMPLE_CFG = """\
#### high level VmBackup settings ################
pool_db_backup=0
max_backups=3
backup_dir=%s
vdi_export_format=raw

exclude=PROD-WinDomainController
exclude=DEV-DestructiveTest
vdi-export=my-vm-name
vm-export=my-vm-name
vm-export=my-second-vm
vm-export=my-third-vm:3
vm-export=PROD.*
vm-export=DEV.*:2
"""
PREVIEW = """\
VmBackup.py running with these settings:
  backup_dir        = {0.backups}
  status_log        = {0.status_log}
  compress          = False
  max_backups       = 4
  vdi_export_format = raw
  pool_db_backup    = 0
"""


def pool_of_3_25(*names):
    """VMs with one disk each, as 3.25 likes them best: running, with a device name."""
    pool = Pool()
    pool.template("Debian", default=True)
    for name in names:
        pool.vm(name, power_state="Running", vifs=[vif()], cds=[cd()],
                disks=[disk(MIB, "root of " + name, seed=name, device="xvda")])
    return pool


def readme_pool():
    """The pool of the examples in the README of 3.25."""
    return pool_of_3_25("PROD-ubuntu14", "PROD-ubuntu12-benchmark", "PROD-CentOS7-large-user-disks",
                   "DEV-RH6", "DEV-RH7", "PROD-WinSvr", "DEV mySql")


WEEKEND = ("vdi-export=PROD-CentOS7-large-user-disks", "vm-export=PROD.*", "vm-export=DEV-RH.*:3",
           "exclude=PROD-ubuntu12-benchmark")


def all_files(top):
    return {path: path.read_bytes() for path in top.rglob("*") if path.is_file()}


@pytest.mark.parametrize("lines, lists, end", [
    (["vm-export=DEV mySql"], [[], [], ["DEV mySql"]], "SUCCESS preview parameters"),
    (["vm-export=DEV-mySql"], [[], [], ["DEV-mySql"]],
     "ERROR - vm(s) List does not exist: DEV-mySql"),
    (WEEKEND, [["PROD-ubuntu12-benchmark"], ["PROD-CentOS7-large-user-disks"],
               ["DEV-RH6:3", "DEV-RH7:3", "PROD-WinSvr", "PROD-ubuntu14"]],
     "SUCCESS preview parameters"),
    (WEEKEND[:3] + ("exclude=PROD-ubuntu13",), [
        ["PROD-ubuntu13"], ["PROD-CentOS7-large-user-disks"],
        ["DEV-RH6:3", "DEV-RH7:3", "PROD-WinSvr", "PROD-ubuntu12-benchmark", "PROD-ubuntu14"]],
     "***WARNING - vm(s) Exclude does not exist: PROD-ubuntu13"),
])
def test_the_preview_block_of_the_readme(turn, lines, lists, end):
    here = turn(readme_pool())
    here.configure(*lines)
    result = here.run("preview")
    block = PREVIEW.format(here).splitlines()
    for key, items in zip(("exclude", "vdi-export", "vm-export"), lists):
        block += ["  %s (cnt)= %d" % (key, len(items)),
                  ("  %s: %s" % (key, ", ".join(items))).rstrip()]
    begin = result.lines.index(block[0])
    assert result.lines[begin:begin + len(block)] == block
    assert end in result.lines


def test_a_run_over_the_folders_that_3_25_left(turn):
    here = turn(pool_of_3_25("web", "db"))
    kept = [leave_backup(here.backups, "web", day, marker)
            for day, marker in zip((3, 4, 5), MARKERS[1:])]
    pruned = [leave_backup(here.backups, "web", 1), leave_backup(here.backups, "web", 2, "success")]
    failed = leave_backup(here.backups, "web", 6, marker=None)
    mixed = leave_backup(here.backups, "db", 1, suffix="raw")  # of the time before its vdi-export
    strays = [here.backups / "web" / "pre-upgrade-keep", here.backups / "web" / "@eaDir",
              here.backups / "web" / folder_name(7) / "notes", here.backups / "retired-vm" / "copy"]
    for stray in strays:
        stray.mkdir(parents=True)
        (stray / "image.xva").write_text("precious")
    retired = leave_backup(here.backups, "retired-vm", 1)
    dumps = [leave_pool_dump(here.backups, SERVER, "201908%02d-020000" % day)
             for day in range(1, 8)]
    before = all_files(here.backups)
    here.configure("max_backups=4", "pool_db_backup=1", "vm-export=web", "vm-export=db")
    result = here.run()
    assert result.status == 0, result
    assert result.lines[-1] == "VmBackup ended - Success - S:2 W:0 E:0"
    assert [folder.exists() for folder in pruned] == [False, False]
    assert not any(dump.exists() for dump in dumps[:4])
    gone = {path for path in before if any(top in path.parents for top in pruned)}
    after = all_files(here.backups)
    for path in set(before) - gone - set(dumps[:4]):
        assert after[path] == before[path], path
    assert all(folder.exists() for folder in kept + [failed, mixed, retired] + strays)
    assert len(here.folders("web")) == len(here.folders("db")) - 1 == 1
    # A second run has nothing to complain about either, and each backup pushes out the oldest.
    assert here.run().status == 0
    assert [folder.exists() for folder in kept] == [False, True, True]
    assert failed.exists()


def test_nothing_but_what_3_25_wrote_is_in_a_folder_that_is_pruned(turn):
    here = turn(pool_of_3_25("web"))
    old = leave_backup(here.backups, "web", 1)
    (old / "web.xva.sig").write_text("somebody put a signature beside it")
    here.configure("max_backups=1", "vm-export=web")
    result = here.run()
    assert result.status == 1, result
    assert (old / "web.xva.sig").exists()
    assert (old / "success").exists()
    assert result.has("web.xva.sig")


def test_the_example_cfg_of_3_25_and_its_password_file(turn):
    names = ["my-vm-name", "my-second-vm", "my-third-vm", "PROD-a", "PROD-WinDomainController",
             "DEV-a", "DEV-DestructiveTest", "TEST"]
    pool = pool_of_3_25(*names)
    pool.description["password"] = "pa$$ wörd"
    here = turn(pool)
    here.config.write_text(EXAMPLE_CFG % here.backups)
    secret = leave_password_file(here.path / "VmBackup.pass", "pa$$ wörd")
    more = ["host=" + here.sim.url, "status_log=%s" % here.status_log]
    result = vmbackup(secret, here.config, "preview", *more)
    assert result.status == 0, result
    assert "  exclude: DEV-DestructiveTest, PROD-WinDomainController" in result.lines
    assert "  vdi-export: my-vm-name" in result.lines
    assert "  vm-export: DEV-a:2, PROD-a, my-second-vm, my-third-vm:3" in result.lines
    result = vmbackup(secret, here.config, "compress=True", "pre_clean=True", *more)
    assert result.status == 0, result
    assert here.file("my-vm-name", "raw").exists()
    assert here.file("DEV-a", "xva.gz").exists()
    assert sorted(path.name for path in here.backups.iterdir()) == sorted(
        ["my-vm-name", "my-second-vm", "my-third-vm", "PROD-a", "DEV-a"])


def test_the_status_log_is_appended_to_in_the_form_of_3_25(turn):
    here = turn(pool_of_3_25("web", "big", "bad"))
    old = "2019/08/07 02:00:00,vmbackup.py,xen1,begin\n"
    here.status_log.write_text(old)
    here.sim.fault("snapshot_error", vm="bad")
    here.configure("vdi-export=big", "vm-export=web", "vm-export=bad", "vm-export=gone")
    assert here.run().status == 2
    text = here.status_log.read_text()
    assert text.startswith(old)
    lines = text[len(old):].splitlines()
    moment = re.compile(r"\d{4}/\d\d/\d\d \d\d:\d\d:\d\d,")
    assert all(moment.match(line) for line in lines)
    assert [moment.sub("", line) for line in lines] == [line % SERVER for line in (
        "vmbackup.py,%s,begin",
        "vdi-export,%s,begin,big",
        "vdi-export,%s,end,SUCCESS big,elapse:0 size:0G",
        "vm-export,%s,begin,web",
        "vm-export,%s,end,SUCCESS web,elapse:0 size:0G",
        "vm-export,%s,begin,bad",
        "vm-export,%s,end,SNAPSHOT-FAIL bad",
        "vm-export,%s,begin,gone",
        "vm-export,%s,end,ERROR verify_vm_name gone",
        "vmbackup.py,%s,end,ERROR,S:2 W:0 E:2",
    )]


@pytest.mark.parametrize("kind, fault, word", [
    ("vm-export", {"name": "export_fail"}, "VM-EXPORT-FAIL"),
    ("vm-export", {"name": "rpc_error", "method": "VM.set_is_a_template",
                   "error_info": ["INTERNAL_ERROR"]}, "TEMPLATE-PARAM-SET-FAIL"),
    ("vdi-export", {"name": "snapshot_error"}, "VDI-SNAPSHOT-FAIL"),
    ("vdi-export", {"name": "rpc_error", "method": "VDI.set_name_label",
                    "error_info": ["INTERNAL_ERROR"]}, "VDI-PARAM-SET-FAIL"),
    ("vdi-export", {"name": "export_fail", "path": "/export_raw_vdi"}, "VDI-EXPORT-FAIL"),
])
def test_the_status_log_has_the_words_of_3_25_for_each_failure(turn, kind, fault, word):
    here = turn(pool_of_3_25("web"))
    here.sim.fault(**fault)
    here.configure("%s=web" % kind)
    assert here.run().status == 2
    ends = [line.split(",", 3) for line in here.status_log.read_text().splitlines()
            if ",end," in line]
    assert [end[1:] for end in ends] == [
        [kind, SERVER, "end,%s web" % word],
        ["vmbackup.py", SERVER, "end,ERROR,S:0 W:0 E:1"]]


def test_the_folder_has_all_that_3_25_wrote_and_vm_cfg_and_checksums(turn):
    here = turn(pool_of_3_25("web"))
    here.configure("vm-export=web")
    assert here.run().status == 0
    (new,) = here.folders("web")
    assert re.match(r"backup-\d{4}-\d\d-\d\d-\(\d\d:\d\d:\d\d\)\Z", new.name)
    old = leave_backup(here.path, "web", 1)
    inside = [{str(path.relative_to(top)) for path in top.rglob("*")} for top in (old, new)]
    assert inside[1] - inside[0] == {"RESTORE.txt", "vm.cfg", "SHA256SUMS"}
    assert not inside[0] - inside[1]
    for name in ("DISK-xvda/vbd.cfg", "DISK-xvda/vdi.cfg", "VIFs/vif-0.cfg"):
        keys = [[line.split("=")[0] for line in (top / name).read_text().splitlines()]
                for top in (old, new)]
        assert [key for key in keys[1] if key != "unplugable"] == keys[0], name

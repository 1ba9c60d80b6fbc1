# SPDX-License-Identifier: GPL-3.0-or-later
"""The disk fails at every step, is full, read-only or gone, or holds what is not ours."""
import errno
import os
import re
import shutil
import signal
import subprocess

import pytest
from simulator.pool import MIB, Pool, disk, snapshot
from support.forks import Forks
from support.harness import finish
from support.tally import Ledger, is_good, tree

OLD, OLDER = "backup-2020-01-02-(02:00:00)", "backup-2020-01-01-(02:00:00)"


def pool_of_sizes(**sizes):
    """VMs with a disk of so many bytes, and a snapshot that is somebody else's."""
    pool = Pool()
    for name, size in sizes.items():
        pool.vm(name, disks=[disk(size, "root", seed=name)], snapshots=[snapshot("mine")])
    return pool


def with_old_backups(site, *lines):
    """Two good backups of every VM, as if made in 2020; returns the Ledger."""
    site.configure("vm-export=", *lines)
    result = site.run("host=" + site.sim.http, "max_backups=4")
    assert result.status == 0, result
    for top in site.backups.iterdir():
        (folder,) = top.iterdir()
        folder.rename(top / OLD)
        shutil.copytree(str(top / OLD), str(top / OLDER))
        for name, created in ((OLD, 1577930400), (OLDER, 1577844000)):
            (top / name / "success").write_text("created=%d\n" % created)
    return Ledger(site)


def test_the_disk_fails_once_at_every_change(turn, tmp_path, shim, tally):
    """Whatever fails, the old backups stay and what has a marker is whole; the rest is removed at
    once, but for an empty lock file, which the next run takes."""
    site = turn(pool_of_sizes(web=8192))
    ledger, failed, step, clean = with_old_backups(site, "max_backups=3"), 0, 1, 0
    with Forks(tmp_path, preload=shim) as forks:
        while clean < 6:  # a failure of a lock's removal does no harm
            number = (errno.EIO, errno.ENOSPC)[step % 2]
            run = forks.run(site, env={"SHIM_TREE": str(site.backups), "SHIM_FAIL": str(step),
                                       "SHIM_ERRNO": str(number)})
            told = [line for line in run.out.splitlines() if "***ERROR***" in line]
            assert (run.status, len(told)) in ((0, 0), (2, 1)) or run.status == 3 and (
                "backup_dir is not writable" in run.out), run
            clean = clean + 1 if run.status == 0 else 0
            if told:
                failed += 1
                assert os.strerror(number) in told[0]
                assert "WARNING" not in run.out
            site.assert_pool_is_clean(["mine"])
            for folder in site.folders("web", marked=False):
                assert is_good(folder), run
                if "2020" not in folder.name:
                    shutil.rmtree(str(folder))
            assert ledger.untouched("web"), run
            step += 1
    assert failed > 25
    assert site.run().status == 0
    tally("the disk fails at a change", failed, ledger)


def test_all_is_flushed_before_the_marker_and_the_marker_at_once(turn, tmp_path, shim):
    """What a power cut leaves: the marker only if all that it vouches for is on the disk."""
    site = turn(pool_of_sizes(web=8192))
    site.configure("vm-export=web")
    log = tmp_path / "calls"
    result = site.run(env={"LD_PRELOAD": str(shim), "SHIM_TREE": str(site.backups),
                           "SHIM_LOG": str(log)})
    assert result.status == 0, result
    (folder,) = site.folders("web")
    calls = [tuple(line.split(" ", 1)) for line in log.read_text().splitlines()]
    marker = calls.index(("rename", str(folder / "success")))
    export = str(folder / "web.xva")
    flushed = [path for call, path in calls[:marker] if call == "fsync"]
    assert export + ".partial" in flushed
    assert calls.index(("fsync", export + ".partial")) < calls.index(("rename", export))
    assert calls.index(("rename", export)) < calls.index(("fsync", str(folder))) < marker
    assert str(folder / "unfinished.partial") in flushed
    for path in [folder] + list(folder.rglob("*")):
        if path.name not in ("web.xva", "success"):
            assert str(path) in flushed, path
            last = max(i for i, (call, name) in enumerate(calls[:marker]) if name == str(path))
            assert calls[last][0] == "fsync", calls[last]
    assert calls[marker + 1:marker + 4] == [
        ("fsync", str(path)) for path in (folder, folder.parent, site.backups)]


@pytest.mark.parametrize("call", ["fsync", "write"])
def test_a_disk_that_never_flushes_or_takes_a_byte(turn, shim, tally, call):
    site = turn(pool_of_sizes(web=8192, db=8192))
    ledger = with_old_backups(site)
    result = site.run(env={"LD_PRELOAD": str(shim), "SHIM_TREE": str(site.backups),
                           "SHIM_CALL": call, "SHIM_ERRNO": str(errno.EIO)})
    assert result.status == 2, result
    for vm in ("web", "db"):
        assert result.has("VmBackup vm-export %s - ***ERROR*** Input/output error" % vm)
        assert ledger.untouched(vm)
    tally("no %s succeeds" % call, 1, ledger)


def test_a_full_disk_fails_one_vm_and_the_next_goes_on(small_disk, tally):
    site = small_disk(pool_of_sizes(web=8192), 10)
    ledger = with_old_backups(site)
    site.sim.add_vm({"name": "big", "disks": [disk(20 * MIB, seed=3)]})
    site.configure("vm-export=big", "vm-export=web", "space_check=False", "max_backups=3")
    result = site.run()
    assert result.status == 2, result
    assert result.has("VmBackup vm-export big - ***ERROR*** No space left on device")
    assert result.has("VmBackup vm-export web - ***Success***")
    assert not (site.backups / "big").exists()
    tally("the disk is full", 1, ledger)


def test_a_read_only_disk_starts_nothing(small_disk, tally):
    site = small_disk(pool_of_sizes(web=8192), 10)
    ledger = with_old_backups(site)
    site.sim.reset_calls()
    subprocess.run(["mount", "-o", "remount,ro", str(site.backups)], check=True)
    result = site.run()
    assert result.status == 3, result
    assert result.has("ERROR - backup_dir is not writable: %s" % site.backups)
    assert all(method.startswith("session.log") or ".get_" in method
               for method in site.sim.methods())
    site.assert_pool_is_clean(["mine"])
    assert ledger.untouched("web")
    tally("the disk is read-only", 1, ledger)


@pytest.mark.parametrize("pre_clean", [False, True])
def test_too_little_space_is_told_and_pre_clean_makes_some_first(small_disk, tally, pre_clean):
    site = small_disk(pool_of_sizes(web=3 * MIB), 8)
    ledger = with_old_backups(site)
    site.sim.reset_calls()
    result = site.run("max_backups=2", "pre_clean=%s" % pre_clean)
    if pre_clean:
        assert result.status == 0, result
        deleted = [result.lines.index(line) for line in result.lines if "deleting" in line]
        taken = [result.lines.index(line) for line in result.lines if "snapshot RESTORE" in line]
        assert deleted < taken
        assert [folder.name == OLD for folder in site.folders("web")] == [True, False]
    else:
        assert result.status == 2, result
        (told,) = [line for line in result.lines if "***ERROR***" in line]
        assert re.search(r": 3\.0 MiB to expect, 1\.\d MiB free", told)
        assert "Async.VM.snapshot" not in site.sim.methods()
        assert ledger.untouched("web")
    tally("too little space", 1, ledger)


def test_backup_dir_vanishes_during_the_run(turn, tally):
    """As a share does: nothing is written where it was, and the other VMs end in order too."""
    site = turn(pool_of_sizes(web=8192, db=8192))
    ledger = with_old_backups(site)
    site.configure("vm-export=web", "vm-export=db")
    process = site.start()
    site.sim.fault("kill_client_at", pid=process.pid, vm="web", after=3000, signal=signal.SIGSTOP)
    assert os.WIFSTOPPED(os.waitpid(process.pid, os.WUNTRACED)[1])
    away = site.path / "away"
    site.backups.rename(away)
    process.send_signal(signal.SIGCONT)
    result = finish(process)
    assert result.status == 2, result
    assert result.lines[-1] == "VmBackup ended - **ERRORS DETECTED** - S:0 W:0 E:2"
    assert not site.backups.exists()
    site.assert_pool_is_clean(["mine"] * 2)
    away.rename(site.backups)
    assert site.run().status == 0
    tally("backup_dir vanishes", 1, ledger)


FOREIGN = {  # what somebody put into an old backup: a function of its folder
    "file": lambda folder: (folder / "notes.txt").write_text("mine"),
    "hidden": lambda folder: (folder / ".directory").write_text("mine"),
    "below": lambda folder: (folder / "DISK-xvda" / "xvda.img").write_text("mine"),
    "folder": lambda folder: (folder / "extracted").mkdir(),
    "link": lambda folder: (folder / "old.vhd").symlink_to(folder.parent / OLD / "vm.cfg"),
}


def test_an_old_backup_with_something_foreign_in_it_is_left_alone(turn, tally):
    site = turn(pool_of_sizes(**dict.fromkeys(FOREIGN, 8192)))
    ledger = with_old_backups(site)
    for name, put in FOREIGN.items():
        put(site.backups / name / OLDER)
    before = {name: tree(site.backups / name / OLDER) for name in FOREIGN}
    result = site.run("max_backups=2")
    assert result.status == 1, result
    for name in FOREIGN:
        assert len(site.folders(name)) == 3
        assert result.has("VmBackup vm-export %s - ***WARNING***" % name)
    assert {name: tree(site.backups / name / OLDER) for name in FOREIGN} == before
    tally("something foreign in an old backup", len(FOREIGN), ledger)


def test_a_file_or_a_link_in_place_of_a_folder(turn, tmp_path, tally):
    """The link of a backup is none of ours and counts for nothing; that of a VM is refused."""
    site = turn(pool_of_sizes(dated=8192, file=8192, linked=8192, web=8192))
    ledger = with_old_backups(site, "max_backups=2")
    elsewhere = tmp_path / "elsewhere"
    (site.backups / "dated" / OLDER).rename(elsewhere)
    (site.backups / "dated" / OLDER).symlink_to(elsewhere)
    shutil.rmtree(str(site.backups / "file"))
    (site.backups / "file").write_text("mine")
    (site.backups / "linked").rename(tmp_path / "linked")
    (site.backups / "linked").symlink_to(tmp_path / "linked")
    before = tree(elsewhere), tree(tmp_path / "linked")
    del ledger.trees["file"]
    result = site.run()
    assert result.status == 2, result
    for vm in ("file", "linked"):
        assert result.has("VmBackup vm-export %s - ***ERROR*** %s is a symbolic link or no folder:"
                          " refused" % (vm, vm))
    assert result.has("VmBackup vm-export dated - ***Success***")
    assert result.has("VmBackup vm-export web - ***Success***")
    assert (tree(elsewhere), tree(tmp_path / "linked")) == before
    assert (site.backups / "dated" / OLDER).is_symlink()
    assert (site.backups / "file").read_text() == "mine"
    tally("a file or link in place of a folder", 3, ledger)


def test_an_old_backup_that_cannot_be_deleted_is_a_warning(turn, tally):
    site = turn(pool_of_sizes(web=8192))
    ledger = with_old_backups(site, "max_backups=2")
    oldest = site.backups / "web" / OLDER
    if os.geteuid():
        oldest.chmod(0)
    elif subprocess.run(["chattr", "+i", str(oldest)], stderr=subprocess.DEVNULL).returncode:
        pytest.skip("root can delete anything on a file system without chattr +i")
    try:
        result = site.run()
        assert result.status == 1, result
        assert result.has("WARNING %s could not be removed" % OLDER)
        assert len(site.folders("web")) == 3
    finally:
        subprocess.run(["chattr", "-i", str(oldest)], stderr=subprocess.DEVNULL)
        oldest.chmod(0o700)
    assert site.run().status == 0
    assert len(site.folders("web")) == 2
    tally("an old backup cannot be deleted", 1, ledger)

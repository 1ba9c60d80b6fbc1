# SPDX-License-Identifier: GPL-3.0-or-later
"""Several VMs at a time in one run; and two runs at once, of which the first is stopped (SIGSTOP)
in the middle of an export meanwhile."""
import errno
import os
import re
import signal

import pytest
from simulator.pool import MIB
from support.harness import LINE, finish
from support.tally import Ledger, tree
from support.world import pool_of, wait_until


def test_streams_of_a_parallel_run_are_open_at_the_same_time(turn):
    site = turn(pool_of(*["vm%d" % number for number in range(5)]))
    site.configure("vm-export=", "parallel=4")
    site.sim.fault("export_rate", bytes=20000)  # no stream ends while this test looks
    process = site.start()
    wait_until(lambda: site.sim.methods().count("GET /export") == 4)
    process.send_signal(signal.SIGTERM)
    result = finish(process)
    assert site.sim.methods().count("GET /export") == 4
    assert result.status == 128 + signal.SIGTERM
    assert "vm4" not in "".join(line for line in result.lines if "begins" in line)
    site.assert_pool_is_clean()


def test_what_a_parallel_run_tells_is_what_a_serial_one_does(turn):
    """But for the order: the slow first VM comes last in the status log."""
    told = []
    for parallel in (1, 4):
        site = turn(pool_of(*["vm%d" % number for number in range(7)]))
        site.configure("vm-export=", "parallel=%d" % parallel)
        slow = site.sim.fault("export_silence", vm="vm0", after=MIB // 2, seconds=3600)
        site.sim.fault("export_cut", vm="vm3", after=MIB // 2, task="failure")
        process = site.start()
        if parallel > 1:
            wait_until(lambda log=site.status_log: log.exists()
                       and log.read_text().count(",vm-export,") == 1 + 2 * 6)
        site.sim.clear_faults(slow)
        result = finish(process)
        assert result.status == 2, result
        status = [line.split(",")[1:5] for line in site.status_log.read_text().splitlines()]
        told.append(([re.sub("Ref:[0-9]+", "Ref", line) for line in result.lines
                      if re.match("VmBackup( vm-export .* -| ended)", line)], status))
        assert all(LINE.match(line) for line in result.out.splitlines()), result.out
        site.assert_pool_is_clean()
        site.status_log.unlink()
    (serial, in_order), (parallel, status) = told
    assert [words[2] for words in in_order] == ["begin"] + ["begin", "end"] * 7 + ["end"]
    assert sorted(serial) == sorted(parallel) and sorted(status) == sorted(in_order)
    assert [words[3] for words in status if words[2] == "end"][-2] == "SUCCESS vm0"


def stopped_in_the_export_of(site, vm, *lines):
    """A run that is frozen while it writes the export of that VM."""
    site.configure("vm-export=" + vm, *lines)
    process = site.start()
    site.sim.fault("kill_client_at", pid=process.pid, vm=vm, after=3000, signal=signal.SIGSTOP)
    assert os.WIFSTOPPED(os.waitpid(process.pid, os.WUNTRACED)[1])
    assert list(site.backups.glob("*/*/*.partial"))
    return process


def locks(site):
    return [path.name for path in site.backups.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("parallel", ["1", "2"])
def test_a_locked_vm_is_an_error_and_the_others_go_on(turn, tally, parallel):
    site = turn(pool_of("web", "db", "mail"))
    ledger = Ledger(site)
    first = stopped_in_the_export_of(site, "web")
    before = tree(site.backups / "web")
    site.configure("vm-export=.*", "max_backups=1", "pre_clean=True", "parallel=" + parallel)
    result = site.run()
    assert result.status == 2, result
    assert result.has("VmBackup vm-export web - ***ERROR*** another run holds the lock of web")
    assert result.lines[-1] == "VmBackup ended - **ERRORS DETECTED** - S:2 W:0 E:1"
    assert site.folders("db") and site.folders("mail")
    assert tree(site.backups / "web") == before
    assert site.snapshots() == ["RESTORE_web"]
    assert ",vm-export," in site.status_log.read_text()
    assert ",end,ERROR locked web\n" in site.status_log.read_text()
    first.send_signal(signal.SIGCONT)
    assert finish(first).status == 0
    assert len(site.folders("web")) == 1
    assert not locks(site)
    site.assert_pool_is_clean()
    tally("two runs at once", 1, ledger)


def test_a_run_that_gets_no_lock_at_all_ends_with_4(turn, tally):
    site = turn(pool_of("web"))
    ledger = Ledger(site)
    first = stopped_in_the_export_of(site, "web")
    before = tree(site.backups)
    site.configure("vm-export=web")
    result = site.run()
    assert result.status == 4, result
    assert tree(site.backups) == before
    first.send_signal(signal.SIGCONT)
    assert finish(first).status == 0
    tally("two runs at once", 1, ledger)


def test_the_lock_dies_with_its_process(turn, tally):
    site = turn(pool_of("web"))
    ledger = Ledger(site)
    first = stopped_in_the_export_of(site, "web")
    first.kill()
    first.communicate()
    assert locks(site) == [".web.lock"]
    site.sim.fault("session_lost")
    site.sim.fault("task_vanish")
    assert site.run().status == 0
    assert len(site.folders("web", marked=False)) == 1
    assert not locks(site)
    tally("SIGKILL of a run that holds a lock", 1, ledger)


def test_a_vm_and_a_disk_of_it_are_not_exported_at_once(turn):
    """Both write to the same folder."""
    site = turn(pool_of("web"))
    first = stopped_in_the_export_of(site, "web")
    site.config.write_text(site.config.read_text().replace("vm-export", "vdi-export"))
    assert site.run().status == 4
    first.send_signal(signal.SIGCONT)
    assert finish(first).status == 0


def test_other_folders_are_not_locked(turn):
    """Neither by a name that begins alike, nor in another backup_dir."""
    site = turn(pool_of("web", "web.lock", "web2"))
    first = stopped_in_the_export_of(site, "web")
    site.configure(r"vm-export=web.+")
    assert site.run().status == 0
    other = site.path / "other"
    other.mkdir()
    site.configure("vm-export=web2")
    assert site.run("backup_dir=%s" % other).status == 0
    first.send_signal(signal.SIGCONT)
    assert finish(first).status == 0


def test_the_pool_database_has_a_lock_too(turn):
    site = turn(pool_of("web"))
    site.configure("vm-export=web", "pool_db_backup=1")
    first = site.start()
    site.sim.fault("kill_client_at", pid=first.pid, method="GET /pool/xmldbdump",
                   signal=signal.SIGSTOP)
    assert os.WIFSTOPPED(os.waitpid(first.pid, os.WUNTRACED)[1])
    result = site.run()
    assert result.status == 2, result
    assert result.has("***ERROR - pool database backup failed: another run holds the lock")
    assert site.folders("web")
    first.send_signal(signal.SIGCONT)
    assert finish(first).status == 0
    assert not locks(site)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_a_warning(turn, shim, number):
    site = turn(pool_of("web"))
    site.configure("vm-export=web")
    env = {"LD_PRELOAD": str(shim), "SHIM_TREE": str(site.backups), "SHIM_CALL": "flock",
           "SHIM_ERRNO": str(number)}
    for _ in range(2):
        result = site.run(env=env)
        assert result.status == 1, result
        assert result.has("web: WARNING this file system has no locks")
    assert len(site.folders("web")) == 2
    assert not locks(site)

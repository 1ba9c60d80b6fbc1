# SPDX-License-Identifier: GPL-3.0-or-later
"""What an adversary and a close reader found in the rewritten program, each as it can happen."""
import datetime
import errno
import os
import re
import signal
import stat
import subprocess
import sys
import time

import pytest
import XenAPI
from simulator.pool import MIB, Pool, cd, disk
from support.harness import ROOT, finish, vmbackup
from support.restores import Here, a_pool
from support.world import old_backup, one_vm, pool_of, wait_until

pytestmark = pytest.mark.newest  # nothing here depends on the Python


def run_with(here, code, *words, stdin=subprocess.DEVNULL):
    """A run of the config file in which this code was carried out first."""
    code = "import os, sys, vmbackup\n%s\nsys.exit(vmbackup.main())" % code
    env = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "TZ": "UTC", "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-c", code, here.sim.password, str(here.config)] + list(words)
    return finish(subprocess.Popen(words, env=env, stdin=stdin, stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE))


def administrator(here):
    session = XenAPI.Session(here.sim.http)
    session.login_with_password(here.sim.username, here.sim.password)
    return session


def called(old, name):
    """Another date for the oldest backup there is."""
    os.rename(str(old), str(old.parent / name))


# --- what is another's ----------------------------------------------------------------------------

def test_no_device_is_replaced_by_a_report(turn):
    """/dev/null is let pass as a status log; as a report it would become a file. Here a FIFO is
    what the program takes for it."""
    here = turn(one_vm(MIB))
    null = here.path / "null"
    os.mkfifo(str(null))
    here.configure("vm-export=web", "report_json=%s" % null)
    result = run_with(here, "os.devnull = %r" % str(null))
    assert result.status == 3, result
    assert stat.S_ISFIFO(os.stat(str(null)).st_mode)


@pytest.mark.parametrize("kind", ["vm-export", "vdi-export"])
def test_what_an_administrator_snapshots_meanwhile(turn, kind):
    """XAPI refuses our snapshot since it makes theirs, which has no name and no VBD yet. One that
    bears our name counts as ours."""
    here = turn(one_vm(MIB))
    here.configure(kind + "=web")
    method = "Async.%s.snapshot" % ("VM" if kind == "vm-export" else "VDI")
    hang = here.sim.fault("rpc_hang", method=method, seconds=3600, times=1)
    process = here.start()
    wait_until(lambda: method in here.sim.methods())
    session = administrator(here)
    if kind == "vm-export":
        theirs = session.xenapi.VM.snapshot(here.sim.ref("VM", "web"), "theirs")
        session.xenapi.VM.snapshot(here.sim.ref("VM", "web"), "RESTORE_web")
        here.sim.fault("snapshot_error", times=1,
                       error_info=["SR_BACKEND_FAILURE_44", "", "no space"])
    else:
        ((_, record),) = here.sim.disks_of("web")
        theirs = session.xenapi.VDI.snapshot(here.sim.ref("VDI", record["uuid"]), {})
        here.sim.fault("snapshot_error", times=1,
                       error_info=["OTHER_OPERATION_IN_PROGRESS", "VDI", "x", "snapshot", "y"])
    session.logout()
    here.sim.clear_faults(hang)
    result = finish(process)
    assert theirs in here.sim.records("VM" if kind == "vm-export" else "VDI")
    if kind == "vm-export":
        assert result.status == 0, result
        assert result.has("the halted VM is exported as it is")
        assert result.has("the export of the VM itself has ended: it can be started again")
        assert here.snapshots() == ["theirs"]
    else:
        assert result.status == 2, result
        assert result.has("web - ***ERROR*** VDI.snapshot: OTHER_OPERATION_IN_PROGRESS")


# --- good backups, and what is said of them -------------------------------------------------------

def test_the_pool_database_before_any_login(turn):
    here = turn(pool_of("x", "y"))
    here.configure("vm-export=.*", "pool_db_backup=1", "parallel=2")
    result = here.run()
    assert result.status == 0, result
    assert list(here.backups.glob("METADATA_*/*.dump"))


def test_a_backup_that_stands_is_none_that_failed(turn):
    """Whatever keeps the old ones from being deleted."""
    here = turn(one_vm(MIB))
    here.configure("vm-export=web", "max_backups=1", "retries=1")
    old_backup(here, "web", 1)
    (here.backups / ".web.read.lock").mkdir()
    result = here.run()
    assert result.status == 1, result
    assert result.has("old backups of this VM are not deleted this time")
    assert len(here.folders("web")) == 2


def test_a_run_that_came_to_no_vm_leaves_their_metrics(turn):
    here = turn(pool_of("a", "b"))
    prom = here.path / "x.prom"
    here.configure("vm-export=.*", "metrics_file=%s" % prom)
    assert here.run().status == 0
    before = [line for line in prom.read_text().splitlines() if 'vm="' in line]
    result = run_with(here, "def bad(*_):\n    raise vmbackup.ConfigError('read-only')\n"
                            "vmbackup.try_out = bad")
    assert result.status == 3, result
    assert [line for line in prom.read_text().splitlines() if 'vm="' in line] == before


def test_a_stop_begins_no_second_try(turn):
    here = turn(pool_of("a", "b", "c", size=4 * MIB))
    here.configure("vm-export=.*", "retries=1")
    here.sim.fault("snapshot_error", vm="a", error_info=["INTERNAL_ERROR", "x"], times=1)
    here.sim.fault("export_silence", vm="b", after=MIB, seconds=3600)
    process = here.start()
    wait_until(lambda: list(here.backups.glob("b/*/*.partial"))
               and "GET /export" in here.sim.methods())
    here.sim.reset_calls()
    process.send_signal(signal.SIGTERM)
    wait_until(lambda: "task.cancel" in here.sim.methods())
    here.sim.clear_faults()
    result = finish(process)
    assert result.status == 143, result
    assert "Async.VM.snapshot" not in here.sim.methods()
    assert result.has("vm-export a - ***ERROR*** VM.snapshot: INTERNAL_ERROR")


def test_one_backup_from_the_future_makes_no_others_so(turn):
    here = turn(one_vm(MIB))
    prom = here.path / "x.prom"
    here.configure("vm-export=web", "max_backups=2", "metrics_file=%s" % prom)
    old_backup(here, "web", 1)
    called(here.folders("web")[0], "backup-2099-01-01-(02:00:00)")
    for _ in range(4):
        here.run()
    result = vmbackup("check", here.config)
    assert result.status == 0, result
    told = re.search(r"^vmbackup_last_success_timestamp_seconds\{.* (\S+)$", prom.read_text(), re.M)
    assert abs(float(told.group(1)) - time.time()) < 100


def test_a_pattern_of_days_makes_no_days_of_its_own(turn):
    here = turn(one_vm(MIB))
    here.configure("vm-export=web", "backup_dir_pattern=%Y-%m-%d", "max_backups=1", "keep_daily=3")
    today = datetime.date.today()
    before = [str(today - datetime.timedelta(days)) for days in (2, 1)]
    for number, name in enumerate(before, 1):
        old_backup(here, "web", number)
        called(here.backups / "web" / ("backup-2020-01-%02d-(02:00:00)" % number), name)
    for _ in range(3):
        assert here.run("backup_dir_pattern=%Y-%m-%d").status == 0
    assert set(before) <= {folder.name for folder in here.folders("web")}


@pytest.mark.parametrize("token", [None, b""])
def test_a_folder_that_was_just_begun_and_then_left(turn, token):
    """By a run that died between the steps of its beginning."""
    here = turn(one_vm(MIB))
    here.configure("vm-export=web")
    folder = here.backups / "web" / "backup-2026-01-02-(02:00:00)"
    folder.mkdir(parents=True)
    if token is not None:
        (folder / "unfinished.partial").write_bytes(token)
    result = here.run()
    assert result.status == 0, result
    assert not folder.exists()


def test_preview_and_run_agree_on_what_was_left_unfinished(turn):
    here = turn(one_vm(MIB))
    here.configure("vm-export=web")
    folder = here.backups / "web" / "backup-2020-01-01-(02:00:00)"
    folder.mkdir(parents=True)
    (folder / "web.xva.partial").write_bytes(b"x")
    (folder / "mine.txt").write_text("x")
    results = [here.run("preview"), here.run()]
    assert [result.status for result in results] == [1, 1], results


def test_a_vm_whose_name_is_that_of_anothers_lock(turn):
    here = turn(pool_of("a", "a.read", size=4 * MIB))
    here.configure("vm-export=a", "vm-export=a[.]read", "parallel=2", "max_backups=1")
    here.sim.fault("export_rate", bytes=4 * MIB, vm="a.read")
    assert [here.run().status, here.run().status] == [0, 0]


@pytest.mark.parametrize("kind, disk_too", [
    ("vm-export", True), ("vm-export", False), ("vdi-export", False)])
def test_preview_knows_what_is_out_of_reach(turn, kind, disk_too):
    """An ISO or disk on a storage repository that no host has attached."""
    pool = Pool()
    pool.sr("Gone", type="iso", hosts=[])
    pool.sr("Far", hosts=[])
    if disk_too:
        pool.vm("web", disks=[disk(MIB, seed=1, sr="Far")])
    else:
        pool.vm("web", disks=[disk(MIB, seed=1)], cds=[cd("x.iso", sr="Gone")])
    here = turn(pool)
    here.configure(kind + "=web")
    results = [here.run("preview"), here.run()]
    assert [result.status for result in results] == [0 if kind == "vdi-export" else 2] * 2, results


def test_names_that_could_meet_cost_no_other_vm_its_backup(turn, shim, tmp_path):
    here, log = turn(pool_of("web", "WEB", "other")), tmp_path / "log"
    here.configure("vm-export=.*")
    env = {"LD_PRELOAD": str(shim), "SHIM_TREE": str(here.backups), "SHIM_LOG": str(log)}
    assert here.run(env=env).status == 0
    lines = log.read_text().splitlines()
    probe = next(number for number, line in enumerate(lines, 1)
                 if re.search("mkdir.*[.]vmbackup-probe-[^/]+/web", line, re.I))
    result = here.run(env=dict(env, SHIM_FAIL=str(probe), SHIM_ERRNO=str(errno.EINVAL)))
    assert result.status == 0, result
    assert result.has("vm-export other - ***Success***")


# --- texts, secrets, what is left -----------------------------------------------------------------

def test_a_host_that_repeats_the_password(turn):
    here = turn(one_vm(MIB))
    here.configure("vm-export=web")
    here.sim.fault("login_error", error_info=[
        "INTERNAL_ERROR", "login_with_password(root, %s)" % here.sim.password])
    result = here.run()
    assert result.status == 3, result
    assert here.sim.password not in result.out + here.status_log.read_text()


def test_a_folder_of_the_last_year_there_is(turn):
    here = turn(one_vm(MIB))
    here.configure("vm-export=web")
    old_backup(here, "web", 1)
    called(here.folders("web")[0], "backup-9999-12-31-(23:59:59)")
    for zone in ("UTC", "WEST12"):
        result = vmbackup("list", here.config, env={"TZ": zone})
        assert result.status in (0, 2), result
        assert not result.has("internal error")


def with_another_ova(source, target, change):
    """An XVA with ova.xml changed."""
    data = source.read_bytes()
    size = int(data[124:136].split(b"\0")[0].strip(), 8)
    ova, head = change(data[512:512 + size]), bytearray(data[:512])
    head[124:136], head[148:156] = b"%011o\0" % len(ova), b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    target.write_bytes(bytes(head) + ova + bytes(-len(ova) % 512) + data[512 + size + -size % 512:])


def test_an_archive_whose_ova_xml_is_odd(turn, tmp_path):
    here, odd = Here(turn(a_pool())).back_up(), tmp_path / "odd.xva"
    with_another_ova(here.file, odd, lambda ova: b"<?xml version='1.0'?>" + ova)
    assert not here.restore("preview", source=odd).has("internal error")
    with_another_ova(here.file, odd, lambda ova: re.sub(
        rb"(<name>virtual_size</name><value>(?:<string>)?)\d+", rb"\g<1>" + b"9" * 30, ova))
    result = vmbackup("extract", odd, "to=%s" % tmp_path)
    assert result.status == 2, result
    assert not result.has("internal error")
    assert not list(tmp_path.glob("*.raw"))


@pytest.mark.parametrize("method, value", [
    ("Async.VM.snapshot", {}), ("task.get_record", {}), ("VM.get_record", {}),
    ("VBD.get_record", {"x": {}}), ("VDI.get_record", ""), ("VM.get_all_records", {"x": {}}),
    ("pool.get_all_records", {})])
def test_answers_that_lack_something_leave_no_snapshot(turn, method, value):
    """And each is told as the host's fault, but for a task that is none."""
    here = turn(one_vm(MIB))
    here.configure("vm-export=web")
    result = run_with(here, """
send = vmbackup.Xapi._send
def other(self, transport, method, *args):
    value = send(self, transport, method, *args)
    return %r if method == %r else value
vmbackup.Xapi._send = other
vmbackup.TASK_ENDS, vmbackup.FAILURE_ENDS, vmbackup.RECOVERY = 1, 0.3, 1
""" % (value, method))
    assert result.status in (2, 3), result
    assert not result.has("internal error") or method == "Async.VM.snapshot", result
    if method != "task.get_record":  # the snapshot's own task cannot be asked
        assert here.snapshots() == [], result


def test_nothing_half_written_stays(turn, shim, tmp_path):
    """What a run leaves that is killed at a probe or at a report, the next one takes away."""
    here, log = turn(pool_of("web", "WEB")), tmp_path / "log"
    here.configure("vm-export=.*", "report_json=%s/r.json" % here.path,
                   "metrics_file=%s/m.prom" % here.path)
    env = {"LD_PRELOAD": str(shim), "SHIM_TREE": str(here.path), "SHIM_LOG": str(log)}
    assert here.run(env=env).status == 0
    steps = [number for number, line in enumerate(log.read_text().splitlines(), 1)
             if ".vmbackup-probe-" in line or line.endswith(".vmbackup")]
    assert steps
    left = 0
    for step in steps:
        assert finish(here.start(env=dict(env, SHIM_KILL=str(step + 1)))).status == -signal.SIGKILL
        left += len(list(here.path.rglob("*.vmbackup*")))
    assert left
    assert here.run().status == 0
    assert not list(here.path.rglob("*.vmbackup*"))

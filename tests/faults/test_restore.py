# SPDX-License-Identifier: GPL-3.0-or-later
"""A restore that dies, is stopped or fails at every step: nothing foreign is touched, nothing is
left, at the latest after one restore more."""
import json
import os
import signal
import time

import pytest
import XenAPI
from simulator.pool import MIB, Pool, disk, vif
from support.forks import Forks
from support.restores import VM, Here, a_pool

pytestmark = pytest.mark.newest  # nothing here depends on the Python
HASTY = {"UNUSED_ENDS": 0.3, "IMPORT_ENDS": 10, "HOST_ENDS": 2}


def small_pool():
    pool = Pool()
    pool.network("DMZ", bridge="xenbr7")
    pool.sr("Thick", type="lvm", size=40 * MIB)
    pool.vm(VM, vifs=[vif("DMZ")], disks=[disk(2 * MIB, "root", seed=1), disk(7 * MIB, "data",
                                                                             seed=2)])
    pool.vm("other", disks=[disk(MIB, "other", seed=3)])
    pool.setting(progress_interval=0.05)
    return pool


@pytest.fixture
def here(turn):
    return Here(turn(small_pool()))


@pytest.fixture
def runs(tmp_path):
    """runs(here, *words, **constants) is a restore that waits for go()."""
    with Forks(tmp_path) as forks:
        def begin(here, *words, **constants):
            here.sim.reset_calls()
            constants = dict(dict(HASTY, ELSEWHERE=str(here.site.path)), **constants)
            words = ["restore", here.sim.password, here.site.config, VM, "host=" + here.sim.http,
                     *words]
            return forks.begin(words, constants)

        yield begin


def calls_of(here, runs):
    """(method, how many times before) of each call of a restore, which is undone again."""
    result = runs(here).go()
    assert result.status == 0, result
    methods = here.sim.methods()
    take_away(here)
    return [(name, methods[:at].count(name)) for at, name in enumerate(methods)]


def take_away(here):
    """Undoes a restore that ended well, as its user may."""
    for ref in here.new("VM"):
        here.sim.delete_vm(ref)
    session = XenAPI.Session(here.sim.http)
    session.login_with_password(here.sim.username, here.sim.password)
    for ref in here.new("VDI"):
        session.xenapi.VDI.destroy(ref)
    session.xenapi.session.logout()
    assert here.new("VM") == here.new("VDI") == {}


def forget(here):
    """Sessions and tasks of who was killed are the host's to collect."""
    here.sim.fault("session_lost")
    here.sim.fault("task_vanish")


def debris(here, runs, after=MIB):
    """A restore is killed, and xapi dies with it: all stays that it has made."""
    run = runs(here)
    fault = here.sim.fault("kill_client_at", pid=run.pid, path="/import", after=after)
    cut = here.sim.fault("export_cut", path="/import", after=after, task="vanish")
    run.go()
    here.sim.clear_faults(fault)
    here.sim.clear_faults(cut)
    assert run.status == -signal.SIGKILL, run
    assert len(notes(here)) == 1
    here.sim.fault("session_lost")
    (made,) = here.new("VM").items()
    return made


def notes(here):
    return [path for path in here.site.backups.iterdir() if path.name.startswith(".restore-")]


def the_next(here, runs):
    """One more restore, whose own VM goes again; returns what it said."""
    before = here.before
    result = runs(here, "as=the next").go()
    assert result.status == 0, result
    ref = here.sim.ref("VM", "the next")
    vdis = [record["VDI"] for record in here.sim.records("VBD").values() if record["VM"] == ref]
    here.sim.delete_vm("the next")
    for vdi in vdis:
        assert vdi not in before["VDI"]
    return result


@pytest.mark.parametrize("kind", ["vm-export", "vdi-export"])
def test_killed_at_every_call_and_one_more_run(here, runs, kind):
    here.back_up("%s=%s" % (kind, VM))
    for method, skip in calls_of(here, runs):
        run = runs(here)
        fault = here.sim.fault("kill_client_at", pid=run.pid, method=method, skip=skip)
        run.go()
        here.sim.clear_faults(fault)
        if run.status == 0:  # asked as often as it takes
            take_away(here)
            continue
        if "restored:" in run.out:
            take_away(here)
        assert run.status == -signal.SIGKILL, (method, run)
        forget(here)
        result = runs(here).go()
        assert result.status == 0, (method, skip, result)
        assert len(here.new("VM" if kind == "vm-export" else "VDI")) == 1, (method, skip, result)
        take_away(here)
        here.assert_nothing_new()


@pytest.mark.parametrize("kind", ["vm-export", "vdi-export"])
def test_stopped_at_every_call(here, runs, kind):
    here.back_up("%s=%s" % (kind, VM))
    for method, skip in calls_of(here, runs):
        run = runs(here)
        fault = here.sim.fault("kill_client_at", pid=run.pid, method=method, skip=skip,
                               signal=int(signal.SIGTERM))
        run.go()
        here.sim.clear_faults(fault)
        if "restored:" in run.out or run.status == 0:
            take_away(here)
        else:
            assert run.status == 143, (method, run)
        try:
            here.assert_nothing_new()
        except AssertionError as error:
            raise AssertionError("stopped at %s, %d: %s" % (method, skip, run)) from error
        here.sim.fault("task_vanish")  # one that was destroyed before the host began is its own


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("after", [0, MIB, 3 * MIB])
def test_stopped_while_it_is_sent(here, runs, number, after):
    here.back_up()
    here.sim.fault("import_slow_cleanup", seconds=1)
    run = runs(here)
    here.sim.fault("kill_client_at", pid=run.pid, path="/import", after=after, signal=int(number))
    here.sim.fault("export_silence", path="/import", after=after, seconds=1)
    run.go()
    assert run.status == 128 + number, run
    here.assert_nothing_new()


FAULTS = [
    ("export_reset", {"after": 5 * MIB}), ("export_fail", {"after": 5 * MIB}),
    ("export_fail", {"after": MIB, "error_info": ["VDI_IO_ERROR", "Device I/O error"]}),
    ("export_cancel", {"after": MIB}), ("export_fail_silent", {"after": MIB}),
    ("export_401", {}), ("export_500", {}), ("export_empty_reply", {}), ("export_431", {}),
    ("import_400", {}), ("vdi_create_error", {}), ("vdi_create_error", {"skip": 1}),
    ("export_cut", {"after": 5 * MIB, "task": "vanish"}),
    ("export_cut", {"after": 5 * MIB, "task": "failure", "error_info": ["INTERNAL_ERROR", "x"]}),
    ("xapi_restart", {"after": 5 * MIB}), ("export_302", {}), ("task_never_completes", {}),
]


@pytest.mark.parametrize("fault, options", FAULTS)
def test_what_fails_at_the_host_leaves_nothing(here, runs, fault, options):
    here.back_up()
    if not fault.startswith("vdi_"):
        options = dict(options, path="/import")
    here.sim.fault(fault, **options)
    run = runs(here, **({"STALLED": 1, "IMPORT_ENDS": 1}
                          if fault == "task_never_completes" else {})).go()
    assert run.status == 2, run
    assert "restored:" not in run.out
    here.sim.clear_faults()
    if fault == "xapi_restart":
        forget(here)
    if fault == "task_never_completes":  # as long as it has not ended, nothing is touched
        (ref,) = here.new("VM")
        assert "still at work" in the_next(here, runs).out
        assert ref in here.new("VM")
        here.sim.fault("xapi_restart")
        the_next(here, runs)
    here.assert_nothing_new()


@pytest.mark.parametrize("fault, options", [
    ("export_reset", {"after": MIB}), ("export_fail", {"after": MIB}), ("export_401", {}),
    ("export_500", {}), ("xapi_restart", {"after": MIB}), ("slow_detach", {"seconds": 1})])
def test_what_fails_with_a_disk_leaves_nothing(here, runs, fault, options):
    here.back_up("vdi-export=" + VM)
    here.sim.fault(fault, path="/import_raw_vdi", **options)
    if fault == "slow_detach":
        here.sim.fault("export_fail", path="/import_raw_vdi")
    run = runs(here).go()
    assert run.status == 2, run
    if fault == "xapi_restart":
        forget(here)
    here.sim.clear_faults()
    here.assert_nothing_new()


def test_a_storage_that_is_full(here, runs):
    here.back_up()
    here.sim.set("SR", "Thick", "physical_utilisation", 36 * MIB)
    run = runs(here, "sr=Thick").go()
    assert run.status == 2, run
    assert "may not fit" in run.out
    assert "no space" in run.out
    here.assert_nothing_new()


@pytest.mark.parametrize("cls", ["VDI", "VM", "network"])
def test_what_the_hosts_own_clean_up_leaves_goes_too(here, runs, cls):
    here.back_up()
    here.sim.set("network", "DMZ", "bridge", "xenbr8")
    here.sim.set("network", "DMZ", "name_label", "no more")
    here.remember()
    here.sim.fault("import_leaves", cls=cls)
    here.sim.fault("export_fail", path="/import", after=5 * MIB)
    run = runs(here).go()
    assert run.status == 2, run
    here.assert_nothing_new()


@pytest.mark.parametrize("after", [0, MIB, 3 * MIB, 8 * MIB])
def test_what_a_killed_restore_leaves_where_xapi_dies_too(here, runs, after):
    here.back_up()
    here.sim.set("network", "DMZ", "bridge", "xenbr8")
    here.sim.set("network", "DMZ", "name_label", "no more")
    here.remember()
    run = runs(here)
    here.sim.fault("kill_client_at", pid=run.pid, path="/import", after=after)
    here.sim.fault("export_cut", path="/import", after=after, task="vanish")
    run.go()
    here.sim.clear_faults()
    here.sim.fault("session_lost")
    assert notes(here)
    result = runs(here).go()
    assert result.status == 0, result
    assert len(here.new("VM")) == 1
    assert len(here.new("VDI")) == 2
    assert len(here.new("network")) == 1
    assert notes(here) == []


def copy_of(here, name):
    """A clone as VM.clone makes it: other_config comes along."""
    record = here.sim.record("VM", name)
    here.sim.add_vm({"name": "clone", "other_config": record["other_config"],
                     "disks": [{"size": MIB, "name": "clone's disk"}]})


@pytest.mark.parametrize("deed", ["start", "rename", "snapshot", "disk", "share", "clone"])
def test_what_somebody_took_into_use_is_left(here, runs, deed):
    here.back_up()
    ref, record = debris(here, runs)
    session = XenAPI.Session(here.sim.http)
    session.login_with_password(here.sim.username, here.sim.password)
    api = session.xenapi
    vdis = {record["VDI"] for record in here.sim.records("VBD").values() if record["VM"] == ref}
    if deed == "start":
        time.sleep(1.1)
        api.VM.start(ref, False, False)
        api.VM.hard_shutdown(ref)
    elif deed == "rename":
        api.VM.set_name_label(ref, "mine")
    elif deed == "snapshot":
        api.VM.snapshot(ref, "my snapshot")
    elif deed == "clone":
        copy_of(here, record["uuid"])
    else:
        vdi = api.VDI.create({
            "name_label": "mine", "name_description": "", "SR": here.sim.ref("SR", "Storage"),
            "virtual_size": str(2 * MIB), "type": "user", "sharable": False, "read_only": False,
            "other_config": {}})
        vm = ref if deed == "disk" else here.sim.ref("VM", "other")
        api.VBD.create({
            "VM": vm, "VDI": vdi if deed == "disk" else sorted(vdis)[0], "userdevice": "9",
            "bootable": False, "mode": "RW", "type": "Disk", "empty": False, "other_config": {},
            "qos_algorithm_type": "", "qos_algorithm_params": {}})
    session.logout()
    vms, disks = set(here.sim.records("VM")), set(here.sim.records("VDI"))
    result = the_next(here, runs)
    assert vms <= set(here.sim.records("VM"))
    assert disks <= set(here.sim.records("VDI"))
    assert record["uuid"] in result.out
    assert "left alone" in result.out
    assert notes(here) == []
    result = the_next(here, runs)
    assert "left alone" not in result.out


def test_a_disk_that_somebody_took_into_use_is_left(here, runs):
    here.back_up("vdi-export=" + VM)
    run = runs(here)
    here.sim.fault("kill_client_at", pid=run.pid, path="/import_raw_vdi", after=MIB)
    run.go()
    forget(here)
    (ref,) = here.new("VDI")
    session = XenAPI.Session(here.sim.http)
    session.login_with_password(here.sim.username, here.sim.password)
    session.xenapi.VBD.create({
        "VM": here.sim.ref("VM", "other"), "VDI": ref, "userdevice": "9", "bootable": False,
        "mode": "RW", "type": "Disk", "empty": False, "other_config": {}, "qos_algorithm_type": "",
        "qos_algorithm_params": {}})
    session.logout()
    result = runs(here).go()
    assert result.status == 0, result
    assert "left alone" in result.out
    assert ref in here.sim.records("VDI")


def test_notes_of_other_pools_of_living_restores_and_nonsense(here, runs):
    here.back_up()
    ref, _ = debris(here, runs)
    (note,) = notes(here)
    facts = json.loads(note.read_text())
    note.write_text(json.dumps(dict(facts, pool="another")))
    the_next(here, runs)
    assert note.exists()
    assert ref in here.sim.records("VM")
    note.write_text(json.dumps(facts))
    note.chmod(0o666)  # anybody may have written it
    the_next(here, runs)
    assert ref in here.sim.records("VM")
    note.chmod(0o600)
    os.mkfifo(str(note.parent / (".restore-%s.json" % ("0" * 36))))
    (note.parent / (".restore-%s.json" % ("1" * 36))).symlink_to(note)
    (note.parent / (".restore-%s.json" % ("2" * 36))).write_text("")
    the_next(here, runs)
    assert ref not in here.sim.records("VM")
    assert not note.exists()


def test_a_restore_and_a_prune_do_not_meet(turn):
    here = Here(turn(a_pool()))
    here.back_up("vm-export=" + VM, "max_backups=1")
    here.sim.fault("export_silence", path="/import", after=4 * MIB, seconds=4)
    from support.harness import finish, start
    process = start("restore", here.sim.password, here.site.config, VM)
    while not list(here.site.backups.glob(".restore-*.json")):
        time.sleep(0.05)
    result = here.site.run()
    assert result.status == 1, result
    assert here.folder.exists()
    assert finish(process).status == 0
    result = here.site.run()
    assert result.status == 0, result
    assert not here.folder.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts")
def test_where_backup_dir_cannot_be_written(here, runs):
    here.back_up()
    import subprocess
    top = str(here.site.backups)
    done = subprocess.run(["mount", "--bind", "-o", "ro", top, top])
    if done.returncode:
        pytest.skip("no mounts here")
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", top], check=True)
        result = runs(here).go()
        assert result.status == 0, result
        assert "WARNING" in result.out
    finally:
        subprocess.run(["umount", top], check=True)

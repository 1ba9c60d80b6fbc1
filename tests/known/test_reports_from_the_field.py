# SPDX-License-Identifier: GPL-3.0-or-later
"""Hosts that lack calls, fields or rights: a backup is made where one can be, else one line says
why not. And the snapshots on a pool that only look as if they were this program's."""
import json
import re

import pytest
from simulator.pool import MIB, Pool, disk, snapshot, vif
from support.harness import vmbackup

CLASSES = ("VM", "VBD", "VDI", "SR", "VIF", "network", "VM_guest_metrics", "host", "pool")
UNKNOWN = "MESSAGE_METHOD_UNKNOWN"
OTHERS = "snapshot=8d1bd05c-0000-4000-8000-000000000001"


def some_vms():
    pool = Pool()
    pool.vm("web", power_state="Running", vifs=[vif()], os_version="Debian 12", disks=[
        disk(MIB + 512, "root", seed=1, device="xvda"), disk(MIB, "data", seed=2, device="xvdb")])
    pool.vm("db", disks=[disk(MIB, "db", seed=3, device="xvda")])
    pool.template("golden")
    return pool


@pytest.fixture
def here(turn):
    made = turn(some_vms())
    made.report = made.path / "report.json"
    made.configure("vm-export=web", "vdi-export=db", "report_json=%s" % made.report)
    return made


def backs_up(here):
    """A preview and a run that are good in every respect; returns the calls of the run."""
    result = here.run("preview")
    assert result.status == 0, result
    here.sim.reset_calls()
    result = here.run()
    assert result.status == 0, result
    assert result.lines[-1] == "VmBackup ended - Success - S:2 W:0 E:0"
    calls = [(call["method"], call["outcome"]) for call in here.sim.calls()]
    assert len(here.folders("web")) == len(here.folders("db")) == 1
    assert vmbackup("verify", here.config).status == 0
    here.assert_pool_is_clean()
    return calls


def not_started(here, *words):
    """The one line of an error that ended a run before it began; report_json tells the same."""
    result = here.run(*words)
    assert result.status == 3, result
    errors = [line for line in result.lines if "ERROR" in line]
    assert errors == [result.lines[-1]]
    if "preview" not in words:
        told = json.loads(here.report.read_text(encoding="utf-8"))
        assert (told["status"], told["exit_status"], told["vms"]) == ("ERROR", 3, [])
        assert errors[0] == "ERROR - " + told["error"]
        here.report.unlink()
    assert not here.report.exists()
    assert not here.status_log.exists()
    assert list(here.backups.iterdir()) == []
    here.assert_pool_is_clean()
    return errors[0]


# --- what may be missing --------------------------------------------------------------------------

def test_records_without_the_fields_that_came_later_or_are_gone(here):
    for cls, fields in (("VM", ["suspend_VDI", "guest_metrics", "ha_restart_priority"]),
                        ("VBD", ["device"]), ("VDI", ["physical_utilisation"]),
                        ("pool", ["name_label"])):
        here.sim.fault("fields_missing", cls=cls, fields=fields)
    backs_up(here)
    (folder,) = here.folders("web")
    assert sorted(path.name for path in folder.glob("DISK-*")) == ["DISK-0", "DISK-1"]
    assert "os_version=\n" in (folder / "vm.cfg").read_text()
    assert json.loads(here.report.read_text(encoding="utf-8"))["pool"] == ""


def test_no_snapshot_call_with_a_task(here):
    for method in ("Async.VM.snapshot", "Async.VDI.snapshot"):
        here.sim.fault("rpc_error", method=method, immediate=True, error_info=[UNKNOWN, method])
    calls = backs_up(here)
    for method in ("VM.snapshot", "VDI.snapshot"):
        assert calls.count(("Async." + method, UNKNOWN)) == 1
        assert calls.count((method, "Success")) == 1


@pytest.mark.parametrize("how", ["finds nothing", "is not there"])
def test_no_filter_of_records(here, how):
    if how == "finds nothing":
        here.sim.fault("where_empty")
    else:
        for cls in CLASSES:
            method = cls + ".get_all_records_where"
            here.sim.fault("rpc_error", method=method, error_info=[UNKNOWN, method])
    calls = backs_up(here)
    filtered = {outcome for method, outcome in calls if method.endswith("_where")}
    assert filtered == {"Success" if how == "finds nothing" else UNKNOWN}
    assert here.run("preview").has("VMs-not-in-backup: ")


# --- what may not ---------------------------------------------------------------------------------

def test_an_error_of_the_program_itself_is_one_line(here):
    """Here by records without the name, which no XAPI ever leaves out."""
    here.sim.fault("fields_missing", cls="VM", fields=["name_label"])
    for words in ([], ["preview"]):
        line = not_started(here, *words)
        assert re.match("ERROR - internal error, please report it: KeyError at line [0-9]+:"
                        " 'name_label'$", line)


def test_a_user_without_the_right_to_look(here):
    here.sim.fault("rpc_error", method="pool.get_all_records", error_info=[
        "RBAC_PERMISSION_DENIED", "pool.get_all_records", "no role"])
    for words in ([], ["preview"]):
        line = not_started(here, *words)
        assert "RBAC_PERMISSION_DENIED pool.get_all_records" in line
        assert "pool-admin" in line


# --- whose snapshot it is -------------------------------------------------------------------------

def test_a_key_is_proof_unless_it_was_inherited(turn):
    """A VM that was imported from a backup bears its snapshot's key, and so do those that somebody
    else takes of it: they are not ours."""
    pool = Pool()
    marks = {"a uuid": "8d1bd05c-0000-4000-8000-000000000002", "one": "1", "nothing": None,
             "another's": OTHERS}
    for name, own in (("web", None), ("db", "1"), ("mail", OTHERS)):
        pool.vm(name, other_config={"vmbackup": own} if own else {},
                disks=[disk(MIB, name, seed=name)],
                snapshots=[snapshot("%s of %s" % (what, name), other_config={"vmbackup": key})
                           if key else snapshot("%s of %s" % (what, name))
                           for what, key in marks.items()])
    here = turn(pool)
    for ref, record in here.sim.records("VDI").items():
        if record["is_a_snapshot"]:
            here.sim.set("VDI", ref, "other_config", {"vmbackup": OTHERS})
    here.configure("vm-export=.*")
    before = here.snapshots()
    assert len(before) == 12
    result = here.run()
    assert result.status == 0, result
    ours = ["a uuid of web", "one of web", "a uuid of db", "a uuid of mail", "one of mail"]
    left = sorted(set(before) - set(ours))
    assert here.snapshots() == left
    assert sum("removing the leftover snapshot" in line for line in result.lines) == len(ours)
    assert not result.has("VDI snapshot")
    here.assert_pool_is_clean(left)
    for name in ("web", "db", "mail"):
        assert len(here.sim.disks_of("nothing of " + name)) == 1
    # A second run finds nothing to remove, and again leaves these.
    assert not here.run().has("removing the leftover")
    here.assert_pool_is_clean(left)


@pytest.mark.parametrize("fault", ["rpc_http", "rpc_drop"])
def test_a_host_that_breaks_off_at_its_filter_is_not_asked_so_again(here, fault):
    for cls in CLASSES:
        here.sim.fault(fault, method=cls + ".get_all_records_where")
    calls = backs_up(here)
    assert len([method for method, _ in calls if method.endswith("_where")]) <= 2

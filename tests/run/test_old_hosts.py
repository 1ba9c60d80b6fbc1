# SPDX-License-Identifier: GPL-3.0-or-later
"""Hosts that lack calls, fields or rights: a backup is made where one can be, else one line says
why not."""
import json

import pytest
from simulator.pool import MIB, Pool, disk, vif
from support.harness import vmbackup
from support.world import SERVER

UNKNOWN = "MESSAGE_METHOD_UNKNOWN"


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
    if here.status_log.exists():
        lines = [line.split(",", 3) for line in here.status_log.read_text().splitlines()]
        assert [line[1:] for line in lines] == [
            ["vmbackup.py", SERVER, "begin"], ["vmbackup.py", SERVER, "end,ERROR," + told["error"]]]
        here.status_log.unlink()
    else:
        assert "preview" in words
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


# --- what may not ---------------------------------------------------------------------------------

def test_no_snapshot_call_with_a_task(here):
    for method in ("Async.VM.snapshot", "Async.VDI.snapshot"):
        here.sim.fault("rpc_error", method=method, immediate=True, error_info=[UNKNOWN, method])
    result = here.run()
    assert result.status == 2, result
    for kind, vm in (("vm-export", "web"), ("vdi-export", "db")):
        (line,) = [line for line in result.lines if "%s %s - ***ERROR***" % (kind, vm) in line]
        assert UNKNOWN in line and "too old" in line
        assert not here.folders(vm, marked=False)
    here.assert_pool_is_clean()


def test_a_record_that_lacks_something_is_the_hosts_fault_in_one_line(here):
    """Here the name, which no XAPI ever leaves out."""
    here.sim.fault("fields_missing", cls="VM", fields=["name_label"])
    for words in ([], ["preview"]):
        line = not_started(here, *words)
        assert line == "ERROR - the host tells no name_label of an object: is its XAPI supported?"


def test_a_user_without_the_right_to_look(here):
    here.sim.fault("rpc_error", method="pool.get_all_records", error_info=[
        "RBAC_PERMISSION_DENIED", "pool.get_all_records", "no role"])
    for words in ([], ["preview"]):
        line = not_started(here, *words)
        assert "RBAC_PERMISSION_DENIED pool.get_all_records" in line
        assert "pool-admin" in line



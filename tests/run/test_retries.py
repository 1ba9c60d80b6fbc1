# SPDX-License-Identifier: GPL-3.0-or-later
"""retries=: what failed is tried again when all others are done, but not what cannot change."""
import json
import re

import pytest
from simulator.pool import MIB, disk
from support.world import IMPATIENT, pool_of


def a_site(turn, *lines, names=("a", "b", "c")):
    site = turn(pool_of(*names, power_state="Running"))
    site.report = site.path / "report.json"
    site.configure("vm-export=.*", "report_json=%s" % site.report, *lines)
    return site


def told_of(site):
    """{VM: its object in report_json}, in the order in which they ended."""
    return {vm["name"]: vm for vm in json.loads(site.report.read_text(encoding="utf-8"))["vms"]}


def exports(site):
    """The VMs of which a snapshot was asked for, in order."""
    return [call["args"][2][len("RESTORE_"):] for call in site.sim.calls()
            if call["method"] == "Async.VM.snapshot"]


@pytest.mark.parametrize("parallel", [1, 3])
def test_what_a_later_try_saved_is_a_warning(turn, parallel):
    site = a_site(turn, "retries=2", "parallel=%d" % parallel)
    site.sim.fault("export_fail", vm="a", after=1000, times=2)
    result = site.run(constants=IMPATIENT)
    assert result.status == 1, result
    assert exports(site)[3:] == ["a", "a"]
    assert sorted(exports(site)[:3]) == ["a", "b", "c"]
    assert result.has("VmBackup vm-export a - ***WARNING*** t:0")
    assert not result.has("***ERROR***")
    (saved,) = [line for line in result.lines if line.startswith("a: WARNING ")]
    assert "try 3" in saved and "VDI_IO_ERROR" in saved
    assert result.lines[-1] == "VmBackup ended - **WARNING(s)** - S:2 W:1 E:0"
    told = told_of(site)
    assert {name: vm["attempts"] for name, vm in told.items()} == {"a": 3, "b": 1, "c": 1}
    assert told["a"]["status"] == "WARNING" and told["a"]["error"] is None
    assert len(told) == 3 and len(site.folders("a", marked=False)) == 1
    lines = [line.split(",", 3)[1:] for line in site.status_log.read_text().splitlines()]
    assert [re.sub(",elapse.*", "", line[2]) for line in lines if line[0] == "vm-export"
            and line[2].endswith(("a", "a,elapse:0 size:0G"))] == ["begin,a", "end,WARNING a"]
    site.assert_pool_is_clean()


def test_what_fails_each_time_is_told_once_and_in_the_end(turn):
    site = a_site(turn, "retries=1")
    site.sim.fault("export_fail", vm="a", after=1000)
    result = site.run(constants=IMPATIENT)
    assert result.status == 2, result
    ends = [line for line in result.lines if re.match("VmBackup vm-export . - ", line)]
    assert [line.split()[2] for line in ends] == ["b", "c", "a"]
    assert sum("***ERROR***" in line for line in result.lines) == 1
    assert result.lines[-1] == "VmBackup ended - **ERRORS DETECTED** - S:2 W:0 E:1"
    assert told_of(site)["a"]["attempts"] == 2
    assert not site.folders("a", marked=False)
    site.assert_pool_is_clean()


def test_what_cannot_change_is_not_tried_again(turn):
    """A name that two bear or none, no space here, a blocked operation."""
    site = a_site(turn, "retries=3", "vm-export=gone", names=("a", "blocked", "huge", "twin"))
    site.sim.add_vm({"name": "twin", "disks": [disk(MIB)]})
    site.sim.set("VDI", "huge", "virtual_size", 1 << 60)
    site.sim.set("VDI", "huge", "physical_utilisation", 1 << 60)
    site.sim.set("VM", "blocked", "blocked_operations", {"snapshot": "by Jo"})
    result = site.run()
    assert result.status == 2, result
    assert not result.has("again")
    assert {name: vm["attempts"] for name, vm in told_of(site).items()} == dict.fromkeys(
        ("a", "blocked", "gone", "huge", "twin"), 1)
    assert exports(site) == ["a"]


def test_the_pool_database_is_tried_again_too(turn):
    site = a_site(turn, "retries=1", "pool_db_backup=1")
    site.sim.fault("export_fail", path="/pool/xmldbdump", times=1)
    result = site.run(constants=IMPATIENT)
    assert result.status in (0, 1), result
    assert len(list(site.backups.glob("METADATA_*/pool_db_*.dump"))) == 1
    database = json.loads(site.report.read_text(encoding="utf-8"))["pool_database"]
    assert database["error"] is None and database["attempts"] == 2

# SPDX-License-Identifier: GPL-3.0-or-later
"""Every error of XAPI that somebody can meet comes with its code and with what to do about it.

All codes are tried in one run, each on a VM of its own that bears the code's name.
"""
import re

import pytest
from simulator.pool import MIB, Pool, cd, disk
from support.harness import finish, hasty
from support.world import IMPATIENT

import vmbackup as program

# Words that the advice may not lack, whatever else it says.
CODES = {
    "HANDLE_INVALID": "gone.*restarted",
    "HOST_IS_SLAVE": "master.*host=",
    "HOST_STILL_BOOTING": "starting.*try again",
    "INTERNAL_ERROR": "/var/log/xensource.log",
    "LICENCE_RESTRICTION": "licence",
    "MESSAGE_METHOD_UNKNOWN": "too old",
    "NO_HOSTS_AVAILABLE": "ISO.*xe vm-cd-eject",
    "NOT_SUPPORTED_DURING_UPGRADE": "upgrade.*again after",
    "OPERATION_BLOCKED": "administrator.*blocked_operations",
    "OTHER_OPERATION_IN_PROGRESS": "xe task-list",
    "RBAC_PERMISSION_DENIED": "role.*pool-admin",
    "SESSION_AUTHENTICATION_FAILED": "wrong user name or password",
    "SESSION_INVALID": "restarted",
    "SR_BACKEND_FAILURE_44": "no space",
    "SR_BACKEND_FAILURE_109": "chain.*delete snapshots.*coalesce",
    "SR_OPERATION_NOT_SUPPORTED": "cannot take snapshots",
    "VDI_IO_ERROR": "check its storage",
    "VDI_IS_SHARABLE": "shared disks",
    "VDI_ON_BOOT_MODE_INCOMPATIBLE_WITH_OPERATION": "reset on boot",
    "VDI_TOO_LARGE": "2040 GiB.*use raw",
    "VM_HAS_VUSBS": "USB",
    "SR_BACKEND_FAILURE_1200": "/var/log/SMlog",  # one of the many without a sentence of its own
}
PARAMETER = "what it was about"


def test_each_advice_has_its_test():
    assert set(program.ADVICE) == set(CODES) - {"SR_BACKEND_FAILURE_1200"} | {"SR_BACKEND_FAILURE_"}
    for code, words in CODES.items():
        assert re.search(words, program.ADVICE.get(code, words)), code


def pool_of_codes():
    pool = Pool()
    for code in list(CODES) + ["witness"]:
        pool.vm(code, power_state="Running", disks=[disk(MIB + 512, code, seed=code)])
    return pool


def reasons(result, kind):
    """{VM: reason of its ERROR, or what else its line says}"""
    found = [re.match(r"VmBackup %s (\S+) - (?:\*\*\*ERROR\*\*\* )?(.*)" % kind, line)
             for line in result.lines]
    return {match.group(1): match.group(2) for match in found if match}


def assert_advised(reason, code, parameter=PARAMETER):
    """Code, parameter and advice, in that order."""
    shown = " " + parameter if parameter else ""
    advice = program.ADVICE.get(code)
    sentence = re.escape("%s%s (%s" % (code, shown, advice + ")" if advice else ""))
    assert re.search(sentence, reason), reason
    assert re.search(CODES[code], reason), reason


@pytest.mark.parametrize("kind, fault, where", [
    ("vm-export", "snapshot_error", {}),
    ("vdi-export", "snapshot_error", {}),
    ("vm-export", "export_fail", {"after": MIB}),           # a page of text in the body
    ("vm-export", "export_fail_silent", {"after": MIB}),    # the task alone tells
    ("vm-export", "export_fail_after_whole", {}),
    ("vm-export", "export_empty_reply", {}),
    ("vm-export", "export_500", {}),
    ("vdi-export", "export_fail_silent", {"after": MIB, "path": "/export_raw_vdi"}),
    ("vdi-export", "export_500", {"path": "/export_raw_vdi"}),
])
def test_every_code_with_its_advice_in_the_reason(turn, kind, fault, where):
    here = turn(pool_of_codes())
    here.configure(kind + "=.*", "parallel=4")
    for code in CODES:
        of_what = "vdi" if kind == "vdi-export" else "vm"
        here.sim.fault(fault, error_info=[code, PARAMETER], **dict(where, **{of_what: code}))
    result = finish(hasty(here, "host=" + here.sim.http, **IMPATIENT))
    assert result.status == 2, result
    assert [item["fired"] for item in here.sim.faults()] == [1] * len(CODES)
    found = reasons(result, kind)
    assert found.pop("witness").startswith("***Success***")
    assert set(found) == set(CODES)
    for code, reason in found.items():
        assert_advised(reason, code)
    here.assert_pool_is_clean()


def test_what_the_hosts_own_checks_refuse(turn):
    """Not injected: the pool itself is so that a snapshot or an export is refused."""
    pool = Pool()
    pool.sr("cannot", type="iscsi", snapshot=False)
    pool.vm("SR_OPERATION_NOT_SUPPORTED", disks=[disk(MIB, sr="cannot")], power_state="Running")
    pool.vm("VDI_IS_SHARABLE", disks=[disk(MIB, sharable=True)], power_state="Running")
    pool.vm("OPERATION_BLOCKED", disks=[disk(MIB)], blocked_operations={"snapshot": "no touch"})
    pool.vm("VDI_ON_BOOT_MODE_INCOMPATIBLE_WITH_OPERATION", disks=[disk(MIB, "resets")],
            power_state="Running")
    pool.vm("NO_HOSTS_AVAILABLE", disks=[disk(MIB)], cds=[cd("tools.iso")])
    for vm in pool.description["vms"]:
        vm["power_state"] = "Running"  # a halted one would be exported as it is
    here = turn(pool)
    here.sim.set("VDI", "resets", "on_boot", "reset")
    iso = here.sim.ref("SR", "ISOs")
    for pbd in here.sim.records("PBD").values():
        if pbd["SR"] == iso:
            here.sim.set("PBD", pbd["uuid"], "currently_attached", False)
    here.configure("vm-export=.*")
    result = here.run()
    assert result.status == 2, result
    found = reasons(result, "vm-export")
    assert len(found) == 5
    for code, reason in found.items():
        assert "%s" % code in reason
        assert program.ADVICE[code] in reason, reason
    assert "no touch" in found["OPERATION_BLOCKED"]
    assert not here.folders("NO_HOSTS_AVAILABLE", marked=False)


@pytest.mark.parametrize("code", ["HOST_STILL_BOOTING", "RBAC_PERMISSION_DENIED", "INTERNAL_ERROR",
                                  "LICENCE_RESTRICTION", "NOT_SUPPORTED_DURING_UPGRADE"])
def test_codes_at_the_login(turn, code):
    here = turn(pool_of_codes())
    here.configure("vm-export=.*")
    here.sim.fault("login_error", error_info=[code, PARAMETER])
    result = here.run()
    assert result.status == 3, result
    errors = [line for line in result.lines if line.startswith("ERROR")]
    assert errors == [result.lines[-1]]
    assert_advised(errors[0], code)


def test_a_snapshot_that_cannot_be_destroyed_is_a_warning_with_advice(turn):
    here = turn(pool_of_codes())
    here.configure("vm-export=.*", "exclude=witness", "parallel=4")
    codes = [code for code in CODES if code not in ("HANDLE_INVALID", "HOST_IS_SLAVE")]
    for code in codes:  # one is a snapshot that is gone, the other another host to ask
        here.sim.fault("vm_destroy_error", vm=code, error_info=[code, PARAMETER])
    result = finish(hasty(here, "host=" + here.sim.http, **IMPATIENT))
    assert result.status == 1, result
    for code in codes:
        (line,) = [line for line in result.lines if line.startswith(code + ": WARNING")]
        assert_advised(line, code)


def test_the_pool_databases_reason(turn):
    here = turn(pool_of_codes())
    here.configure("vm-export=witness", "pool_db_backup=1")
    code = "RBAC_PERMISSION_DENIED"
    here.sim.fault("export_500", path="/pool/xmldbdump", error_info=[code, PARAMETER])
    result = here.run()
    assert result.status == 2, result
    (line,) = [line for line in result.lines if "pool database backup failed" in line]
    assert_advised(line, code)


def test_what_rbac_hides_is_told(turn):
    """From v24.34 on another handler's failure comes wrapped in this code."""
    here = turn(pool_of_codes())
    here.configure("vm-export=witness")
    here.sim.fault("snapshot_error", error_info=[
        "RBAC_PERMISSION_DENIED", "VM.snapshot", "VDI_IO_ERROR: [ Device I/O errors ]"])
    result = here.run()
    assert program.ADVICE["VDI_IO_ERROR"] in reasons(result, "vm-export")["witness"]
    assert not result.has(program.ADVICE["RBAC_PERMISSION_DENIED"])


def test_a_long_reason_is_told_to_its_end(turn):
    """That of the storage driver often ends in what it is all about."""
    here = turn(pool_of_codes())
    here.configure("vm-export=witness", "vdi-export=VDI_IO_ERROR",
                   "report_json=%s/report.json" % here.path)
    long = ["SR_BACKEND_FAILURE_47", "", "The SR is not available " + "x" * 1500
            + " the cause at last", ""]
    here.sim.fault("export_fail", after=MIB, error_info=long)
    here.sim.fault("snapshot_error", vdi="VDI_IO_ERROR", error_info=long)
    result = here.run()
    assert result.status == 2, result
    for kind, vm in (("vm-export", "witness"), ("vdi-export", "VDI_IO_ERROR")):
        assert " ".join(item for item in long if item) + " (" in reasons(result, kind)[vm]
    report = (here.path / "report.json").read_text(encoding="utf-8")
    assert report.count("x the cause at last") == 2

# SPDX-License-Identifier: GPL-3.0-or-later
"""Password and session are told to nobody, and backups are readable by nobody else."""
import contextlib
import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from simulator.pool import MIB, Pool, disk, vif
from support.harness import ROOT, finish, start, vmbackup

PASSWORD = "Gr\u00fcn3s-Haus$(x)"


def site_of(turn):
    pool = Pool(password=PASSWORD)
    pool.vm("web", vifs=[vif()], disks=[disk(2 * MIB, seed=1), disk(8192, seed=2)])
    return turn(pool)


def frozen(site, words, umask=None, env=None, **moment):
    """A run that is stopped at that moment."""
    before = os.umask(0o022 if umask is None else umask)
    try:
        process = start(*words, env=env)
    finally:
        os.umask(before)
    site.sim.fault("kill_client_at", pid=process.pid, signal=signal.SIGSTOP, **moment)
    assert os.WIFSTOPPED(os.waitpid(process.pid, os.WUNTRACED)[1])
    return process


def password_file(site):
    path = site.path / "password"
    path.touch()
    path.unlink()
    assert vmbackup("-", "create-password-file=%s" % path,
                    input=PASSWORD.encode("utf-8") + b"\n").status == 0
    return path


def children(pid):
    found = []
    for task in Path("/proc/%d/task" % pid).iterdir():
        found += map(int, (task / "children").read_text().split())
    return found


def sessions(site):
    """The references of all sessions that calls were made with so far, open or not."""
    return {call["args"][0] for call in site.sim.calls()
            if call["kind"] == "rpc" and call["method"] != "session.login_with_password"}


def assert_told_nowhere(site, *texts):
    secrets = [PASSWORD.encode("utf-8")] + [ref.encode("ascii") for ref in sessions(site)]
    assert len(secrets) > 1
    for path in site.path.rglob("*"):
        if path.is_file() and path.name != "password":
            texts += (path.read_bytes(),)
    for secret in secrets:
        assert not [text for text in texts if secret in text], secret


@pytest.mark.parametrize("compress", ["False", "zstd"])
def test_neither_output_nor_files_nor_process_list_tell_a_secret(turn, compress):
    site = site_of(turn)
    secret = password_file(site)
    site.configure("vm-export=web", "compress=" + compress, "pool_db_backup=1",
                   "report_json=%s" % (site.path / "report.json"))
    process = frozen(site, [secret, site.config], after=2 * MIB)
    listed = []
    for pid in [process.pid] + children(process.pid):
        with contextlib.suppress(FileNotFoundError):
            listed += [Path("/proc/%d" % pid, name).read_bytes() for name in ("cmdline", "environ")]
    assert compress == "zstd" or not any(b"zstd" in text for text in listed)
    process.send_signal(signal.SIGCONT)
    result = finish(process)
    assert result.status == 0, result
    assert json.loads((site.path / "report.json").read_text(encoding="utf-8"))["vms"]
    assert_told_nowhere(site, result.raw, result.err.encode("utf-8"), *listed)


FAULTS = [
    ("session_lost", {"method": "VM.get_record", "times": 50}),
    ("export_302", {"to": 0}),
    ("export_302", {"location": "http://192.0.2.1/export"}),
    ("export_500", {}),
    ("export_401", {}),
    ("export_reset", {}),
    ("rpc_http", {"method": "VM.get_record"}),
    ("rpc_drop", {"method": "VM.add_to_other_config"}),
    ("login_error", {}),
]


@pytest.mark.parametrize("fault, options", FAULTS)
def test_no_failure_tells_a_secret(turn, fault, options):
    """XAPI's own error texts may name the session, and URLs do."""
    site = site_of(turn)
    site.configure("vm-export=web", "report_json=%s" % (site.path / "report.json"))
    site.sim.fault(fault, **options)
    result = site.run()
    assert result.status in (2, 3), result
    if fault != "login_error":
        assert_told_nowhere(site, result.raw, result.err.encode("utf-8"))
    assert PASSWORD not in result.out + result.err
    assert PASSWORD not in (site.path / "report.json").read_text(encoding="utf-8")


@pytest.mark.parametrize("fault", ["export_fail", "export_500"])
def test_xapi_naming_the_session_is_not_repeated(turn, fault):
    """SESSION_INVALID has the reference as its parameter, in tasks and error pages alike."""
    site = site_of(turn)
    site.configure("vm-export=web", "report_json=%s" % (site.path / "report.json"))
    process = frozen(site, [PASSWORD, site.config], method="GET /export_metadata")
    (session,) = site.sim.sessions()
    site.sim.fault(fault, error_info=["SESSION_INVALID", session])
    process.send_signal(signal.SIGCONT)
    result = finish(process)
    assert result.status == 2, result
    assert result.has("SESSION_INVALID")
    assert_told_nowhere(site, result.raw, result.err.encode("utf-8"))


@pytest.mark.parametrize("words", [
    [PASSWORD], [PASSWORD, "x=y"], [PASSWORD, "vm-export=web", "x=y"],
    [PASSWORD, "vm-export=web", "backup_dir=/nowhere"], [PASSWORD, "vm-export=(", "preview"],
    [PASSWORD, "create-password-file=/nowhere/x"]])
def test_no_refused_command_line_tells_the_password(words):
    result = vmbackup(*words)
    assert result.status == 3, result
    assert PASSWORD not in result.out + result.err


def assert_private(site):
    found = sorted(site.backups.rglob("*"))
    assert found
    for path in found:
        mode = stat.S_IMODE(path.lstat().st_mode)
        assert mode == (0o700 if path.is_dir() else 0o600), path


@pytest.mark.parametrize("umask, moment", [
    (0o000, {"method": "GET /pool/xmldbdump", "moment": "after"}),
    (0o000, {"method": "GET /export_metadata"}), (0o000, {"after": MIB}), (0o077, {"after": MIB})])
def test_modes_at_any_time(turn, umask, moment):
    site = site_of(turn)
    site.configure("vm-export=web", "pool_db_backup=1")
    process = frozen(site, [PASSWORD, site.config], umask=umask, **moment)
    assert_private(site)
    process.send_signal(signal.SIGCONT)
    assert finish(process).status == 0
    assert_private(site)


def test_modes_are_those_of_creation(turn):
    """Without umask and chmod a file cannot have been readable for a moment either."""
    site = site_of(turn)
    site.configure("vm-export=web", "pool_db_backup=1")
    code = ("import os, sys; sys.path.insert(0, %r); import vmbackup; os.umask(0);"
            " os.umask = lambda _: 0; os.chmod = None; sys.exit(vmbackup.main())")
    subprocess.run([sys.executable, "-c", code % str(ROOT), PASSWORD, str(site.config)], check=True,
                   stdout=subprocess.DEVNULL)
    assert_private(site)

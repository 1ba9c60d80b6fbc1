# SPDX-License-Identifier: GPL-3.0-or-later
"""The 23 known defects of VmBackup 3.25, numbered as in the project's notes: none may come back.

Each test provokes its defect and stands by itself, though other files test the matter in depth.
"""
import hashlib
import os
import re
import signal
import subprocess
import tarfile

import pytest
from simulator.pool import MIB, Pool, cd, disk, snapshot, vif
from support.harness import finish, start, vmbackup
from support.mail_server import MailServer
from support.upstream import folder_name, leave_backup, leave_pool_dump
from support.world import SERVER, cfg, pool_of, wait_until


def disk_in(xva):
    """The bytes of the one disk in an XVA without zero chunks, as hex of their SHA-256."""
    with tarfile.open(str(xva)) as archive:
        chunks = [name for name in archive.getnames() if re.search(r"/\d{8}\Z", name)]
        data = b"".join(archive.extractfile(name).read() for name in sorted(chunks))
    return hashlib.sha256(data).hexdigest()


def test_defect_01_live_vm_called_RESTORE_x_survives(turn):
    here = turn(pool_of("x", "RESTORE_x"))
    here.sim.take_snapshot("RESTORE_x", "RESTORE_x")  # somebody's, of another VM
    here.configure("vm-export=x")
    result = here.run()
    assert result.status == 0, result
    names = [item["record"]["name_label"] for item in here.sim.destroyed() if item["class"] == "VM"]
    assert names == ["RESTORE_x"]  # the run's own
    assert here.sim.record("VM", "RESTORE_x")["is_a_snapshot"] is False
    assert here.snapshots() == ["RESTORE_x"]


def test_defect_02_a_snapshot_or_template_of_the_same_name_is_not_exported(turn):
    pool = Pool()
    pool.template("web", disks=[disk(MIB, "template", seed="t")])
    pool.vm("other", disks=[disk(MIB, "other", seed="o")],
            snapshots=[snapshot("web", disks=[disk(MIB, "snap", seed="s")])])
    pool.vm("web", disks=[disk(MIB, "live", seed="l")], uuid="11111111-2222-3333-4444-555555555555")
    here = turn(pool)
    here.configure("vm-export=web")
    result = here.run()
    assert result.status == 0, result
    assert disk_in(here.file("web")) == here.sim.disk_sha256("live")
    (folder,) = here.folders("web")
    assert cfg(folder / "vm.cfg")["orig_uuid"] == "11111111-2222-3333-4444-555555555555"


def test_defect_03_the_last_folder_without_a_marker_is_not_taken_for_a_failed_backup(turn):
    here = turn(pool_of("web"))
    leave_backup(here.backups, "web", 1)
    notes = here.backups / "web" / "pre-upgrade-keep"
    mine = here.backups / "web" / folder_name(2, month=12)  # even in a name like a backup's
    for folder in (notes, mine):
        folder.mkdir()
        (folder / "disk.img").write_text("precious")
    here.configure("vm-export=web")
    result = here.run()
    assert result.status == 0, result
    assert [(folder / "disk.img").read_text() for folder in (notes, mine)] == ["precious"] * 2


def test_defect_04_the_first_name_is_not_taken_for_the_oldest_backup(turn):
    here = turn(pool_of("web"))
    old = leave_backup(here.backups, "web", 1)
    top = here.backups / "web"
    (top / "@keep").mkdir()
    (top / "@keep" / "image").write_text("precious")
    (top / "00-README").write_text("a file, which rmtree cannot remove")
    here.configure("vm-export=web", "max_backups=1")
    result = here.run()
    assert result.status == 0, result
    assert (top / "@keep" / "image").exists()
    assert (top / "00-README").exists()
    assert not old.exists()
    assert len(here.folders("web")) == 1


def test_defect_05_a_failed_first_backup_neither_stays_nor_counts_nor_warns_for_ever(turn):
    here = turn(pool_of("web"))
    here.configure("vm-export=web", "max_backups=2")
    fault = here.sim.fault("export_fail", after=5000)
    assert here.run().status == 2
    assert not (here.backups / "web").exists()
    here.sim.clear_faults(fault)
    failed = leave_backup(here.backups, "web", 1, marker=None)  # 3.25's, alone in its VM's folder
    good = leave_backup(here.backups, "web", 2)
    result = here.run()
    assert result.status == 0, result
    assert result.lines[-1] == "VmBackup ended - Success - S:1 W:0 E:0"
    assert good.exists(), "pruned, as if the failed one were a copy"
    assert len(here.folders("web")) == 2
    assert failed not in here.folders("web")


@pytest.mark.parametrize("line, fault", [
    ("vm-export=web", {"name": "export_fail", "after": 2000}),
    ("vm-export=web", {"name": "rpc_error", "method": "VM.set_is_a_template",
                       "error_info": ["INTERNAL_ERROR", "no"]}),
    ("vdi-export=web", {"name": "export_fail", "path": "/export_raw_vdi"}),
    ("vdi-export=web", {"name": "rpc_error", "method": "VDI.set_name_label",
                        "error_info": ["INTERNAL_ERROR", "no"]}),
])
def test_defect_06_no_snapshot_stays_after_a_failure(turn, line, fault):
    here = turn(pool_of("web"))
    here.sim.fault(**fault)
    here.configure(line)
    result = here.run()
    assert result.status == 2, result
    assert [item["fired"] for item in here.sim.faults()] == [1]
    here.assert_pool_is_clean()


def test_defect_07_one_bad_vm_does_not_end_the_run(turn):
    pool = pool_of("a-broken", "Zürich", "plain", description="Umlaute: äöü\nund €",
                   power_state="Running")
    here = turn(pool)
    here.sim.fault("snapshot_error", vm="a-broken")
    here.configure("vm-export=a-broken", "vm-export=gone", "vm-export=Zürich", "vm-export=plain")
    result = here.run(env={"LC_ALL": "C"})
    assert result.status == 2, result
    assert result.lines[-1] == "VmBackup ended - **ERRORS DETECTED** - S:2 W:0 E:2"
    assert here.file("Zürich").exists()
    assert here.file("plain").exists()


def test_defect_08_the_exit_status_tells_what_happened(turn):
    here = turn(pool_of("web"))
    here.configure("vm-export=web")
    assert here.run("preview").status == 0
    assert here.run().status == 0
    here.sim.fault("export_fail")
    assert here.run().status == 2


def test_defect_09_the_password_goes_to_no_host_in_clear_text(site):
    here = site(Pool(hosts=2))
    result = vmbackup("secret", ".*", "host=http://192.0.2.1", "backup_dir=%s" % here.backups)
    assert result.status == 3, result
    assert result.has("host=http://192.0.2.1 is not allowed")
    slave = here.sim.hosts[1]
    assert not slave["master"]
    vmbackup("secret", ".*", "preview", "host=%s" % slave["url"], "backup_dir=%s" % here.backups)
    calls = [call for call in here.sim.calls() if call["method"] == "session.login_with_password"]
    assert [call["host"] for call in calls] == [1, 0]  # the slave named its master
    assert {call["transport"] for call in here.sim.calls()} == {"tls"}


def test_defect_10_the_password_need_not_be_an_argument(turn, tmp_path):
    password = "b7Gq&x|Wz'5"
    pool = pool_of("web")
    pool.description["password"] = password
    here = turn(pool)
    here.configure("vm-export=web", "compress=zstd")
    here.sim.fault("export_rate", bytes=20000)
    process = start("-", here.config, stdin=subprocess.PIPE)
    process.stdin.write(password.encode() + b"\n")
    process.stdin.flush()
    wait_until(lambda: "GET /export" in here.sim.methods())
    listed = subprocess.check_output(["ps", "-A", "-ww", "-o", "args="]).decode()
    assert str(here.config) in listed
    assert password not in listed
    process.terminate()
    result = finish(process)
    assert result.status == 128 + 15, result
    made = vmbackup("-", "create-password-file=%s" % (tmp_path / "pass"), input=password.encode())
    assert made.status == 0, made
    assert (tmp_path / "pass").stat().st_mode & 0o777 == 0o600
    here.sim.clear_faults()
    result = vmbackup(tmp_path / "pass", here.config, "preview")
    assert result.status == 0, result


def test_defect_11_a_name_never_reaches_a_shell(turn, tmp_path):
    names = ["$(touch pwned)", "`touch pwned`", "'; touch pwned; '", '"; touch pwned; "',
             "a|touch pwned"]
    here = turn(pool_of(*names))
    here.configure("vm-export=.*")
    result = here.run(cwd=tmp_path)
    assert result.status == 0, result
    for name in names:
        assert disk_in(here.file(name)) == here.sim.disk_sha256(name)
    assert not list(tmp_path.rglob("pwned"))


def test_defect_12_a_comma_in_a_name_makes_no_phantom_vms(turn):
    here = turn(pool_of("db, old", "web"))
    here.configure("vm-export=.*")
    result = here.run("preview")
    assert result.status == 0, result
    assert result.has("  vm-export (cnt)= 2")
    assert result.has("  vm-export: db, old, web")
    assert here.run().lines[-1] == "VmBackup ended - Success - S:2 W:0 E:0"
    assert disk_in(here.file("db, old")) == here.sim.disk_sha256("db, old")


@pytest.mark.parametrize("line, name, keep", [
    ("vm-export=web:prod", "web:prod", 4), ("vm-export=web:prod:3", "web:prod", 3),
    ("vm-export=a=b", "a=b", 4), ("vm-export=a=b:2", "a=b", 2), ("vm-export=web", "web", 4),
])
def test_defect_13_colons_and_equal_signs_in_values(turn, line, name, keep):
    here = turn(pool_of("web", "web:prod", "a=b"))
    here.configure(line)
    result = here.run("preview")
    assert result.status == 0, result
    assert result.has("  vm-export (cnt)= 1")
    assert result.has("  vm-export: %s" % (name if keep == 4 else "%s:%d" % (name, keep)))
    assert any(re.match(r"%s +vm-export .* 0/1 +-$" % re.escape(name), line)
               for line in result.lines)


def test_defect_14_a_dot_in_a_name_is_pointed_out_and_can_be_escaped(turn):
    """A value with a dot is a regular expression still, as the contract says; but no surprise."""
    here = turn(pool_of("a.b", "axb-and-more"))
    here.configure("vm-export=a.b")
    result = here.run("preview")
    assert result.has("  vm-export: a.b, axb-and-more")
    assert any(re.match("NOTE - vm-export=a[.]b: .* regular expression .*: axb-and-more$", line)
               for line in result.lines), result
    here.configure(r"vm-export=a\.b$")
    result = here.run("preview")
    assert result.has("VMs-not-in-backup: axb-and-more")
    assert "  vm-export: a.b" in result.lines
    assert not result.has("NOTE")


def test_defect_15_the_pool_database_is_dumped_whatever_the_host_is_called_and_pruned(turn):
    here = turn(pool_of("web"))  # its host is xen1, which this machine hopefully is not
    server = SERVER
    old = [leave_pool_dump(here.backups, server, "2019080%d-020000" % day) for day in (1, 2, 3)]
    foreign = here.backups / ("METADATA_" + server) / "notes.dump"
    foreign.write_text("mine")
    here.configure("vm-export=web", "pool_db_backup=1", "max_backups=2")
    result = here.run()
    assert result.status == 0, result
    dumps = sorted(foreign.parent.glob("pool_db_*.dump"))
    assert len(dumps) == 2
    assert dumps[0] == old[2]
    assert dumps[1].read_bytes().rstrip().endswith(b"</database>")
    assert foreign.exists()
    here.sim.fault("export_fail", path="/pool/xmldbdump", after=100)
    result = here.run()
    assert result.status == 2, result
    assert result.lines[-1] == "VmBackup ended - **ERRORS DETECTED** - S:1 W:0 E:1"
    assert sorted(foreign.parent.glob("pool_db_*")) == dumps


def test_defect_16_nothing_is_left_for_a_job_of_the_file_server(turn):
    """No export is marked success_compress, whose file a job elsewhere was to compress."""
    here = turn(pool_of("web"))
    huge = leave_backup(here.backups, "web", 1, marker="success_compress")
    here.configure("vm-export=web", "max_backups=2")
    assert here.run().status == 0
    assert [path.name for path in here.folders("web")[-1].glob("success*")] == ["success"]
    assert huge.exists()  # it counts as a backup
    assert here.run().status == 0
    assert not huge.exists()  # and is pruned as one


@pytest.mark.parametrize("value", ["web:0", "web:-1", "web.*:0"])
def test_defect_17_zero_copies_are_refused(turn, value):
    here = turn(pool_of("web"))
    here.configure("vm-export=" + value)
    result = here.run()
    assert result.status == 3, result
    assert result.has("vm-export=%s" % value)
    assert result.has("1 or more")
    assert not here.sim.calls()


def test_defect_18_a_day_and_more_is_told_in_full(turn, tmp_path, shim):
    """In the middle of the export all clocks go on by 25 hours."""
    site, jump = turn(pool_of("web")), tmp_path / "jump"
    site.configure("vm-export=web")
    process = site.start(env={"LD_PRELOAD": str(shim), "SHIM_JUMP": str(jump)})
    site.sim.fault("kill_client_at", pid=process.pid, after=3000, signal=signal.SIGSTOP)
    assert os.WIFSTOPPED(os.waitpid(process.pid, os.WUNTRACED)[1])
    jump.write_text(str(25 * 3600))
    process.send_signal(signal.SIGCONT)
    result = finish(process)
    assert result.status == 0, result
    assert result.has("VmBackup vm-export web - ***Success*** t:1500")
    assert "SUCCESS web,elapse:1500 size:0G" in site.status_log.read_text()


@pytest.mark.parametrize("kind", ["vm-export", "vdi-export"])
def test_defect_19_a_vm_that_never_ran_is_no_warning(turn, kind):
    pool = Pool()
    pool.vm("new", cds=[cd(device="")],
            disks=[disk(MIB, "first", seed=1, device=""), disk(MIB, "second", seed=2, device="")])
    here = turn(pool)
    here.configure("%s=new" % kind)
    result = here.run()
    assert result.status == 0, result
    assert result.has("VmBackup %s new - ***Success***" % kind)
    (folder,) = here.folders("new")
    assert cfg(folder / "DISK-1" / "vdi.cfg")["name_label"] == "second"
    if kind == "vdi-export":
        digest = hashlib.sha256((folder / "new.raw").read_bytes()).hexdigest()
        assert digest == here.sim.disk_sha256("first")


@pytest.mark.parametrize("fault, words, status", [
    (None, [], 0), (None, ["preview"], 0), ("snapshot_error", [], 2),
])
def test_defect_20_no_session_is_left(turn, fault, words, status):
    here = turn(pool_of("web", power_state="Running"))
    if fault:
        here.sim.fault(fault)
    here.configure("vm-export=web", "parallel=2")
    assert here.run(*words).status == status
    assert "session.login_with_password" in here.sim.methods()
    assert not here.sim.sessions()


def test_defect_21_metadata_is_that_of_the_exported_state(turn):
    pool = Pool()
    pool.vm("web", description="A", disks=[disk(MIB, seed=1)], vifs=[vif()])
    here = turn(pool)
    here.sim.fault("rpc_hang", method="VM.snapshot", seconds=0.5)
    here.sim.fault("rpc_hang", method="VM.set_is_a_template", seconds=0.5)
    here.configure("vm-export=web")
    process = here.start()
    for method, later in (("Async.VM.snapshot", "B"), ("VM.set_is_a_template", "C")):
        wait_until(lambda method=method: method in here.sim.methods())
        here.sim.set("VM", "web", "name_description", later)
    result = finish(process)
    assert result.status == 0, result
    (exported,) = [item["record"] for item in here.sim.destroyed() if item["class"] == "VM"]
    (folder,) = here.folders("web")
    assert cfg(folder / "vm.cfg")["name_description"] == exported["name_description"]
    assert here.sim.record("VM", "web")["name_description"] == "C"


def test_defect_22_mail_is_a_setting_and_the_status_log_is_kept(turn):
    here, server = turn(pool_of("web")), MailServer()
    try:
        here.configure("vm-export=web", *server.settings())
        assert here.run().status == here.run().status == 0
        assert len(server.mails) == 2
        lines = here.status_log.read_text().splitlines()
        assert [line.split(",")[3] for line in lines] == ["begin", "begin", "end", "end"] * 2
    finally:
        server.stop()


def test_defect_23_two_runs_do_not_meet_in_one_folder(turn):
    here = turn(pool_of("web"))
    here.sim.fault("export_rate", bytes=20000)
    here.configure("vm-export=web")
    first = here.start()
    wait_until(lambda: list(here.backups.glob("web/*/web.xva.partial")))
    before = sorted(here.backups.rglob("*"))
    second = here.run()
    assert second.status == 4, second
    assert sorted(here.backups.rglob("*")) == before
    assert here.snapshots() == ["RESTORE_web"]
    first.terminate()
    assert finish(first).status == 128 + 15
    here.sim.clear_faults()
    assert here.run().status == 0
    here.assert_pool_is_clean()

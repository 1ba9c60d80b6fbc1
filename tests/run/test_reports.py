# SPDX-License-Identifier: GPL-3.0-or-later
"""What a run leaves to read: the log, the status log, the exit status, report_json, in UTF-8."""
import calendar
import contextlib
import hashlib
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from simulator.pool import MIB, Pool, disk
from support.harness import SCRIPT, finish, vmbackup

import vmbackup as program

STAMP = r"\d{4}-\d\d-\d\d-\(\d\d:\d\d:\d\d\) - "
SERVER = socket.gethostname().split(".")[0]
# What cron gives, on a Python that must not make UTF-8 of it by itself.
ASCII = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0",
         "PYTHONCOERCECLOCALE": "0"}


def three_vms():
    pool = Pool()
    for name in ("web", "db", "old"):
        pool.vm(name, power_state="Running", disks=[disk(MIB, seed=name)])
    return pool


def status_lines(here):
    """The status log's lines without their times, which are looked at here."""
    lines = here.status_log.read_bytes().decode("utf-8").split("\n")
    assert lines.pop() == ""
    found = [re.match(r"\d{4}/\d\d/\d\d \d\d:\d\d:\d\d,(.*)", line) for line in lines]
    assert None not in found, lines
    return [match.group(1).replace("," + SERVER + ",", ",SERVER,") for match in found]


def test_a_good_run_in_log_and_status_log(turn):
    here = turn(three_vms())
    here.configure("vm-export=web", "vdi-export=db", "exclude=old")
    result = here.run()
    assert (result.status, result.err) == (0, "")
    assert all(re.match(STAMP + ".", line) for line in result.out.splitlines()), result.out
    ends = [line for line in result.lines if line.startswith("VmBackup ")]
    assert ends[1:] == [
        "VmBackup running on %s, pool pool, host %s" % (SERVER, here.sim.url[len("https://"):]),
        "VmBackup vdi-export db - ***Success*** t:0",
        "VmBackup vm-export web - ***Success*** t:0",
        "VmBackup ended - Success - S:2 W:0 E:0",
    ]
    assert result.lines[-1] == ends[-1]
    assert status_lines(here) == [
        "vmbackup.py,SERVER,begin",
        "vdi-export,SERVER,begin,db",
        "vdi-export,SERVER,end,SUCCESS db,elapse:0 size:0G",
        "vm-export,SERVER,begin,web",
        "vm-export,SERVER,end,SUCCESS web,elapse:0 size:0G",
        "vmbackup.py,SERVER,end,SUCCESS,S:2 W:0 E:0",
    ]
    assert here.sim.password not in result.out


def test_space_is_told_before_the_first_and_after_the_last(turn):
    here = turn(three_vms())
    here.configure("vm-export=web")
    lines = here.run().lines
    space = [line for line in lines if line.startswith("Space ")]
    for line, word in zip(space, ("before", "after")):
        number = r"\d+(\.\d)? (bytes|[KMGT]iB)"
        assert re.match(r"Space %s backups: %s total %s, used %s, free %s\Z" % (
            word, re.escape(str(here.backups)), number, number, number), line)
    assert len(space) == 2
    first, last = (lines.index(line) for line in space)
    mine = [number for number, line in enumerate(lines) if line.startswith("web: ")]
    assert first < min(mine)
    assert last > max(mine)


@pytest.mark.parametrize("prepare, lines, status, ending, texts, logged", [
    (None, ["vm-export=web"], 0, "Success - S:1 W:0 E:0", ["vm-export web - ***Success*** t:0"],
     ["vm-export,SERVER,end,SUCCESS web,elapse:0 size:0G",
      "vmbackup.py,SERVER,end,SUCCESS,S:1 W:0 E:0"]),
    (("vm_destroy_error", {}), ["vm-export=web"], 1, "**WARNING(s)** - S:0 W:1 E:0",
     ["vm-export web - ***WARNING*** t:0"],
     ["vm-export,SERVER,end,WARNING web,elapse:0 size:0G",
      "vmbackup.py,SERVER,end,WARNING,S:0 W:1 E:0"]),
    (None, ["vm-export=web", "vm-export=x.*"], 1, "**WARNING(s)** - S:1 W:0 E:0",
     ["***WARNING - vm not found: vm-export=x.*", "vm-export web - ***Success*** t:0"],
     ["vmbackup.py,SERVER,end,WARNING,S:1 W:0 E:0"]),
    (None, ["vm-export=web", "vm-export=gone"], 2, "**ERRORS DETECTED** - S:1 W:0 E:1",
     ["ERROR - vm(s) List does not exist: gone", "vm-export gone - ***ERROR*** "],
     ["vm-export,SERVER,begin,gone", "vmbackup.py,SERVER,end,ERROR,S:1 W:0 E:1"]),
    (("snapshot_error", {"vm": "web"}), ["vm-export=.*"], 2, "**ERRORS DETECTED** - S:2 W:0 E:1",
     ["vm-export web - ***ERROR*** ", "vm-export db - ***Success*** t:0"],
     ["vm-export,SERVER,end,SNAPSHOT-FAIL web",
      "vm-export,SERVER,end,SUCCESS db,elapse:0 size:0G"]),
    (("export_fail", {"vm": "web"}), ["vm-export=web"], 2, "**ERRORS DETECTED** - S:0 W:0 E:1",
     ["vm-export web - ***ERROR*** "], ["vm-export,SERVER,end,VM-EXPORT-FAIL web"]),
    (("snapshot_error", {}), ["vdi-export=web"], 2, "**ERRORS DETECTED** - S:0 W:0 E:1",
     ["vdi-export web - ***ERROR*** "], ["vdi-export,SERVER,end,VDI-SNAPSHOT-FAIL web"]),
    (("raw_cut", {"path": "/export_raw_vdi"}), ["vdi-export=web"], 2,
     "**ERRORS DETECTED** - S:0 W:0 E:1", ["vdi-export web - ***ERROR*** "],
     ["vdi-export,SERVER,end,VDI-EXPORT-FAIL web"]),
])
def test_how_runs_end(turn, prepare, lines, status, ending, texts, logged):
    here = turn(three_vms())
    if prepare:
        here.sim.fault(prepare[0], **prepare[1])
    here.configure(*lines)
    result = here.run()
    assert result.status == status, result
    assert result.lines[-1] == "VmBackup ended - " + ending
    for text in texts:
        assert result.has(text), result
    found = status_lines(here)
    assert found[0] == "vmbackup.py,SERVER,begin"
    assert found[-1].startswith("vmbackup.py,SERVER,end,")
    assert set(logged) <= set(found), found


def test_a_duplicate_name_fails_alone(turn):
    pool = three_vms()
    pool.vm("web", power_state="Running", disks=[disk(MIB)])
    here = turn(pool)
    here.configure("vm-export=.*")
    result = here.run()
    assert result.status == 2, result
    assert "*** ERROR: duplicate VM name found: web" in result.lines
    assert result.lines[-1] == "VmBackup ended - **ERRORS DETECTED** - S:2 W:0 E:1"
    assert len(here.folders("db")) == len(here.folders("old")) == 1
    assert not here.folders("web", marked=False)


def test_only_a_run_with_a_config_file_writes_the_status_log(turn):
    here = turn(three_vms())
    result = vmbackup(here.sim.password, "web", "host=" + here.sim.url,
                      "backup_dir=%s" % here.backups, "status_log=%s" % here.status_log)
    assert result.status == 0, result
    assert not here.status_log.exists()


def test_the_status_log_is_appended_to_and_monitors_may_read_it(turn):
    here = turn(three_vms())
    here.configure("vm-export=web")
    here.run()
    assert stat.S_IMODE(here.status_log.stat().st_mode) == 0o644
    first = here.status_log.read_bytes()
    here.status_log.chmod(0o640)
    here.run()
    assert here.status_log.read_bytes().startswith(first)
    assert len(here.status_log.read_bytes().splitlines()) == 2 * len(first.splitlines())
    assert stat.S_IMODE(here.status_log.stat().st_mode) == 0o640


def test_a_run_that_never_started_says_so_in_the_status_log(turn):
    here = turn(three_vms())
    here.configure("vm-export=web")
    assert vmbackup("wrong", here.config).status == 3
    begin, end = status_lines(here)
    assert begin == "vmbackup.py,SERVER,begin"
    assert end.startswith("vmbackup.py,SERVER,end,ERROR,")
    assert "wrong user name or password" in end


def table_of(result):
    """The rows of the table before `VmBackup ended`, the heads first, the totals last."""
    (end,) = [number for number, line in enumerate(result.lines)
              if line.startswith("VmBackup ended - ")]
    begin = max(number for number, line in enumerate(result.lines[:end])
                if re.match("VM +result +size +time +rate +note$", line))
    return result.lines[begin:end]


def test_the_table_tells_what_failed_first(turn):
    pool = three_vms()
    pool.vm("app server", disks=[disk(MIB)])
    here = turn(pool)
    here.sim.fault("snapshot_error", vm="db")
    here.sim.fault("vm_destroy_error", vm="old")
    here.configure("vm-export=.*", "vm-export=gone", "pool_db_backup=1", "max_backups=1")
    assert here.run("only=web").status == 0
    result = here.run()
    assert result.status == 2, result
    rows = table_of(result)
    assert max(map(len, rows)) <= 100
    assert [re.match(r"(app server|pool database|\S+) +([a-zA-Z]*)", row).groups()
            for row in rows[1:-1]] == [
        ("db", "FAILED"), ("gone", "FAILED"), ("old", "warning"), ("app server", "ok"),
        ("pool database", "ok"), ("web", "ok")]
    (reason,) = [line.partition("***ERROR*** ")[2] for line in result.lines
                 if " db - ***ERROR*** " in line]
    note = re.sub("^db +FAILED +", "", rows[1])
    assert note == reason or (note.endswith("\u2026") and reason.startswith(note[:-1]))
    assert re.search(r"\d MiB +\d+ s +\d+(\.\d)? MB/s +deleted \d{4}-\d\d-\d\d", rows[-2])
    assert re.match(r"total +\d+\.\d MiB +\d+ s +\d+(\.\d)? MB/s +\S+ GiB left; 2 failed: db,"
                    r" gone\Z", rows[-1])


def test_a_reason_of_any_length_and_a_long_name_keep_the_table_in_shape(turn):
    """The reason is cut, the name never."""
    name = "a name as long as some people make them, %s" % ("x" * 60)
    pool = Pool()
    pool.vm(name, disks=[disk(MIB)])
    pool.vm("web", power_state="Running", disks=[disk(MIB)])
    here = turn(pool)
    here.sim.fault("snapshot_error", vm="web", error_info=["SR_BACKEND_FAILURE_44", "x" * 500])
    here.configure("vm-export=web")
    rows = table_of(here.run())
    assert len(rows[1]) == 100 and rows[1].endswith("x\u2026")
    here.configure("vm-export=.*")
    rows = table_of(here.run())
    assert rows[2].startswith(name + "  ok ")
    assert max(map(len, rows)) < len(name) + 80


def test_fifty_vms_of_which_three_failed(turn):
    """What failed, and why, stands right below the heads, and all that is well behind it."""
    pool = Pool()
    for number in range(50):
        pool.vm("vm%02d" % number, power_state="Running", disks=[disk(4096)])
    here = turn(pool)
    bad = ["vm07", "vm23", "vm41"]
    for vm in bad:
        here.sim.fault("snapshot_error", vm=vm)
    here.configure("vm-export=.*", "parallel=4", "space_check=False")
    rows = table_of(here.run())
    assert [row.split()[:2] for row in rows[1:4]] == [[vm, "FAILED"] for vm in bad]
    assert all("SR_BACKEND_FAILURE_44" in row for row in rows[1:4])
    assert [row.split()[0] for row in rows[4:-1]] == sorted(
        "vm%02d" % number for number in range(50) if "vm%02d" % number not in bad)
    assert rows[-1].endswith("left; 3 failed: vm07, vm23, vm41")


HOSTILE = ["two\nlines", "tab\t\x7f\x85", "a,b", "\u202egnp.exe", "-rf", "..", ".hidden", "A", "a",
           "$(id);`id`", "per%cent", "sl/ash", "success", "'\"", "é" * 150, "Büro 東京 🐘"]


def test_no_name_breaks_a_line_or_leaves_the_folder(turn):
    """Names that would forge lines, hide, or lead elsewhere: one line, one folder for each."""
    pool = Pool()
    for name in HOSTILE:
        pool.vm(name, disks=[disk(MIB, name)])
    here = turn(pool)
    here.configure("vm-export=.*", "report_json=%s/report.json" % here.path)
    before = set(os.listdir(str(here.path)))
    result = here.run(env=ASCII)
    assert result.status == 0, result
    assert all(re.match(STAMP, line) for line in result.out.split("\n")[:-1])
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]", result.out)
    good = [line for line in result.lines if line.endswith("***Success*** t:0")]
    assert len(good) == len(HOSTILE)
    assert len(status_lines(here)) == 2 + 2 * len(HOSTILE)
    made = {name for name in os.listdir(os.fsencode(str(here.backups)))
            if os.path.isdir(os.path.join(os.fsencode(str(here.backups)), name))}
    wanted = {program.folder_name(name).encode("utf-8") for name in HOSTILE}
    assert wanted <= made
    assert not {name for name in made - wanted if not name.startswith(b".")}
    assert set(os.listdir(str(here.path))) - before == {"status.log", "report.json"}
    report = json.loads((here.path / "report.json").read_bytes().decode("utf-8"))
    assert {vm["name"] for vm in report["vms"]} == set(HOSTILE)
    for vm in report["vms"]:
        folder = vm["folder"].encode("utf-8")
        assert os.path.dirname(os.path.dirname(folder)) == os.fsencode(str(here.backups))
        assert os.path.isfile(os.path.join(folder, vm["file"].encode("utf-8")))
        subprocess.run(["sha256sum", "--quiet", "-c", "SHA256SUMS"], cwd=folder, check=True)
    here.assert_pool_is_clean()


@pytest.mark.parametrize("env", [ASCII, {}, {"LC_ALL": "C"}, {"LC_ALL": "POSIX", "LANG": "C"}])
def test_everything_is_utf8_whatever_the_locale(turn, tmp_path, env):
    """Names on the pool, in the config file, in arguments and in paths, under cron's locale."""
    pool = Pool()
    pool.vm("Büro 東京", disks=[disk(MIB, "Plätte")])
    here = turn(pool)
    top = os.fsencode(str(tmp_path)) + "/Größe".encode()
    os.makedirs(top + b"/Ablage")
    config = top + "/wöchentlich.cfg".encode()
    with open(config, "wb") as file:
        file.write("backup_dir={0}/Ablage\nstatus_log={0}/stätus.log\nvm-export=Büro 東京\n"
                   .format(top.decode("utf-8")).encode())
    clean = dict({"PATH": os.environ["PATH"]}, **env)
    words = [here.sim.password, config, "host=" + here.sim.url,
             b"report_json=" + top + "/bericht-é.json".encode()]
    words = [os.fsencode(word) for word in [sys.executable, str(SCRIPT)] + words]
    done = subprocess.run(words, env=clean, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out = done.stdout.decode("utf-8")
    assert (done.returncode, done.stderr) == (0, b""), out
    assert "vm-export: Büro 東京\n" in out
    assert "= %s/Ablage\n" % top.decode("utf-8") in out
    assert "VmBackup config loaded from: %s\n" % config.decode("utf-8") in out
    vm = top + "/Ablage/Büro 東京".encode()
    (folder,) = os.listdir(vm)
    assert "Büro 東京.xva".encode() in os.listdir(os.path.join(vm, folder))
    with open(os.path.join(vm, folder, b"vm.cfg"), "rb") as file:
        assert "name_label=Büro 東京\n" in file.read().decode("utf-8")
    with open(top + "/stätus.log".encode(), "rb") as file:
        assert ",end,SUCCESS Büro 東京,elapse:0 size:0G\n" in file.read().decode("utf-8")
    with open(top + "/bericht-é.json".encode(), "rb") as file:
        report = json.loads(file.read().decode("utf-8"))
    assert report["vms"][0]["folder"].encode("utf-8") == os.path.join(vm, folder)

    chosen = [os.fsencode(sys.executable), os.fsencode(str(SCRIPT)), here.sim.password.encode(),
              "vdi-export=Büro 東京:9".encode(), b"preview", b"host=" + here.sim.url.encode(),
              b"backup_dir=" + top + b"/Ablage"]
    out = subprocess.run(chosen, env=clean, stdout=subprocess.PIPE, check=True).stdout
    assert "vdi-export: Büro 東京:9\n" in out.decode("utf-8")


def test_report_json(turn):
    here = turn(three_vms())
    here.sim.fault("snapshot_error", vm="db")
    report = here.path / "report.json"
    report.write_text('{"the last": 1}')
    inode = report.stat().st_ino
    here.configure("vm-export=web", "vm-export=db", "exclude=nobody", "pool_db_backup=1",
                   "report_json=%s" % report)
    begin = time.time()
    result = here.run()
    end = time.time()
    assert result.status == 2, result
    told = json.loads(report.read_text(encoding="utf-8"))
    assert report.stat().st_ino != inode, "not replaced but written over"
    assert stat.S_IMODE(report.stat().st_mode) == 0o644
    assert set(told) == {
        "version", "server", "host", "pool", "start", "end", "seconds", "status", "exit_status",
        "error", "counts", "bytes", "warnings", "not_in_backup", "pool_database", "vms"}
    assert (told["status"], told["exit_status"], told["error"]) == ("ERROR", 2, None)
    assert told["counts"] == {"success": 1, "warning": 0, "error": 1, "skipped": 0}
    assert (told["pool"], told["server"], told["version"]) == ("pool", SERVER, program.__version__)
    assert told["host"] == here.sim.url[len("https://"):]
    assert told["warnings"] == ["***WARNING - vm(s) Exclude does not exist: nobody"]
    assert told["not_in_backup"] == ["old"]
    moments = [moment_of(told[key]) for key in ("start", "end")]
    assert begin - 1 < moments[0] <= moments[1] < end + 1
    assert abs(moments[1] - moments[0] - told["seconds"]) < 0.1
    web, db = sorted(told["vms"], key=lambda vm: vm["name"], reverse=True)
    for item in (web, db, told["pool_database"]):
        assert set(item) == {
            "name", "uuid", "kind", "status", "folder", "file", "sha256", "bytes", "seconds",
            "transfer_seconds", "mb_per_second", "attempts", "checks", "warnings", "error",
            "pruned"}
    (folder,) = here.folders("web")
    assert (web["status"], web["error"], web["file"]) == ("SUCCESS", None, "web.xva")
    assert (web["kind"], web["attempts"], web["pruned"]) == ("vm-export", 1, [])
    assert web["folder"] == str(folder)
    assert web["bytes"] == told["bytes"] == (folder / "web.xva").stat().st_size
    assert web["sha256"] == hashlib.sha256((folder / "web.xva").read_bytes()).hexdigest()
    assert web["uuid"] == here.sim.record("VM", "web")["uuid"]
    assert 0 < web["transfer_seconds"] <= web["seconds"] <= told["seconds"]
    rate = web["bytes"] / 1e6 / web["transfer_seconds"]
    assert abs(web["mb_per_second"] - rate) < 0.1 + rate * 0.001 / web["transfer_seconds"]
    assert web["checks"]
    assert (db["status"], db["folder"], db["bytes"]) == ("ERROR", None, 0)
    assert db["error"] in [line.partition("***ERROR*** ")[2] for line in result.lines]
    dump = told["pool_database"]
    assert (dump["kind"], dump["status"]) == ("pool-db", "SUCCESS")
    assert os.path.getsize(os.path.join(dump["folder"], dump["file"])) == dump["bytes"]
    assert here.sim.password not in report.read_text(encoding="utf-8")
    assert [item.name for item in here.path.iterdir() if item.name.startswith("report")] == [
        "report.json"]


def moment_of(text):
    """Seconds since 1970 of a time in ISO 8601 with its zone (3.6 has no fromisoformat)."""
    match = re.match(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(\.\d{6})?([+-])(\d\d):(\d\d)\Z", text)
    base = calendar.timegm(time.strptime(match.group(1), "%Y-%m-%dT%H:%M:%S"))
    zone = int(match.group(4)) * 3600 + int(match.group(5)) * 60
    return base + float(match.group(2) or 0) - (zone if match.group(3) == "+" else -zone)


def test_the_times_of_report_json_bear_their_zone(turn):
    here = turn(three_vms())
    here.configure("vm-export=web", "report_json=%s/report.json" % here.path)
    begin = time.time()
    assert here.run(env={"TZ": "Asia/Kolkata"}).status == 0
    told = json.loads((here.path / "report.json").read_text(encoding="utf-8"))
    assert told["start"].endswith("+05:30") and told["end"].endswith("+05:30")
    assert begin - 1 < moment_of(told["start"]) < time.time()


def test_a_path_that_is_no_utf8_comes_back_from_report_json(turn):
    """The report is UTF-8 all the same; Python's json gives the path's bytes again."""
    here = turn(three_vms())
    top = os.fsencode(str(here.path)) + b"/Gr\xf6\xdfe"
    os.mkdir(top)
    report = here.path / "report.json"
    words = [sys.executable, str(SCRIPT), here.sim.password, "web", "host=" + here.sim.url,
             b"backup_dir=" + top, "report_json=%s" % report]
    done = subprocess.run([os.fsencode(word) for word in words], stdout=subprocess.PIPE,
                          env={"PATH": os.environ["PATH"]})
    assert done.returncode == 0, done.stdout
    (web,) = json.loads(report.read_bytes().decode("utf-8"))["vms"]
    folder = web["folder"].encode("utf-8", "surrogateescape")
    assert folder.startswith(top + b"/web/")
    assert os.path.exists(os.path.join(folder, b"web.xva"))


def test_report_json_of_a_run_that_did_not_start(turn):
    here = turn(three_vms())
    report = here.path / "report.json"
    here.configure("vm-export=web", "report_json=%s" % report)
    assert vmbackup("wrong", here.config).status == 3
    told = json.loads(report.read_text(encoding="utf-8"))
    assert (told["status"], told["exit_status"], told["vms"]) == ("ERROR", 3, [])
    assert "wrong user name or password" in told["error"]


def node(path, kind, minor=0):
    """A device of the memory driver (or a FIFO), made here so that nothing of the machine's own can
    be replaced."""
    try:
        os.mknod(str(path), kind | 0o600, os.makedev(1, minor))
        os.close(os.open(str(path), os.O_RDWR | os.O_NONBLOCK))
    except PermissionError:
        pytest.skip("devices need root and a file system that takes them")
    return path


NULL = 3


def kind_and_bytes(path):
    """What must stay as it is at a path."""
    info = os.lstat(str(path))
    return info.st_ino, info.st_mode, info.st_rdev, (
        path.read_bytes() if stat.S_ISREG(info.st_mode) else None)


@pytest.mark.parametrize("named, more", [
    ("fifo", ""), ("device", ""), ("config_file", ""), ("status_log", ""), ("tls_ca", ""),
    ("smtp_password_file", ""), ("link", ""), ("device", "backup_dir=/nonexistent"),
    ("config_file", "tls_ca=/nonexistent")])
def test_report_json_in_place_of_something_else_is_refused(turn, named, more):
    """And what is there stays there, whatever else was wrong before that."""
    here = turn(three_vms())
    (here.path / "pass").write_bytes(b"c2VjcmV0")
    (here.path / "ca.pem").write_text(Path(here.sim.certificate).read_text())
    here.status_log.write_text("an older line\n")
    path = {"fifo": here.path / "fifo", "device": here.path / "device",
            "config_file": here.config, "status_log": here.status_log,
            "tls_ca": here.path / "ca.pem", "smtp_password_file": here.path / "pass",
            "link": here.path / "link"}[named]
    if named in ("fifo", "device"):
        node(path, stat.S_IFIFO if named == "fifo" else stat.S_IFCHR, NULL)
    elif named == "link":
        path.symlink_to(here.config)
    here.configure("vm-export=web", "report_json=%s" % path, "tls_ca=%s/ca.pem" % here.path,
                   "smtp_password_file=%s/pass" % here.path, more or "# nothing more")
    others = (here.backups, here.status_log)
    before = {item: kind_and_bytes(item) for item in here.path.iterdir() if item not in others}
    result = here.run()
    assert result.status == 3, result
    lines = [line for line in result.lines if "ERROR" in line]
    assert more or "report_json=%s" % path in lines[0]
    assert {item: kind_and_bytes(item) for item in here.path.iterdir()
            if item not in others} == before
    assert here.status_log.read_text().startswith("an older line\n")
    assert not here.sim.calls()


def test_one_file_cannot_be_report_json_and_status_log(turn):
    here = turn(three_vms())
    here.configure("vm-export=web", "report_json=%s" % here.status_log)
    result = here.run()
    assert result.status == 3, result
    assert result.has("=%s: " % here.status_log)
    assert not here.sim.calls()


def test_a_link_that_bears_the_name_of_report_json_is_replaced(turn):
    """Or whoever may write there would lead root to any file."""
    here = turn(three_vms())
    (here.path / "share").mkdir()
    link, target = here.path / "report.json", here.path / "share" / "precious.json"
    for content in (None, '{"precious": 1}'):
        if content:
            target.write_text(content)
        link.symlink_to("share/precious.json")
        here.configure("vm-export=web", "report_json=%s" % link)
        assert here.run().status == 0
        assert not link.is_symlink()
        assert json.loads(link.read_text(encoding="utf-8"))["status"] == "SUCCESS"
        assert (target.read_text() if content else target.exists()) == (content or False)
        link.unlink()


@pytest.mark.parametrize("key, name, content", [
    ("report_json", "notes", "what I wrote"), ("report_json", "list.json", "[1]"),
    ("metrics_file", "node.prom", "# HELP other_metric x\n# TYPE other_metric gauge\n"
                                  "other_metric 1\n"),
    ("metrics_file", "notes.prom", "what I wrote")])
def test_a_file_that_is_no_report_is_not_replaced(turn, key, name, content):
    here = turn(three_vms())
    (here.path / name).write_text(content)
    here.configure("vm-export=web", "%s=%s/%s" % (key, here.path, name))
    result = here.run()
    assert result.status == 3, result
    assert result.has("%s=%s/%s" % (key, here.path, name))
    assert (here.path / name).read_text() == content
    assert not here.sim.calls()


def test_one_vm_at_a_time_has_its_begin_and_end_side_by_side(turn):
    here = turn(three_vms())
    here.sim.fault("snapshot_error", vm="db")
    here.sim.fault("vm_destroy_error", vm="old")
    here.sim.add_vm({"name": "app", "disks": [disk(MIB)]})
    here.configure("vdi-export=web", "vm-export=db", "vm-export=gone", "vm-export=old",
                   "vm-export=app", "parallel=1")
    assert here.run().status == 2
    first, *lines, last = [line.split(",")[0:1] + line.split(",")[2:] for line in
                           status_lines(here)]
    assert first == ["vmbackup.py", "begin"]
    assert last == ["vmbackup.py", "end", "ERROR", "S:2 W:1 E:2"]
    assert len(lines) == 10
    for begin, end in zip(lines[::2], lines[1::2]):
        assert begin[1] == "begin" and end[1] == "end"
        assert begin[0] == end[0] and end[2].endswith(" " + begin[2]), (begin, end)
    assert [line[2] for line in lines[::2]] == ["web", "db", "gone", "old", "app"]


def warned_of_status_log(result):
    assert result.status == 1, result
    (line,) = [line for line in result.lines if "status log" in line]
    assert line.startswith("***WARNING - the status log cannot be written: ")
    assert result.lines[-1] == "VmBackup ended - **WARNING(s)** - S:3 W:0 E:0"
    return line


def test_a_status_log_on_a_full_disk_is_one_warning(small_disk):
    here = small_disk(three_vms(), 1)
    with contextlib.suppress(OSError):
        (here.backups / "rest").write_bytes(bytes(2 * MIB))
    here.status_log, here.backups = here.backups / "status.log", here.path / "elsewhere"
    here.backups.mkdir()
    here.configure("vm-export=.*", "report_json=%s/report.json" % here.path)
    line = warned_of_status_log(here.run())
    assert "No space left on device" in line
    told = json.loads((here.path / "report.json").read_text(encoding="utf-8"))
    assert (told["exit_status"], told["warnings"]) == (1, [line])


def test_a_status_log_whose_folder_goes_away_is_one_warning(turn):
    here = turn(three_vms())
    here.status_log = here.path / "log" / "status.log"
    here.status_log.parent.mkdir()
    here.configure("vm-export=.*")
    process = here.start()
    here.sim.fault("kill_client_at", pid=process.pid, signal=signal.SIGSTOP, method="GET /export",
                   skip=1)
    assert os.WIFSTOPPED(os.waitpid(process.pid, os.WUNTRACED)[1])
    assert len(status_lines(here)) == 4
    here.status_log.unlink()
    here.status_log.parent.rmdir()
    process.send_signal(signal.SIGCONT)
    assert "No such file or directory" in warned_of_status_log(finish(process))
    assert not here.status_log.parent.exists()


def test_a_status_log_that_nobody_wants_is_no_warning(turn):
    """/dev/null is the one device that is let pass; what is there stays there."""
    here = turn(three_vms())
    here.status_log = Path(os.devnull)
    here.configure("vm-export=web")
    before = kind_and_bytes(here.status_log)
    result = here.run()
    assert result.status == 0, result
    assert not result.has("WARNING")
    assert kind_and_bytes(here.status_log) == before
    here.status_log = node(here.path / "null", stat.S_IFCHR, NULL)
    here.configure("vm-export=web")
    result = here.run()
    assert result.status == 3, result
    assert result.has(": no regular file")


def test_a_reader_that_went_away_stops_no_backup(turn):
    """The log goes into a pipe whose reader has ended, as in `vmbackup.py ... | head`."""
    here = turn(three_vms())
    here.configure("vm-export=web")
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, str(SCRIPT), here.sim.password, str(here.config)]
    done = subprocess.run(command, stdout=write_end, stderr=subprocess.PIPE)
    os.close(write_end)
    assert done.returncode == 0, done.stderr
    assert len(here.folders("web")) == 1

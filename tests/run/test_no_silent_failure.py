# SPDX-License-Identifier: GPL-3.0-or-later
"""The mistakes that everyone makes must not look like success, and what is told has to lead on."""
import base64
import os
import re
import subprocess
import sys
import tempfile

import pytest
from support.harness import ROOT, vmbackup
from support.world import pool_of

LOGINS = {"session.login_with_password"}


def untouched(site):
    """Nobody logged in, and nothing was made."""
    return not LOGINS & set(site.sim.methods()) and list(site.backups.iterdir()) == []


def status_lines(site):
    """The last two fields of each line of the status log."""
    text = site.status_log.read_text(encoding="utf-8") if site.status_log.exists() else ""
    return [line.split(",", 3)[3] for line in text.splitlines()]


# --- a config file that is not there ---

@pytest.mark.parametrize("word", ["weekend.cfg", " weekend.cfg", "/mnt/none/weekend.cfg", "a/b",
                                  "x.conf", "x.INI", "weekend.cfg:3", "./weekend"])
def test_a_config_file_that_is_not_there_is_no_vm(turn, word):
    site = turn(pool_of("web", "weekend.cfg"))
    result = vmbackup(site.sim.password, word, "host=" + site.sim.url,
                      "backup_dir=%s" % site.backups, cwd=site.backups)
    assert result.status == 3, result
    (line,) = result.lines
    assert line.startswith("ERROR - no such config file: " + word)
    assert "vm-export=" + word in line
    assert untouched(site)


@pytest.mark.parametrize("name", ["weekend.cfg", "a/b"])
def test_a_vm_of_such_a_name_can_be_backed_up(turn, name):
    site = turn(pool_of(name))
    result = vmbackup(site.sim.password, "vm-export=" + name, "host=" + site.sim.url,
                      "backup_dir=%s" % site.backups)
    assert result.status == 0, result


# --- a run that chooses nothing ---

@pytest.mark.parametrize("lines, status", [
    (["vm-export=x.*"], 3), (["vm-export=web", "exclude=web"], 3), (["vm-export=gone"], 2),
    (["vm-export=x.*", "pool_db_backup=1"], 1), (["vm-export=web", "exclude=."], 3),
])
@pytest.mark.parametrize("preview", [[], ["preview"]])
def test_a_run_that_chooses_nothing(turn, lines, status, preview):
    site = turn(pool_of("web"))
    site.configure(*lines)
    result = site.run(*preview)
    assert result.status == status, result
    if status == 3:
        assert result.lines[-1].startswith("ERROR - ")
        assert list(site.backups.iterdir()) == []
        assert preview or status_lines(site)[-1].startswith("end,ERROR,")
    site.assert_pool_is_clean()


# --- a share that is not mounted ---

def elsewhere():
    """A new folder that lies on another file system than /, or None."""
    for path in ("/dev/shm", "/run", "/tmp", "/var/tmp"):
        if os.access(path, os.W_OK) and os.stat(path).st_dev != os.stat("/").st_dev:
            return tempfile.mkdtemp(dir=path)
    return None


def on_root(path):
    return os.stat(str(path)).st_dev == os.stat("/").st_dev


def test_require_mount(turn):
    site = turn(pool_of("web"))
    site.configure("vm-export=web", "require_mount=True")
    if on_root(site.backups):
        result = site.run()
        assert result.status == 3, result
        assert "file system of /" in result.lines[-1]
        assert str(site.backups) in result.lines[-1]
        assert untouched(site)
        assert site.run("preview").status == 3
        assert site.run("require_mount=False").status == 0
    other = elsewhere()
    if other:
        try:
            assert site.run("preview", "backup_dir=" + other).status == 0
        finally:
            os.rmdir(other)


def test_in_a_dom0_the_root_file_system_is_warned_of(turn, tmp_path):
    site = turn(pool_of("web"))
    site.configure("vm-export=web")
    if not on_root(site.backups):
        pytest.skip("the tests' folder is on a file system of its own")
    inventory = tmp_path / "xensource-inventory"
    inventory.write_text("INSTALLATION_UUID='1'\n")
    assert site.run("preview").status == 0
    result = site.run("preview", constants={"INVENTORY": str(inventory)})
    assert result.status == 1, result
    assert result.has("***WARNING - backup_dir lies on the file system of /")


# --- mail ---

@pytest.mark.parametrize("lines", [["mail_to=a@b"], ["mail_from=a@b"], ["smtp_server=mx:25"],
                                   ["mail_to=a@b", "smtp_server=mx"]])
def test_half_a_mail_configuration_is_told(turn, lines):
    site = turn(pool_of("web"))
    site.configure("vm-export=web", *lines)
    result = site.run()
    assert result.status == 3, result
    missing = {"mail_to", "mail_from", "smtp_server"} - {line.partition("=")[0] for line in lines}
    assert all(key in result.lines[-1] for key in missing)
    assert untouched(site)


# --- names with brackets, plus, dollar ---

HARD = ["srv (old)", "C++ build", "db[1]", "cost$", "a|b", "^x", "what?", "(", "*"]


def test_a_vm_is_found_and_excluded_by_its_own_name(turn):
    site = turn(pool_of("web", *HARD))
    site.configure(*["vm-export=" + name for name in HARD])
    result = site.run("preview")
    assert result.status == 0, result
    assert "  vm-export (cnt)= %d" % len(HARD) in result.lines
    for name in HARD:
        assert result.has("NOTE - vm-export=%s: " % name)
    site.configure("vm-export=", *["exclude=" + name for name in ["srv (old)", "C++ build", "(",
                                                                  "db[1]", "cost$", "*"]])
    result = site.run("preview")
    assert result.status == 0, result
    (line,) = [line for line in result.lines if line.startswith("  vm-export: ")]
    assert line == "  vm-export: ^x, a|b, web, what?"


def test_what_is_neither_an_expression_nor_a_name_stops_the_run(turn):
    site = turn(pool_of("web"))
    site.configure("vm-export=web", "exclude=srv (old", "vm-export=*")
    result = site.run()
    assert result.status == 3, result
    assert "***ERROR - invalid regex: exclude=srv (old" in result.lines
    assert result.has("***ERROR - invalid regex: vm-export=* (a shell pattern?")
    assert list(site.backups.iterdir()) == []
    site.assert_pool_is_clean()


# --- rules that others overrule, hints ---

def test_a_rule_that_a_later_one_overrules_is_told(turn):
    site = turn(pool_of("PROD-db1", "PROD-web"))
    site.configure("vm-export=PROD-db.*:7", "vm-export=PROD-.*")
    for words in ([], ["preview"]):
        result = site.run(*words)
        assert result.status == 0, result
        assert result.has("NOTE - vm-export=PROD-db.*:7: all its VMs were taken by"
                          " vm-export=PROD-.*")


@pytest.mark.parametrize("line, hint", [
    ("vm-export=shop*", "shop.*"), ("vm-export=sql # the database", "a line of its own"),
    ("vm-export=sql, mail", "one name or expression a line"), ('vm-export="sql x":2', "quotes"),
])
def test_a_rule_that_matches_nothing_tells_what_is_probably_meant(turn, line, hint):
    site = turn(pool_of("web"))
    site.configure("vm-export=web", line)
    result = site.run("preview")
    assert result.status == 1, result
    (told,) = [text for text in result.lines if text.startswith("***WARNING - vm not found: ")]
    assert told.startswith("***WARNING - vm not found: " + line)
    assert hint in told


def test_the_nearest_name_is_told(turn):
    site = turn(pool_of("sql-server-01", "web"))
    site.configure("vm-export=SQL-server-01", "exclude=wbe", "vm-export=web")
    result = site.run("preview")
    assert result.status == 2, result
    assert "ERROR - vm(s) List does not exist: SQL-server-01" in result.lines
    assert result.has('(perhaps "sql-server-01" is meant)')
    assert result.has('NOTE - exclude=wbe: no VM bears this name (perhaps "web" is meant)')


# --- only= ---

def test_only_repeats_one_vm_with_its_config_file(turn):
    site = turn(pool_of("web", "db1", "db2", "left"))
    site.configure("vm-export=web:2", "vm-export=db.*:3")
    result = site.run("only=db1", "only=w.*")
    assert result.status == 0, result
    assert "  vm-export: db1:3, web:2" in result.lines
    assert sorted(path.name for path in site.backups.iterdir()) == ["db1", "web"]
    assert "VMs-not-in-backup: left" in site.run("preview", "only=web").lines
    for word in ("only=left", "only=nothing", "only=web:2"):
        result = site.run(word)
        assert result.status == 3, result
        assert word in result.lines[-1]


# --- the status log ---

@pytest.mark.parametrize("words, reason", [
    (["host=127.0.0.1:1"], ""), (["backup_dir=/nonexistent"], "backup_dir does not exist"),
    (["tls_ca=/nonexistent"], "tls_ca"), (["report_json=/nonexistent/r.json"], "report_json"),
])
def test_a_run_that_cannot_start_is_the_status_logs_last_word(turn, words, reason):
    site = turn(pool_of("web"))
    site.configure("vm-export=web")
    assert site.run().status == 0
    assert status_lines(site)[-1] == "end,SUCCESS,S:1 W:0 E:0"
    count = len(status_lines(site))
    assert site.run("preview", *words).status == 3
    assert len(status_lines(site)) == count
    assert site.run(*words).status == 3
    first, last = status_lines(site)[count:]
    assert first == "begin"
    assert last.startswith("end,ERROR,")
    assert reason in last


def test_a_wrong_password_is_in_the_status_log(turn):
    site = turn(pool_of("web"))
    site.configure("vm-export=web")
    assert vmbackup("wrong", site.config).status == 3
    first, last = status_lines(site)
    assert (first, last[:10]) == ("begin", "end,ERROR,")
    assert "wrong user name or password" in last


def test_the_status_log_of_the_default(turn):
    """Where its folder is not there, a line says so, and all is well; empty: none, unmentioned."""
    site = turn(pool_of("web"))
    site.config.write_text("backup_dir=%s\nhost=%s\nvm-export=web\n" % (
        site.backups, site.sim.url))
    if os.path.isdir("/snapshots/NAUbackup"):
        pytest.skip("this machine has the default's folder")
    for words in (["preview"], []):
        result = site.run(*words)
        assert result.status == 0, result
        (line,) = [line for line in result.lines if "no status log" in line]
        assert "/snapshots/NAUbackup" in line
        result = site.run("status_log=", *words)
        assert result.status == 0, result
        assert not result.has("no status log")
    assert site.run("status_log=/snapshots/other/status.log").status == 3


# --- reports ---

@pytest.mark.parametrize("key, name, old, status", [
    ("report_json", "r.json", "{}", 0), ("report_json", "r.json", "", 0),
    ("report_json", "r.json", "vm-export=web\n", 3), ("metrics_file", "a.prom", "", 0),
    ("metrics_file", "a.prom", "# HELP vmbackup_info x\n", 0),
    ("metrics_file", "a.prom", "# HELP node_load1 x\n", 3), ("metrics_file", "a.txt", None, 3),
])
def test_a_report_replaces_nothing_else(turn, key, name, old, status):
    site = turn(pool_of("web"))
    site.configure("vm-export=web")
    path = site.path / name
    if old is not None:
        path.write_text(old)
    result = site.run("%s=%s" % (key, path))
    assert result.status == status, result
    if status:
        assert old is None or path.read_text() == old
        assert str(path) in [line for line in result.lines if "ERROR" in line][-1]
        assert untouched(site)
    else:
        assert path.read_text() != old


# --- passwords ---

SECRET = "Correct-Horse"


@pytest.mark.parametrize("words", [
    ("{cfg}", SECRET), ("{cfg}", "{pw}"), ("{cfg}", SECRET, "preview"), ("{cfg}", "local"),
    ("{cfg}", SECRET + ".cfg"), ("create-password-file=x", SECRET), ("vm-export=web", SECRET),
    (SECRET, "web"), (SECRET, "{cfg}"), (SECRET, "{pw}"), ("{pw}", "{pw}"),
    ("restore", "{cfg}", SECRET), ("/" + SECRET, "web"), ("./" + SECRET, "{cfg}"),
    ("~/" + SECRET, "{cfg}"), (SECRET,), ("restore", SECRET), (SECRET, "x.cfg"),
])
def test_words_in_the_wrong_place_show_no_password(turn, words):
    """Nor what is in a password file; and a password that is the name of a file is not shown."""
    site = turn(pool_of("web"))
    site.configure("vm-export=web")
    here = site.path / "here"
    here.mkdir()
    (here / SECRET).write_text("a file of the password's name\n")
    encoded = vmbackup(SECRET, "create-password-file=pw", cwd=site.path)
    assert encoded.status == 0
    hidden = [SECRET, (site.path / "pw").read_text().strip().rstrip("=")]
    given = [word.format(cfg=site.config, pw=site.path / "pw") for word in words]
    result = vmbackup(*given + ["backup_dir=%s" % site.backups] * (len(given) == 2 and
                                                                   given[0] != "restore"), cwd=here)
    assert result.status == 3, result
    for word in hidden:
        assert word not in result.out + result.err
    assert untouched(site)


@pytest.mark.parametrize("password", ["/etc-like", "./x", "~/x"])
def test_a_password_that_looks_like_a_path_goes_through_a_file_or_standard_input(turn, password):
    pool = pool_of("web")
    pool.description["password"] = password
    site = turn(pool)
    site.configure("vm-export=web")
    assert vmbackup(password, site.config, "preview").status == 3
    assert untouched(site)
    assert vmbackup("-", site.config, "preview", input=password.encode() + b"\n").status == 0
    made = vmbackup(password, "create-password-file=%s/pw" % site.path)
    assert made.status == 0, made
    assert vmbackup(site.path / "pw", site.config, "preview").status == 0


def test_a_password_file_made_by_echo_and_base64(turn):
    site = turn(pool_of("web"))
    site.configure("vm-export=web")
    for end, status in (("\n", 0), ("\r\n", 0), ("\n\n", 3), (" ", 3)):
        data = base64.encodebytes((site.sim.password + end).encode("utf-8"))
        (site.path / "pw").write_bytes(data)
        assert vmbackup(site.path / "pw", site.config, "preview").status == status, repr(end)


# --- other ---

def test_compress_none_is_itsdaves(turn):
    site = turn(pool_of("web"))
    site.configure("vm-export=web", "compress=none")
    result = site.run()
    assert result.status == 0, result
    assert site.file("web", "xva").exists()


def test_zstd_that_nothing_here_can_prove_is_refused(turn, tmp_path):
    site = turn(pool_of("web"))
    site.configure("vm-export=web")
    (tmp_path / "bin").mkdir()
    result = site.run("compress=zstd", env={"PATH": str(tmp_path / "bin")})
    assert result.status == 3, result
    assert re.search("compress=zstd.*install.*compress=gzip", result.lines[-1])
    assert untouched(site)


def test_a_fault_of_the_program_leaves_a_trace_if_asked(turn):
    site = turn(pool_of("web"))
    site.configure("vm-export=web")
    code = ("import shutil, sys, vmbackup\nshutil.disk_usage = {}.__getitem__\n"
            "sys.exit(vmbackup.main())")
    for debug, traces in (("", False), ("1", True)):
        done = subprocess.run([sys.executable, "-c", code, site.sim.password, str(site.config)],
                              env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT),
                                   "VMBACKUP_DEBUG": debug},
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        out = done.stdout
        assert (done.returncode, done.stderr) == (2, b""), out
        assert re.search(b"KeyError at line [0-9]+ of vmbackup.py", out), out
        assert (b"Traceback" in out) == traces
    assert site.sim.password.encode("utf-8") not in out

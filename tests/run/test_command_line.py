# SPDX-License-Identifier: GPL-3.0-or-later
"""What a user types, in arguments, config files and password files, and what he is told."""
import os
import re

import pytest
from simulator.client import Simulator
from simulator.pool import Pool
from support.harness import ROOT, SCRIPT, vmbackup

PASSWORD = "pä$$ \"w'o\\`r*d<&>;=#%:🐘"


@pytest.fixture(scope="module")
def sim():
    pool = Pool(password=PASSWORD)
    pool.vm("web")
    with Simulator.start(pool) as started:
        yield started


# --- help and the like ---

@pytest.mark.parametrize("word", ["help", "config", "example", "version", "HELP", "--help",
                                  "--version", "-help", "-config", "-h", "-V", "-v"])
def test_texts_go_to_standard_output(word):
    result = vmbackup(word, env={"LC_ALL": "C"})
    assert (result.status, result.err) == (0, "")
    assert result.out.endswith("\n")
    assert max(map(len, result.out.splitlines())) <= 100


def test_config_prints_example_cfg():
    assert vmbackup("config").raw == (ROOT / "example.cfg").read_bytes()


def test_version_is_the_modules():
    (version,) = re.findall(r'^__version__ = "(.+)"', SCRIPT.read_text(encoding="utf-8"), re.M)
    assert version in vmbackup("version").out
    assert vmbackup("-V").out == vmbackup("version").out


def test_help_names_every_setting_and_command():
    """All settings that the example has, commented out or not."""
    names = re.findall(r"^#?([a-z_-]+)=", (ROOT / "example.cfg").read_text(encoding="utf-8"), re.M)
    assert len(names) > 30
    words = set(vmbackup("help").out.split())
    assert set(names) - {"vm-export", "vdi-export", "exclude"} | set(COMMANDS) <= words


@pytest.mark.parametrize("columns", [60, 72, 80, 99, 100, 200])
def test_help_is_as_wide_as_the_terminal(columns):
    """And at most 100; where there is none too."""
    lines = vmbackup("help", env={"COLUMNS": str(columns)}).out.splitlines()
    widest = max(len(line) for line in lines)
    assert min(columns, 100) - 20 < widest <= min(columns, 100)
    text = " ".join(" ".join(lines).split())
    assert text == " ".join(vmbackup("help").out.split())


COMMANDS = {"verify": ["[vm-name]", "proves"], "list": ["json", "[vm-name]"],
            "check": ["warn", "crit", "2 CRITICAL", "3 UNKNOWN"], "extract": ["to=", "disk="],
            "restore": ["backup=", "sr=", "as=", "preserve=True", "<password>"]}


@pytest.mark.parametrize("name", list(COMMANDS))
def test_help_of_one_command(name):
    result = vmbackup("help", name)
    assert (result.status, result.err) == (0, "")
    assert len(result.out.splitlines()) < 12
    for words in COMMANDS[name] + ["vmbackup.py %s <" % name]:
        assert words in " ".join(result.out.split())
    for other in set(COMMANDS) - {name}:
        assert "vmbackup.py %s" % other not in result.out
    for word in ("--help", "-h"):
        assert vmbackup(name, word).out == result.out
    assert vmbackup("--help", name.upper()).out == result.out


@pytest.mark.parametrize("topic, text", [
    ("preview", "changes nothing"), ("only", "only=SELECTOR"), ("password", "local"),
    ("create-password-file", "create-password-file=FILE"), ("max_backups", "1 or more"),
    ("keep_weekly", "ISO weeks"),
])
def test_help_of_a_word(topic, text):
    assert text in vmbackup("help", topic).out


@pytest.mark.parametrize("word, near", [("verfy", "verify"), ("restor", "restore"), ("zzz", "")])
def test_help_of_what_is_not_there(refused, word, near):
    line = refused("help", word)
    assert word in line
    assert ("did you mean %s?" % near in line) if near else ("restore" in line)


# --- too few words ---

@pytest.mark.parametrize("words, missing", [
    ((), "<password>"), ((), "<config-file|vm-selector>"), (("-",), "<config-file|vm-selector>"),
    (("secret",), "<config-file|vm-selector>"), (("local",), "<config-file|vm-selector>"),
    (("a.cfg",), "<password>"), (("--dry-run",), "<password>"),
    (("create-password-file=x",), "<password>"), (("verfiy",), "did you mean verify?"),
    (("confg",), "did you mean config?"),
])
def test_too_few_words_show_the_usage_and_what_is_missing(tmp_path, words, missing):
    (tmp_path / "a.cfg").write_text("vm-export=web\n")
    result = vmbackup(*words, cwd=tmp_path)
    assert (result.status, result.out) == (3, "")
    assert result.err.startswith("Usage: vmbackup.py <password> <config-file|vm-selector>")
    assert len(result.err.splitlines()) < 10
    last = result.err.splitlines()[-1]
    assert last.startswith("Missing: ")
    assert missing in last
    assert "secret" not in result.err


@pytest.mark.parametrize("words, missing", [
    (["verify"], "<config-file|folder|file>"), (["LIST"], "<config-file|folder>"),
    (["extract"], "<backup-folder|file>"),
    (["restore"], "<password> <config-file|backup-folder|export-file>"),
    (["restore", "-"], "<config-file|backup-folder|export-file>"),
])
def test_too_few_words_for_a_command(words, missing):
    result = vmbackup(*words)
    assert (result.status, result.out) == (3, "")
    usage, told = result.err.splitlines()
    assert " ".join(vmbackup("help", words[0]).out.split()).startswith(usage[len("Usage: "):])
    assert told == "Missing: " + missing


def test_check_always_answers_a_monitor_on_standard_output():
    for words in (["check"], ["check", "/nonexistent"], ["CHECK", "/", "warm=3h"],
                  ["check", "/nonexistent.cfg"]):
        result = vmbackup(*words)
        assert (result.status, result.err) == (3, "")
        assert re.match("VMBACKUP UNKNOWN - [^|\n]+\n$", result.out), result.out


# --- words ---

@pytest.mark.parametrize("word, named", [
    ("zzz", "preview"), ("zzz", "max_backups"), ("zzz", "only=SELECTOR"), ("colour=1", "compress"),
    ("vm-export=web", "max_backups"), ("exclude=web", "max_backups"), ("=", "max_backups"),
    ("only=", "only=SELECTOR"), ("db", "max_backups"),
])
def test_an_unknown_word_is_named_with_those_allowed(refused, word, named):
    line = refused("pw", "web", word)
    assert word.partition("=")[0] in line
    assert named in line


@pytest.mark.parametrize("word, near", [
    ("previev", "preview"), ("PREVEIW", "preview"), ("max_backup=3", "max_backups="),
    ("compres=zstd", "compress="), ("backup-dir=/x", "backup_dir="),
    ("max_backups", "max_backups="), ("verfiy", "verify"), ("--dry-run", "preview"),
    ("--preview", "preview"), ("-n", "preview"), ("dry-run", "preview"), ("--dryrun", "preview"),
    ("-preview", "preview"), ("preview=True", "preview"),
])
def test_what_is_similar_is_proposed_alone(refused, word, near):
    line = refused("pw", "web", word)
    assert word.partition("=")[0] in line
    assert "did you mean %s?" % near in line
    assert len(line) < 90


@pytest.mark.parametrize("words", [
    ("pw", "--dry-run"), ("pw", "-n", "web"), ("--preview", "pw", "web"), ("-n", "pw", "web"),
    ("pw", "vm_export=web"), ("pw", "VMexport=web"), ("pw", "create-password=/x"),
])
def test_a_word_in_the_wrong_place(refused, words):
    line = refused(*words)
    assert "preview" in line or "did you mean" in line


def test_ignore_extra_keys_is_for_config_files_only(refused):
    assert "surprise" in refused("pw", "web", "ignore_extra_keys=True", "surprise=1")


@pytest.mark.parametrize("selector", ["", "  ", "vdi-export="])
def test_a_selector_of_nothing_is_refused(tmp_path, selector):
    assert vmbackup("pw", selector, cwd=tmp_path).status == 3


@pytest.mark.parametrize("selector", ["exclude=web", "max_backups=3", "EXCLUDE=", "Compress=zstd"])
def test_a_setting_is_no_selector(refused, selector):
    line = refused("pw", selector)
    assert line.startswith("ERROR - invalid parameter %s: " % selector)
    assert "VM selector" in line


@pytest.mark.parametrize("keep", ["9999999999", "9" * 30])
def test_a_keep_count_has_no_upper_end(sim, tmp_path, keep):
    result = vmbackup(PASSWORD, "web:" + keep, "host=" + sim.url, "backup_dir=%s" % tmp_path)
    assert result.status == 0, result
    assert result.has("  vm-export: web:" + keep)
    result = vmbackup(PASSWORD, "web:" + keep, "preview", "host=" + sim.url,
                      "backup_dir=%s" % tmp_path)
    assert result.status == 0, result
    assert re.search(r"web +vm-export +\d+ .* 1/2 +-$", result.out, re.M), result


def test_words_left_of_the_equals_sign_have_no_case(sim, tmp_path):
    result = vmbackup(PASSWORD, "VM-Export=web", "PREVIEW", "HOST=" + sim.url,
                      "Backup_Dir=%s" % tmp_path, "MAX_BACKUPS=7", "compress=TRUE")
    assert result.status == 0, result
    assert {"  max_backups       = 7", "  compress          = True"} <= set(result.lines)


def test_the_command_line_overrides_the_config_file(sim, tmp_path):
    config = tmp_path / "a.cfg"
    config.write_text("backup_dir=/nonexistent\nmax_backups=2\nhost=192.0.2.1\nvm-export=web\n"
                      "status_log=/nonexistent/status.log\nignore_extra_keys=False\nextra=1\n")
    result = vmbackup(PASSWORD, config, "preview", "host=" + sim.url, "backup_dir=%s" % tmp_path,
                      "max_backups=5", "ignore_extra_keys=True",
                      "status_log=%s/status.log" % tmp_path)
    assert result.status == 0, result
    assert "  max_backups       = 5" in result.lines


# --- every setting ---

WRONG = [  # a value of each kind of setting, and what the message says at least
    ("max_backups", "0", "1 or more"), ("pool_db_backup", "True", "0 (no) or 1 (yes)"),
    ("vdi_export_format", "qcow2", "raw or vhd"), ("compress", "xz", "gzip, zstd"),
    ("pre_clean", "yes", "True"), ("host", "h:0", "host:port"), ("tls_verify", "maybe", "False"),
    ("tls_fingerprint", "g" * 64, "64 hex digits"), ("parallel", "0", "1 or more"),
    ("backup_dir_pattern", "fixed", "strftime"), ("smtp_port", "65536", "1 to 65535"),
    ("mail_when", "sometimes", "always, problems or never"),
]


def test_every_bad_value_is_told_on_its_line(tmp_path):
    """All mistakes of a config file at once, each with its place, value and what is allowed."""
    config = tmp_path / "bad.cfg"
    config.write_text("".join("%s=%s\n" % item[:2] for item in WRONG))
    result = vmbackup("pw", config, cwd=tmp_path)
    assert (result.status, result.err) == (3, "")
    assert len(result.lines) == len(WRONG)
    for number, ((name, value, allowed), line) in enumerate(zip(WRONG, result.lines), 1):
        assert line.startswith("ERROR - ")
        assert "bad.cfg line %d: %s=%s is not allowed; " % (number, name, value) in line
        assert allowed in line


@pytest.mark.parametrize("word", ["max_backups=0", "host=h:0", "compress=best", "parallel=x"])
def test_a_bad_value_on_the_command_line_is_told(refused, word):
    assert word in refused("pw", "web", word)


@pytest.mark.parametrize("name, value", [
    ("backup_dir", "{}/none"), ("backup_dir", "{}/file"), ("status_log", "{}/none/status.log"),
    ("status_log", "{}"), ("report_json", "{}"), ("report_json", "{}/none/report.json"),
    ("report_json", "{}/file"), ("report_json", "{}/fifo.prom"), ("metrics_file", "{}/fifo.prom"),
    ("metrics_file", "{}/none/a.prom"), ("metrics_file", "{}/file.prom"),
    ("metrics_file", "{}/node.prom"), ("status_log", "{}/fifo.prom"), ("status_log", "{}/a.cfg"),
    ("tls_ca", "{}/none"), ("tls_ca", "{}/file"), ("smtp_password_file", "{}/none"),
    ("smtp_ca", "{}/none"), ("smtp_ca", "{}/file"), ("report_json", "{}/s"),
])
def test_a_path_that_cannot_be_used_is_told_before_the_login(sim, tmp_path, name, value):
    value = value.format(tmp_path)
    (tmp_path / "file").write_text("no PEM")
    (tmp_path / "file.prom").write_text("no metrics")
    (tmp_path / "node.prom").write_text("# HELP node_boot_time_seconds\nnode_boot_time_seconds 1\n")
    os.mkfifo(str(tmp_path / "fifo.prom"))
    config = tmp_path / "a.cfg"
    config.write_text("backup_dir=%s\nstatus_log=%s/s\nhost=%s\nvm-export=web\n" % (
        tmp_path, tmp_path, sim.url))
    sim.reset_calls()
    result = vmbackup(PASSWORD, config, "preview", "%s=%s" % (name, value))
    assert result.status == 3, result
    assert name in result.lines[-1]
    assert value in result.lines[-1]
    assert sim.calls() == []


def test_local_and_a_network_address_do_not_go_together(tmp_path):
    for words in (("local", "web", "host=h"), ("pw", "web", "host=/var/xapi")):
        result = vmbackup(*words + ("backup_dir=%s" % tmp_path,))
        assert result.status == 3
        assert "`local`" in result.lines[-1]


def test_a_mail_password_is_not_sent_in_clear(refused):
    mail = ("mail_to=a@b", "mail_from=c@d", "smtp_server=mx.example")
    assert "smtp_starttls=True" in refused("pw", "web", "smtp_user=me", "smtp_password_file=/pw",
                                           *mail)


# --- config files ---

@pytest.mark.parametrize("data, cause", [
    ("vm-export=Büro\n".encode("latin-1"), "is not UTF-8 text (byte 11)"),
    (b"vm-export=web\n\0\0\0", "binary"), (b"\x7fELF\x02\x01\0", "binary"),
    ("vm-export=web\n".encode("utf-16"), "not"),
    (b"vm-export=web\n" * 80000, "larger than 1.0 MiB"),
    (b"vm-export\n", "no '='"), (b"", "no VMs loaded"), (b"max_backups=3\n", "no VMs loaded"),
    (b"vm-export=web\nmax_backups\n", "line 2: no '='"),
    (b"vm-export=web\ncolour=red\n", "line 2: unknown setting colour, allowed are"),
    (b"vm-export=web\nignore_extra_keys=True\nmax_backups=x\n", "line 3: max_backups=x"),
    (b"vm-export=web\ncolour=red\nignore_extra_keys=True\nignore_extra_keys=False\n", "colour"),
    (b"vm-export=web:0\n", "max_backups must be 1 or more: vm-export=web:0"),
])
def test_a_config_file_that_is_none_is_told_in_one_line(refused, tmp_path, data, cause):
    (tmp_path / "a.cfg").write_bytes(data)
    assert cause in refused("pw", "a.cfg")


def test_a_large_config_file_of_one_setting_is_read_at_once(tmp_path):
    """As many lines as fit must not take quadratic time."""
    (tmp_path / "a.cfg").write_bytes(b"host=a\n" * 140000 + b"parallel=0\n")
    assert vmbackup("pw", "a.cfg", cwd=tmp_path).status == 3


def test_unknown_keys_are_named_and_passed_over_if_asked(sim, tmp_path):
    config = tmp_path / "a.cfg"
    config.write_text("backup_dir=%s\nstatus_log=%s/s\nhost=%s\nvm-export=web\ncolour=red\n"
                      "shape\nignore_extra_keys=True\n" % (tmp_path, tmp_path, sim.url))
    result = vmbackup(PASSWORD, config, "preview")
    assert result.status == 0, result
    assert {"ignoring config key: colour", "ignoring config key: shape"} <= set(result.lines)


def test_a_setting_given_twice_counts_last_with_a_warning(sim, tmp_path):
    config = tmp_path / "a.cfg"
    config.write_text("backup_dir=%s\nstatus_log=%s/s\nhost=%s\nvm-export=web\nmax_backups=2\n"
                      "max_backups=3\n" % (tmp_path, tmp_path, sim.url))
    result = vmbackup(PASSWORD, config, "preview")
    assert result.status == 1, result
    assert "  max_backups       = 3" in result.lines
    assert result.has("line 6: max_backups is given twice, the last one counts")
    assert result.lines[-1] == "SUCCESS preview parameters - WARNINGS found (see above)"

# SPDX-License-Identifier: GPL-3.0-or-later
"""What a user types, in arguments, config files and password files, and what he is told."""
import base64
import os
import stat
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from simulator.client import Simulator
from simulator.pool import Pool
from support.harness import ROOT, SCRIPT, finish, start, vmbackup

import vmbackup as program

QUICK = settings(deadline=None, max_examples=100, suppress_health_check=list(HealthCheck))
PASSWORD = "pä$$ \"w'o\\`r*d<&>;=#%:🐘"
PIN = "ab" * 32


@pytest.fixture(scope="module")
def sim():
    pool = Pool(password=PASSWORD)
    pool.vm("web")
    with Simulator.start(pool) as started:
        yield started


@pytest.fixture
def refused(tmp_path):
    """refused(words...): the one line of a run that ends with status 3 and did nothing."""
    def run(*words, **options):
        before = sorted(tmp_path.rglob("*"))
        result = vmbackup(*words, cwd=tmp_path, **options)
        assert result.status == 3, result
        assert result.err == ""
        assert len(result.lines) == 1, result
        assert sorted(tmp_path.rglob("*")) == before
        return result.lines[0]
    return run


def parse(name, value):
    """The setting's value as a config file's line gives it."""
    return getattr(program.make_settings([(name, value, "here")], []), name)


# --- help and the like ---


@pytest.mark.parametrize("word", ["help", "config", "example", "version", "HELP", "--help",
                                  "--version"])
def test_texts_go_to_standard_output(word):
    result = vmbackup(word, env={"LC_ALL": "C"})
    assert (result.status, result.err) == (0, "")
    assert result.out.endswith("\n")
    assert max(map(len, result.out.splitlines())) <= 100


def test_version_is_the_modules():
    assert program.__version__ in vmbackup("version").out


def test_example_cfg_is_what_config_prints_and_holds_only_defaults():
    printed = vmbackup("config").raw
    assert (ROOT / "example.cfg").read_bytes() == printed
    assert program.read_config(printed, "example.cfg") == []
    uncommented = [line[1:].encode() for line in printed.decode().splitlines()
                   if line.startswith("#") and line[1:].partition("=")[0] in program.KNOWN]
    made = program.make_settings(program.read_config(b"\n".join(uncommented), "example.cfg"), [])
    for name in program.KNOWN:
        assert getattr(made, name) == getattr(program.Settings(), name)
    assert len(uncommented) == len(program.KNOWN)


def test_help_names_every_setting():
    words = vmbackup("help").out.split()
    assert set(program.KNOWN) <= set(words)


@pytest.mark.parametrize("words", [(), ("-",), ("secret",)])
def test_too_few_words_show_the_usage_on_standard_error(words):
    result = vmbackup(*words)
    assert (result.status, result.out) == (3, "")
    assert result.err.startswith("Usage: vmbackup.py <password> <config-file|vm-selector>")
    assert len(result.err.splitlines()) < 10


# --- words ---


@pytest.mark.parametrize("word, named", [
    ("previev", "preview"), ("previev", "max_backups"), ("max_backup=3", "max_backups"),
    ("vm-export=web", "max_backups"), ("exclude=web", "max_backups"), ("=", "max_backups"),
    ("preview=1", "compress"), ("--preview", "preview"),
])
def test_an_unknown_word_is_named_with_those_allowed(refused, word, named):
    line = refused("pw", "web", word)
    assert word.partition("=")[0] in line
    assert named in line


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
    assert result.has("web: has 1 backups, keeps %s, would delete none" % keep)


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

GOOD = [
    ("backup_dir", "/a b", "/a b"), ("status_log", "/x=y", "/x=y"), ("username", "me", "me"),
    ("max_backups", "1", 1), ("max_backups", "999999", 999999), ("pool_db_backup", "1", 1),
    ("vdi_export_format", "VHD", "vhd"), ("vdi_export_format", "raw", "raw"),
    ("compress", "false", "False"), ("compress", "TRUE", "True"), ("compress", "Gzip", "gzip"),
    ("compress", "zstd", "zstd"), ("pre_clean", "true", True), ("pre_clean", "FALSE", False),
    ("host", "h", [("https", "h", 443)]), ("host", "h:1", [("https", "h", 1)]),
    ("host", "h:65535", [("https", "h", 65535)]),
    ("host", "10.0.0.1", [("https", "10.0.0.1", 443)]),
    ("host", "::1", [("https", "::1", 443)]), ("host", "[fe80::1]:8", [("https", "fe80::1", 8)]),
    ("host", "HTTPS://h/", [("https", "h", 443)]),
    ("host", "https://[::1]:44", [("https", "::1", 44)]),
    ("host", "http://127.0.0.9:80", [("http", "127.0.0.9", 80)]),
    ("host", "http://localhost", [("http", "localhost", 80)]),
    ("host", "a, b:2 ,c,", [("https", "a", 443), ("https", "b", 2), ("https", "c", 443)]),
    ("host", "/var/xapi", [("unix", "/var/xapi", 0)]),
    ("tls_ca", "/ca.pem", "/ca.pem"), ("tls_ca", "", None), ("tls_fingerprint", "", None),
    ("tls_fingerprint", PIN, [PIN]), ("tls_fingerprint", PIN.upper(), [PIN]),
    ("tls_fingerprint", ":".join(["AB"] * 32) + ", " + "0" * 64, [PIN, "0" * 64]),
    ("tls_verify", "False", False), ("parallel", "1", 1), ("parallel", "1000", 1000),
    ("space_check", "false", False), ("backup_dir_pattern", "%Y%m%d %H%M%S", "%Y%m%d %H%M%S"),
    ("backup_dir_pattern", "b-%F_%R", "b-%Y-%m-%d_%H:%M"),
    ("mail_to", "a@b, c@d", ["a@b", "c@d"]), ("mail_from", "a@b", "a@b"), ("mail_to", "", None),
    ("smtp_port", "1", 1), ("smtp_port", "65535", 65535), ("smtp_starttls", "True", True),
    ("mail_when", "PROBLEMS", "problems"), ("report_json", "/r.json", "/r.json"),
]
BAD = [
    ("backup_dir", ""), ("status_log", ""), ("username", ""), ("max_backups", "0"),
    ("max_backups", "-1"), ("max_backups", ""), ("max_backups", "4.0"), ("max_backups", "four"),
    ("max_backups", "٣"), ("pool_db_backup", "2"), ("pool_db_backup", "True"),
    ("vdi_export_format", "qcow2"), ("compress", "xz"), ("compress", "1"), ("compress", ""),
    ("pre_clean", "yes"), ("ignore_extra_keys", "1"), ("host", ""), ("host", ","),
    ("host", "http://10.0.0.1"), ("host", "http://127.0.0.1.evil.example"), ("host", "ftp://h"),
    ("host", "h:0"), ("host", "h:65536"), ("host", "h:x"), ("host", "[::1"), ("host", "u@h"),
    ("host", "https://u:p@h"), ("host", "h/path"), ("host", "a b"), ("host", "a..b"),
    ("host", "x" * 64 + ".example"), ("host", "good,http://bad.example"), ("tls_verify", "maybe"),
    ("tls_fingerprint", PIN[1:]), ("tls_fingerprint", PIN + "0"), ("tls_fingerprint", "g" * 64),
    ("parallel", "0"), ("parallel", "1001"), ("space_check", "off"), ("backup_dir_pattern", ""),
    ("backup_dir_pattern", "%Y-%m"), ("backup_dir_pattern", "%Y/%m/%d %H:%M:%S"),
    ("backup_dir_pattern", ".%Y%m%d%H%M%S"), ("backup_dir_pattern", "fixed"),
    ("backup_dir_pattern", "%"), ("smtp_port", "0"), ("smtp_port", "65536"),
    ("smtp_starttls", "no"), ("mail_when", "sometimes"),
]
ALLOWED = {  # what the message says at least
    "max_backups": "1 or more", "pool_db_backup": "0 (no) or 1 (yes)", "compress": "gzip, zstd",
    "vdi_export_format": "raw or vhd", "pre_clean": "True", "tls_fingerprint": "64 hex digits",
    "parallel": "1 or more", "smtp_port": "1 to 65535", "mail_when": "always, problems or never",
    "host": "host:port", "backup_dir_pattern": "strftime", "tls_verify": "False",
}


@pytest.mark.parametrize("name, value, expected", GOOD)
def test_good_values(name, value, expected):
    assert parse(name, value) == expected


def test_all_settings_have_their_good_and_bad_values():
    free = {"tls_ca", "mail_to", "mail_from", "report_json", "smtp_server", "smtp_user",
            "smtp_password_file"}
    assert {name for name, _ in BAD} == set(program.KNOWN) - free
    assert {name for name, _, _ in GOOD} >= set(program.KNOWN) - {
        "ignore_extra_keys", "smtp_server", "smtp_user", "smtp_password_file"}


def test_every_bad_value_is_told_on_its_line(tmp_path):
    """All mistakes of a config file at once, each with its place, value and what is allowed."""
    config = tmp_path / "bad.cfg"
    config.write_bytes("".join("%s=%s\n" % item for item in BAD).encode("utf-8"))
    result = vmbackup("pw", config, cwd=tmp_path)
    assert (result.status, result.err) == (3, "")
    assert len(result.lines) == len(BAD)
    for number, ((name, value), line) in enumerate(zip(BAD, result.lines), 1):
        assert line.startswith("ERROR - ")
        assert "bad.cfg line %d: %s=%s is not allowed; " % (number, name, value) in line
        assert ALLOWED.get(name, "") in line


@pytest.mark.parametrize("word", ["max_backups=0", "host=h:0", "compress=best", "parallel=x"])
def test_a_bad_value_on_the_command_line_is_told(refused, word):
    assert word in refused("pw", "web", word)


@pytest.mark.parametrize("name, value", [
    ("backup_dir", "{}/none"), ("backup_dir", "{}/file"), ("status_log", "{}/none/status.log"),
    ("status_log", "{}"), ("report_json", "{}"), ("report_json", "{}/none/report.json"),
    ("tls_ca", "{}/none"), ("tls_ca", "{}/file"), ("smtp_password_file", "{}/none"),
])
def test_a_path_that_cannot_be_used_is_told_before_the_login(sim, tmp_path, name, value):
    value = value.format(tmp_path)
    (tmp_path / "file").write_text("no PEM")
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
    assert "smtp_starttls=True" in refused("pw", "web", "smtp_user=me", "smtp_server=mx.example",
                                           "smtp_password_file=/pw")


# --- config files ---


def pairs(data):
    return [(key, value) for key, value, _ in program.read_config(data, "a.cfg")]


@pytest.mark.parametrize("data, expected", [
    (b"", []), (b"\n \n# a=b\n  # c=d\n", []), (b"a=b", [("a", "b")]),
    (b"\xef\xbb\xbfa=b\r\nc=d\r\n", [("a", "b"), ("c", "d")]),
    (b"a=b\rc=d", [("a", "b"), ("c", "d")]),
    (b" A = b c \n", [("a", "b c")]), (b"a=b=c==d\n", [("a", "b=c==d")]), (b"a=\n", [("a", "")]),
    (b"a='b'\n", [("a", "b")]), (b'a="b"\n', [("a", "b")]), (b"a=\" b \"\n", [("a", " b ")]),
    (b"a=''\n", [("a", "")]), (b"a='\n", [("a", "'")]), (b"a='b\"\n", [("a", "'b\"")]),
    (b"a=\"'b'\"\n", [("a", "'b'")]), (b"a=b # c\n", [("a", "b # c")]), (b"a\n", [("a", None)]),
    ("a=é\u2028東\x85\n".encode(), [("a", "é\u2028東")]), (b"a=b\\n\n", [("a", "b\\n")]),
])
def test_syntax_of_config_files(data, expected):
    assert pairs(data) == expected


@pytest.mark.parametrize("data, cause", [
    ("vm-export=Büro\n".encode("latin-1"), "is not UTF-8 text (byte 11)"),
    (b"vm-export=web\n\0\0\0", "binary"), (b"\x7fELF\x02\x01\0", "binary"),
    ("vm-export=web\n".encode("utf-16"), "not"), (b"vm-export=web\n" * 80000, "over 1 MiB"),
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


KEYS = st.sampled_from(list(program.KNOWN) + list(program.RULE_KEYS) + ["other", ""])
PIECES = st.one_of(st.text(max_size=20), st.sampled_from(["True", "0", "4", "raw", "%Y", "(a"]))


@QUICK
@given(st.one_of(st.binary(max_size=60), st.text(max_size=60).map(str.encode), st.lists(
    st.builds("{}={}\n".format, KEYS, PIECES), max_size=6).map("".join).map(str.encode)))
@example(b"vm-export=(?L)a")
@example(b"host=a..b")
@example(b"host=[")
@example("host=\u2100".encode())
@example(b"backup_dir_pattern=%:")
def test_no_config_file_raises_anything_of_its_own(data):
    try:
        made = program.make_settings(program.read_config(data, "a.cfg"), [])
    except program.ConfigError as error:
        assert all("ERROR" in line for line in str(error).split("\n"))
    else:
        assert made.max_backups >= 1
        assert made.host


@QUICK
@given(st.dictionaries(st.text("abcdefg_-", min_size=1), st.text(st.characters(
    blacklist_characters="\r\n\0", blacklist_categories=["Cs"]), max_size=30), max_size=8),
    st.sampled_from(["\n", "\r\n"]), st.sampled_from(["", "\ufeff"]), st.sampled_from("\"'"))
def test_what_is_written_in_quotes_is_read_back(values, end, bom, quote):
    text = bom + "".join("# a\n%s = %s%s%s%s" % (key, quote, value, quote, end)
                         for key, value in values.items())
    assert pairs(text.encode("utf-8")) == list(values.items())


# --- passwords ---


def connects(sim, tmp_path, word, **options):
    result = vmbackup(word, "web", "preview", "host=" + sim.url, "backup_dir=%s" % tmp_path,
                      **options)
    assert PASSWORD not in result.out + result.err
    return result


@pytest.mark.parametrize("end", ["", "\n", "\r\n", "\nnot this\n"])
def test_a_password_of_any_characters_from_standard_input(sim, tmp_path, end):
    assert connects(sim, tmp_path, "-", input=(PASSWORD + end).encode("utf-8")).status == 0


@pytest.mark.parametrize("env", [
    {}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}])
def test_a_password_of_any_characters_as_an_argument(sim, tmp_path, env):
    assert connects(sim, tmp_path, PASSWORD, env=env).status == 0


@pytest.mark.parametrize("word", [PASSWORD, "-"])
def test_a_password_file(sim, tmp_path, word):
    path = tmp_path / "pw"
    made = vmbackup(word, "create-password-file=%s" % path, env={"LC_ALL": "C"},
                    input=PASSWORD.encode("utf-8") + b"\n")
    assert made.status == 0, made
    assert PASSWORD not in made.out + made.err
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(str(tmp_path)) == ["pw"]
    assert base64.b64decode(path.read_bytes()).decode("utf-8") == PASSWORD
    assert connects(sim, tmp_path, path).status == 0


@pytest.mark.parametrize("end", [b"", b"\n"])
def test_a_password_file_of_upstream(sim, tmp_path, end):
    (tmp_path / "pw").write_bytes(base64.b64encode(PASSWORD.encode("utf-8")) + end)
    assert connects(sim, tmp_path, tmp_path / "pw").status == 0


@pytest.mark.parametrize("word", ["wrong", "", "-"])
def test_a_wrong_password_is_told_in_one_line(sim, tmp_path, word):
    result = connects(sim, tmp_path, word, input=b"wrong\n")
    assert result.status == 3, result
    assert "wrong user name or password" in result.lines[-1]
    assert len([line for line in result.lines if "ERROR" in line]) == 1
    assert not sim.sessions()


def test_a_file_that_is_no_password_file_is_told(sim, tmp_path):
    (tmp_path / "pw").write_text("secret in clear!")
    result = connects(sim, tmp_path, tmp_path / "pw")
    assert result.status == 3
    assert "create-password-file" in result.lines[-1]
    assert "secret in clear" not in result.out


def test_a_password_that_is_not_utf8_is_told(tmp_path):
    command = [os.fsencode(sys.executable), os.fsencode(str(SCRIPT)), b"p\xe4", b"web",
               b"backup_dir=" + os.fsencode(str(tmp_path))]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (3, b"")
    assert done.stdout.splitlines()[-1].endswith(b"the password is not UTF-8 text")


def test_create_password_file_takes_only_a_password_files_place(tmp_path):
    path = tmp_path / "pw"
    for password in ("first", "second"):
        assert vmbackup(password, "create-password-file=%s" % path).status == 0
    assert base64.b64decode(path.read_bytes()) == b"second"
    path.write_text("# a config file\n")
    assert vmbackup("third", "create-password-file=%s" % path).status == 3
    assert path.read_text() == "# a config file\n"


@pytest.mark.parametrize("words", [("create-password-file=none/pw",),
                                   ("create-password-file=pw", "preview")])
def test_create_password_file_refuses(refused, words):
    refused("pw", *words)


def test_create_password_file_needs_a_name(refused):
    assert refused("pw", "create-password-file=") == (
        "ERROR - create-password-file= needs the name of a file")


@pytest.mark.parametrize("old", [None, "first"])
def test_a_password_file_that_cannot_be_put_in_its_place(tmp_path, monkeypatch, old):
    """Nothing of it stays, and the old one does."""
    def rename(*_):
        raise OSError(5, "Input/output error")

    path = tmp_path / "pw"
    if old:
        program.create_password_file(str(path), old, print)
    before = path.read_bytes() if old else None
    monkeypatch.setattr(program.os, "rename", rename)
    with pytest.raises(program.ConfigError, match="cannot write the password file: Input"):
        program.create_password_file(str(path), "second", print)
    assert os.listdir(str(tmp_path)) == ["pw"] * bool(old)
    assert not old or path.read_bytes() == before


def test_a_password_file_is_secret_from_its_first_byte(tmp_path):
    """Its mode comes from its creation, whatever the umask: here it cannot be changed later."""
    code = ("import os, sys; sys.path.insert(0, %r); import vmbackup; os.umask(0);"
            " os.umask = lambda _: 0; os.chmod = os.fchmod = None; sys.exit(vmbackup.main())")
    subprocess.run([sys.executable, "-c", code % str(ROOT), "pw",
                    "create-password-file=%s/pw" % tmp_path], check=True, stdout=subprocess.PIPE)
    assert stat.S_IMODE((tmp_path / "pw").stat().st_mode) == 0o600


@pytest.mark.parametrize("words", [["web", "backup_dir=."], ["create-password-file=pw"]])
def test_an_empty_standard_input_gives_no_password(tmp_path, words):
    result = vmbackup("-", *words, cwd=tmp_path, input=b"")
    assert result.status == 3, result
    assert [line for line in result.lines if "ERROR" in line] == [
        "ERROR - no password was given on standard input"]
    assert os.listdir(str(tmp_path)) == []


def test_no_standard_input_is_an_empty_password(sim, tmp_path):
    process = start("-", "web", "preview", "host=" + sim.url, "backup_dir=%s" % tmp_path)
    assert finish(process).status == 3

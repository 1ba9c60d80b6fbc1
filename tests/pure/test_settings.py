# SPDX-License-Identifier: GPL-3.0-or-later
"""Settings: every value that is allowed and many that are not, config files, small files."""
import os

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import vmbackup as program

QUICK = settings(deadline=None, max_examples=100, suppress_health_check=list(HealthCheck))
PIN = "ab" * 32


def made(*lines, words=()):
    """Settings of these lines of a config file and words behind it."""
    return program.make_settings([line.partition("=")[::2] + ("here",) for line in lines],
                                 [word.partition("=")[::2] + ("command line",) for word in words])


def mistake(*lines, words=()):
    with pytest.raises(program.ConfigError) as caught:
        made(*lines, words=words)
    return str(caught.value)


GOOD = [
    ("backup_dir", "/a b", "/a b"), ("status_log", "/x=y", "/x=y"), ("status_log", "", None),
    ("username", "me", "me"), ("max_backups", "1", 1), ("max_backups", "999999", 999999),
    ("keep_daily", "0", 0), ("keep_weekly", "5", 5), ("keep_monthly", "12", 12),
    ("keep_yearly", "99", 99), ("pool_db_backup", "1", 1),
    ("vdi_export_format", "VHD", "vhd"), ("vdi_export_format", "raw", "raw"),
    ("compress", "false", "False"), ("compress", "None", "False"), ("compress", "TRUE", "True"),
    ("compress", "Gzip", "gzip"), ("compress", "zstd", "zstd"), ("pre_clean", "true", True),
    ("pre_clean", "FALSE", False), ("ignore_extra_keys", "True", True),
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
    ("rate_limit", "0", 0), ("rate_limit", "125", 125), ("retries", "3", 3),
    ("space_check", "false", False), ("require_mount", "True", True),
    ("backup_dir_pattern", "%Y%m%d %H%M%S", "%Y%m%d %H%M%S"),
    ("backup_dir_pattern", "b-%F_%R", "b-%Y-%m-%d_%H:%M"), ("mail_to", "", None),
    ("mail_from", "", None), ("smtp_server", "", None), ("smtp_user", "", None),
    ("smtp_password_file", "/pw", "/pw"), ("smtp_ca", "/mx.pem", "/mx.pem"),
    ("smtp_port", "1", 1), ("smtp_port", "65535", 65535), ("smtp_starttls", "True", True),
    ("mail_when", "PROBLEMS", "problems"), ("report_json", "/r.json", "/r.json"),
    ("metrics_file", "/m/vm.prom", "/m/vm.prom"), ("metrics_file", "", None),
]
BAD = [
    ("backup_dir", ""), ("username", ""), ("max_backups", "0"), ("max_backups", "-1"),
    ("max_backups", ""), ("max_backups", "4.0"), ("max_backups", "four"), ("max_backups", "٣"),
    ("keep_daily", "-1"), ("keep_daily", ""), ("keep_weekly", "x"), ("keep_monthly", "1.5"),
    ("keep_yearly", "all"), ("pool_db_backup", "2"), ("pool_db_backup", "True"),
    ("vdi_export_format", "qcow2"), ("compress", "xz"), ("compress", "1"), ("compress", ""),
    ("pre_clean", "yes"), ("ignore_extra_keys", "1"), ("host", ""), ("host", ","),
    ("host", "http://10.0.0.1"), ("host", "http://127.0.0.1.evil.example"), ("host", "ftp://h"),
    ("host", "h:0"), ("host", "h:65536"), ("host", "h:x"), ("host", "[::1"), ("host", "u@h"),
    ("host", "https://u:p@h"), ("host", "h/path"), ("host", "a b"), ("host", "a..b"),
    ("host", "x" * 64 + ".example"), ("host", "good,http://bad.example"), ("tls_verify", "maybe"),
    ("tls_fingerprint", PIN[1:]), ("tls_fingerprint", PIN + "0"), ("tls_fingerprint", "g" * 64),
    ("parallel", "0"), ("parallel", "1001"), ("rate_limit", "-1"), ("rate_limit", "10MB"),
    ("retries", "-1"), ("retries", "often"), ("space_check", "off"), ("require_mount", "1"),
    ("backup_dir_pattern", ""), ("backup_dir_pattern", "%Y-%m"),
    ("backup_dir_pattern", "%Y/%m/%d %H:%M:%S"), ("backup_dir_pattern", ".%Y%m%d%H%M%S"),
    ("backup_dir_pattern", "fixed"), ("backup_dir_pattern", "%"), ("smtp_server", "mx:0"),
    ("smtp_server", "mx:smtp"), ("smtp_server", "smtp://mx"), ("smtp_server", "a b"),
    ("smtp_port", "0"), ("smtp_port", "65536"), ("smtp_starttls", "no"), ("mail_when", "sometimes"),
    ("metrics_file", "/m/vm.txt"), ("metrics_file", "prom"),
]


@pytest.mark.parametrize("name, value, expected", GOOD)
def test_good_values(name, value, expected):
    assert getattr(made("%s=%s" % (name, value)), name) == expected


@pytest.mark.parametrize("name, value", BAD)
def test_bad_values_are_told_with_what_is_allowed(name, value):
    assert mistake("%s=%s" % (name, value)) == "ERROR - here: %s=%s is not allowed; %s" % (
        name, value, program.KNOWN[name].about)


def test_all_settings_have_their_good_and_bad_values():
    anything = {"tls_ca", "mail_to", "mail_from", "report_json", "smtp_user", "status_log",
                "smtp_password_file", "smtp_ca"}
    assert {name for name, _, _ in GOOD} == set(program.KNOWN)
    assert {name for name, _ in BAD} == set(program.KNOWN) - anything


def test_the_texts_name_what_is_allowed():
    for name, words in (("max_backups", "1 or more"), ("keep_daily", "0 or more"),
                        ("compress", "False (or none), True or gzip, zstd"),
                        ("metrics_file", "*.prom"), ("rate_limit", "0: no limit")):
        assert words in program.KNOWN[name].about


def test_the_policy_of_a_vm():
    settings = made("max_backups=7", "keep_daily=6", "keep_weekly=5", "keep_yearly=3")
    assert settings.policy() == (7, 6, 5, 0, 3)
    assert settings.policy(2) == (2, 6, 5, 0, 3)


# --- mail ---

MAIL = ["mail_to=a@b, c@d", "mail_from=e@f", "smtp_server=mx.example"]


@pytest.mark.parametrize("lines, server, port", [
    (["smtp_server=mx.example"], "mx.example", 25),
    (["smtp_server=mx.example:587"], "mx.example", 587), (["smtp_server=[::1]:26"], "::1", 26),
    (["smtp_server=::1"], "::1", 25), (["smtp_server=mx:587", "smtp_port=465"], "mx", 465),
    (["smtp_port=465", "smtp_server=mx:587"], "mx", 587),
    (["smtp_port=465", "smtp_server=mx"], "mx", 465),
])
def test_the_mail_servers_port(lines, server, port):
    settings = made(*MAIL[:2] + lines)
    assert (settings.mail_to, settings.mail_from) == (["a@b", "c@d"], "e@f")
    assert (settings.smtp_server, settings.smtp_port) == (server, port)


@pytest.mark.parametrize("given", [[0], [1], [2], [0, 1], [0, 2], [1, 2]])
def test_half_of_a_mail_is_told(given):
    text = mistake(*[MAIL[number] for number in given])
    for number, key in enumerate(("mail_to", "mail_from", "smtp_server")):
        assert (key in text) == (number not in given), "what is missing is named"
    assert "\n" not in text


def test_a_mail_password_is_not_sent_in_clear():
    user = ["smtp_user=me", "smtp_password_file=/pw"]
    assert "smtp_starttls=True" in mistake(*MAIL + user)
    assert "smtp_password_file" in mistake("smtp_user=me", "smtp_starttls=True", *MAIL)
    for more in (["smtp_starttls=True"], ["smtp_port=465"], ["smtp_server=localhost:587"]):
        made(*MAIL + user + more)


# --- names and hints ---

@pytest.mark.parametrize("key, near", [
    ("max_backup", "max_backups"), ("backupdir", "backup_dir"), ("vm_export", "vm-export"),
    ("excludes", "exclude"), ("keep_dayly", "keep_daily"), ("smtp_sever", "smtp_server"),
    ("compression", "compress"),
])
def test_the_one_setting_of_a_similar_name_is_proposed_alone(key, near):
    assert mistake(key + "=1") == "ERROR - here: unknown setting %s, did you mean %s?" % (key, near)


@pytest.mark.parametrize("key", ["colour", "", "x", "only"])
def test_else_all_are_named(key):
    text = mistake(key + "=1")
    assert all(name in text for name in list(program.KNOWN) + ["vm-export", "exclude"])


def test_a_comment_behind_a_value_is_told():
    assert "a line of its own" in mistake("max_backups=3 # three of them")


def test_all_mistakes_are_told_at_once():
    lines = mistake("max_backups=x", "colour=red", "vm-export=web:0", "compress=best").split("\n")
    assert [line.split(" - ")[0] for line in lines] == ["ERROR"] * 4


def test_only_is_for_the_command_line():
    assert [rule.name for rule in made("vm-export=.*", words=["only=a", "only=b.*"]).only] == [
        "a", "b.*"]
    assert "unknown setting only" in mistake("only=a")


@pytest.mark.parametrize("line", ["vm-export=web:0", "vdi-export=web:0", "vm-export=a.*:00",
                                  "vm-export=web:-1"])
def test_own_max_backups_is_one_or_more(line):
    assert mistake(line) == "ERROR - max_backups must be 1 or more: " + line


# --- config files ---

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
    assert [pair[:2] for pair in program.read_config(data, "a.cfg")] == expected


def test_the_example_holds_only_defaults():
    text = program.config_text()
    assert program.read_config(text.encode(), "example.cfg") == []
    uncommented = [line[1:] for line in text.splitlines()
                   if line.startswith("#") and line[1:].partition("=")[0] in program.KNOWN]
    assert len(uncommented) == len(program.KNOWN)
    assert vars(made(*uncommented)) == vars(program.Settings())


SECRET = "c2VjcmV0IHBhc3N3b3Jk\n"


@pytest.mark.parametrize("text", [SECRET, "hunter2 horse\n", "hunter2=1\n",
                                  "# vm-export=web\nhunter2"])
def test_a_file_that_is_no_config_file_is_told_without_a_word_of_it(tmp_path, text):
    path = tmp_path / "pw"
    path.write_text(text)
    with pytest.raises(program.ConfigError, match="is no config file") as caught:
        program.load_config(str(path))
    assert not any(word in str(caught.value) for word in (SECRET[:9], "hunter2", "horse"))


@pytest.mark.parametrize("text", ["", "# nothing\n", "max_backups\n", "colour=1\nvm-export=web\n"])
def test_a_file_with_a_mistake_is_a_config_file_all_the_same(tmp_path, text):
    path = tmp_path / "a.cfg"
    path.write_text(text)
    assert len(program.load_config(str(path))) == text.replace("# nothing\n", "").count("\n")


KEYS = st.sampled_from(list(program.KNOWN) + list(program.RULE_KEYS) + ["other", "only", ""])
PIECES = st.one_of(st.text(max_size=20), st.sampled_from(["True", "0", "4", "raw", "%Y", "(a"]))


@QUICK
@given(st.one_of(st.binary(max_size=60), st.text(max_size=60).map(str.encode), st.lists(
    st.builds("{}={}\n".format, KEYS, PIECES), max_size=6).map("".join).map(str.encode)))
@example(b"vm-export=(?L)a")
@example(b"host=a..b")
@example(b"host=[")
@example("host=\u2100".encode())
@example("smtp_server=\u2100".encode())
@example(b"backup_dir_pattern=%:")
def test_no_config_file_raises_anything_of_its_own(data):
    try:
        found = program.make_settings(program.read_config(data, "a.cfg"), [])
    except program.ConfigError as error:
        assert all("ERROR" in line for line in str(error).split("\n"))
    else:
        assert found.max_backups >= 1
        assert found.host


@QUICK
@given(st.dictionaries(st.text("abcdefg_-", min_size=1), st.text(st.characters(
    blacklist_characters="\r\n\0", blacklist_categories=["Cs"]), max_size=30), max_size=8),
    st.sampled_from(["\n", "\r\n"]), st.sampled_from(["", "\ufeff"]), st.sampled_from("\"'"))
def test_what_is_written_in_quotes_is_read_back(values, end, bom, quote):
    text = bom + "".join("# a\n%s = %s%s%s%s" % (key, quote, value, quote, end)
                         for key, value in values.items())
    found = [pair[:2] for pair in program.read_config(text.encode("utf-8"), "a.cfg")]
    assert found == list(values.items())


# --- small files ---

def test_small_files_are_read_whole_or_from_their_start(tmp_path):
    (tmp_path / "a").write_bytes(b"12345")
    name = str(tmp_path / "a")
    assert program.read_small(name) == program.read_small(name, limit=5) == b"12345"
    assert program.read_start(name, size=2) == b"12"
    with pytest.raises(OSError, match="larger than 4 bytes"):
        program.read_small(name, limit=4)
    with pytest.raises(FileNotFoundError):
        program.read_small(str(tmp_path / "none"))


@pytest.mark.parametrize("kind", ["fifo", "folder", "device"])
def test_what_is_no_file_is_refused_at_once(tmp_path, kind):
    path = "/dev/zero" if kind == "device" else str(tmp_path / kind)
    if kind != "device":
        {"fifo": os.mkfifo, "folder": os.mkdir}[kind](path)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="no regular file"):
        program.read_small(path)
    assert len(os.listdir("/proc/self/fd")) == before


def test_inside_a_folder_no_link_is_followed(tmp_path):
    (tmp_path / "secret").write_text("x")
    (tmp_path / "link").symlink_to("secret")
    fd = os.open(str(tmp_path), os.O_RDONLY)
    try:
        assert program.read_small("secret", fd) == b"x"
        with pytest.raises(OSError, match="."):
            program.read_small("link", fd)
    finally:
        os.close(fd)
    assert program.read_small(str(tmp_path / "link")) == b"x"

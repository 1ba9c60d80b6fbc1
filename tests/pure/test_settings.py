# SPDX-License-Identifier: GPL-3.0-or-later
"""Settings: what each takes and refuses, and how a config file is read."""
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from support.harness import ROOT

import vmbackup as program

QUICK = settings(deadline=None, max_examples=100, suppress_health_check=list(HealthCheck))
PIN = "ab" * 32
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


def parse(name, value):
    """The setting's value as a config file's line gives it."""
    return getattr(program.make_settings([(name, value, "here")], []), name)


@pytest.mark.parametrize("name, value, expected", GOOD)
def test_good_values(name, value, expected):
    assert parse(name, value) == expected


def test_all_settings_have_their_good_and_bad_values():
    free = {"tls_ca", "mail_to", "mail_from", "report_json", "smtp_server", "smtp_user",
            "smtp_password_file"}
    assert {name for name, _ in BAD} == set(program.KNOWN) - free
    assert {name for name, _, _ in GOOD} >= set(program.KNOWN) - {
        "ignore_extra_keys", "smtp_server", "smtp_user", "smtp_password_file"}


@pytest.mark.parametrize("name, value", BAD)
def test_bad_values(name, value):
    with pytest.raises(program.ConfigError) as caught:
        parse(name, value)
    assert "%s=%s is not allowed; " % (name, value) in str(caught.value)


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


def test_example_cfg_holds_only_defaults():
    printed = (ROOT / "example.cfg").read_bytes()
    assert program.read_config(printed, "example.cfg") == []
    uncommented = [line[1:].encode() for line in printed.decode().splitlines()
                   if line.startswith("#") and line[1:].partition("=")[0] in program.KNOWN]
    made = program.make_settings(program.read_config(b"\n".join(uncommented), "example.cfg"), [])
    for name in program.KNOWN:
        assert getattr(made, name) == getattr(program.Settings(), name)
    assert len(uncommented) == len(program.KNOWN)

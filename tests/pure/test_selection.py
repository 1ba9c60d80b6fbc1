# SPDX-License-Identifier: GPL-3.0-or-later
"""Which VMs are chosen, which folder is theirs, which backups expire: rules, and properties."""
import hashlib
import os
import re
import signal
import string
import subprocess
import sys
import unicodedata

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from simulator.client import Simulator
from simulator.pool import Pool
from support.harness import ROOT, Result

import vmbackup

QUICK = settings(deadline=None, max_examples=100, suppress_health_check=list(HealthCheck))


def rules_of(*lines):
    pairs = [line.partition("=")[::2] + ("here",) for line in lines]
    return vmbackup.make_settings(pairs, []).rules


def chosen(lines, names):
    """{name: (kind, own max_backups)} of the VMs that these lines of a config file choose."""
    selection = vmbackup.select(rules_of(*lines), {name: ["ref"] for name in names})
    found = {choice.name: (choice.kind, choice.keep) for choice in selection.choices}
    assert len(found) == len(selection.choices), "a VM is chosen twice"
    return found


VM, VDI = "vm-export", "vdi-export"


@pytest.mark.parametrize("lines, names, expected", [
    # a simple name is itself alone, any other value matches at the start and is open at its end
    (["vm-export=web"], ["web", "web2", "my web"], {"web": (VM, None)}),
    (["vm-export=we."], ["web", "web2", "my web"], {"web": (VM, None), "web2": (VM, None)}),
    (["vm-export=web$"], ["web", "web2"], {"web": (VM, None)}),
    (["vm-export=web 1-a_B"], ["web 1-a_B", "web 1-a_B2"], {"web 1-a_B": (VM, None)}),
    (["vm-export=Web"], ["web", "Web"], {"Web": (VM, None)}),
    (["vm-export="], ["a", "b.c"], {"a": (VM, None), "b.c": (VM, None)}),
    (["vm-export=web.1"], ["web.1", "webx1", "web.10"],
     {"web.1": (VM, None), "webx1": (VM, None), "web.10": (VM, None)}),
    # :N, only from the end
    (["vm-export=web:2"], ["web"], {"web": (VM, 2)}),
    (["vm-export=web:1"], ["web"], {"web": (VM, 1)}),
    (["vm-export=a|b:2"], ["a", "b", "c"], {"a": (VM, 2), "b": (VM, 2)}),
    (["vm-export=:7"], ["a"], {"a": (VM, 7)}),
    (["vm-export=(?:x|y).*"], ["x1", "z"], {"x1": (VM, None)}),
    (["vm-export=a:b"], ["a", "a:b", "a:b:c"], {"a:b": (VM, None), "a:b:c": (VM, None)}),
    (["vm-export=a:3:2"], ["a", "a:3", "a:3:2"], {"a:3": (VM, 2), "a:3:2": (VM, 2)}),
    (["vdi-export=web:3"], ["web"], {"web": (VDI, 3)}),
    # a regular expression does not replace what a simple name chose, wherever either stands
    (["vm-export=web:9", "vm-export=w.*:2"], ["web", "www"], {"web": (VM, 9), "www": (VM, 2)}),
    (["vm-export=w.*:2", "vm-export=web:9"], ["web", "www"], {"web": (VM, 9), "www": (VM, 2)}),
    (["vm-export=web", "vm-export=w.*:2"], ["web"], {"web": (VM, None)}),
    # among equals the last counts, its :N too, and that it has none
    (["vm-export=web:2", "vm-export=web:3"], ["web"], {"web": (VM, 3)}),
    (["vm-export=web:2", "vm-export=web"], ["web"], {"web": (VM, None)}),
    (["vm-export=w.*:2", "vm-export=.e.*:3"], ["web", "www"], {"web": (VM, 3), "www": (VM, 2)}),
    (["vm-export=w.*:2", "vm-export=.*"], ["web"], {"web": (VM, None)}),
    # exclude wins, wherever it stands
    (["vm-export=.*", "exclude=web"], ["web", "db"], {"db": (VM, None)}),
    (["exclude=web", "vm-export=.*"], ["web", "db"], {"db": (VM, None)}),
    (["vm-export=web", "exclude=w.*"], ["web"], {}),
    (["vdi-export=web", "exclude=web"], ["web"], {}),
    (["vdi-export=web", "exclude=web", "vm-export=web"], ["web"], {}),
    (["exclude=web:2", "vm-export=.*"], ["web", "web:2"], {"web": (VM, None)}),
    (["exclude=", "vm-export=.*"], ["web"], {"web": (VM, None)}),
    # what vdi-export chose is not vm-exported
    (["vdi-export=web", "vm-export=.*"], ["web", "db"], {"web": (VDI, None), "db": (VM, None)}),
    (["vm-export=.*", "vdi-export=w.*:2"], ["web", "db"], {"web": (VDI, 2), "db": (VM, None)}),
    (["vm-export=web", "vdi-export=web"], ["web"], {"web": (VDI, None)}),
    (["vdi-export=", "vm-export=db"], ["web", "db"], {"db": (VM, None)}),
    # letters and digits of any script, with their combining marks, make a simple name
    (["vm-export=Büro"], ["Büro", "Büro 2"], {"Büro": (VM, None)}),
    (["vm-export=Bu\u0308ro"], ["Bu\u0308ro", "Bu\u0308ro 2"], {"Bu\u0308ro": (VM, None)}),
    (["vm-export=東京"], ["東京", "東京2"], {"東京": (VM, None)}),
    (["vm-export=हिन्दी"], ["हिन्दी", "हिन्दी2"], {"हिन्दी": (VM, None)}),
    (["vm-export=العربية ٣"], ["العربية ٣", "العربية ٣٤"], {"العربية ٣": (VM, None)}),
    (["vm-export=🐘"], ["🐘", "🐘🐘"], {"🐘": (VM, None), "🐘🐘": (VM, None)}),
])
def test_rules(lines, names, expected):
    assert chosen(lines, names) == expected


def test_what_matched_nothing_is_told_by_its_kind():
    """A simple name without a VM is an error, an expression or exclude without one a warning."""
    rules = rules_of("vm-export=gone", "vm-export=none.*:2", "exclude=nobody", "exclude=x.*")
    selection = vmbackup.select(rules, {"a": [1]})
    assert [(choice.name, choice.refs) for choice in selection.choices] == [("gone", [])]
    assert selection.unmatched == ["vm-export=none.*:2"]
    assert selection.unknown_excludes == ["nobody", "x.*"]
    assert selection.left == ["a"]


@pytest.mark.parametrize("line", ["vm-export=web:0", "vdi-export=web:0", "vm-export=a.*:00",
                                  "vm-export=web:-1"])
def test_own_max_backups_is_one_or_more(line):
    with pytest.raises(vmbackup.ConfigError, match="1 or more.*" + re.escape(line)):
        rules_of(line)


@pytest.mark.parametrize("value", ["(", "*a", "[a", "a**", "(?P<x>a)(?P<x>b)", "(?L)a", "(?au)a",
                                   "a{99999999999999999999}", "(" * 3000 + ")" * 3000])
@pytest.mark.parametrize("key", ["vm-export", "vdi-export", "exclude"])
def test_what_does_not_compile_is_named(key, value):
    """Or, where this Python can compile it, nothing is raised."""
    try:
        re.compile(value)
    except Exception:
        with pytest.raises(vmbackup.ConfigError) as caught:
            rules_of("%s=%s" % (key, value))
        assert str(caught.value) == "***ERROR - invalid regex: %s=%s" % (key, value)
    else:
        rules_of("%s=%s" % (key, value))


# --- through the program ---


@pytest.fixture(scope="module")
def sim():
    pool = Pool()
    for name in ("web", "web2", "db", "Büro", "twin", "twin", "RESTORE_web", "a" * 40 + "!"):
        pool.vm(name)
    pool.template("web template")
    with Simulator.start(pool) as started:
        yield started


def preview(sim, tmp_path, *lines, code="import vmbackup, sys; sys.exit(vmbackup.main())"):
    """The Result of a preview with these lines in the config file; code starts the program."""
    config = tmp_path / "night.cfg"
    head = ["backup_dir=%s" % tmp_path, "status_log=%s/status.log" % tmp_path, "host=%s" % sim.url]
    config.write_bytes("\n".join(head + list(lines)).encode("utf-8"))
    process = subprocess.Popen([sys.executable, "-c", code, sim.password, str(config), "preview"],
                               cwd=str(ROOT), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = process.communicate(timeout=100)
    return Result(process.returncode, out, err)


def test_the_program_chooses_by_the_rules(sim, tmp_path):
    result = preview(sim, tmp_path, "vm-export=w.*:2", "exclude=web2", "vm-export=db",
                     "vdi-export=B.*:7")
    listed = [line for line in result.lines if line.startswith("  v") and "-export" in line]
    assert listed == ["  vdi-export (cnt)= 1", "  vdi-export: Büro:7",
                      "  vm-export (cnt)= 2", "  vm-export: db, web:2"]
    left = "VMs-not-in-backup: RESTORE_web, %s!, twin, web2" % ("a" * 40)
    assert left in result.lines


@pytest.mark.parametrize("lines, status, texts", [
    (["vm-export=gone", "vm-export=db"], 2, ["ERROR - vm(s) List does not exist: gone"]),
    (["vm-export=x1", "vm-export=x2"], 2, ["ERROR - vm(s) List does not exist: x1 x2"]),
    (["vm-export=twin", "vm-export=db"], 2, ["*** ERROR: duplicate VM name found: twin"]),
    (["vm-export=db", "vm-export=x.*:3"], 1, ["***WARNING - vm not found: vm-export=x.*:3"]),
    (["vm-export=db", "vdi-export=x."], 1, ["***WARNING - vm not found: vdi-export=x."]),
    (["vm-export=db", "exclude=x1", "exclude=y.*"], 1,
     ["***WARNING - vm(s) Exclude does not exist: x1 y.*"]),
    (["vm-export=db", "exclude="], 1, ["***WARNING - empty exclude= is passed over"]),
    (["vm-export=db", "vdi-export="], 1, ["***WARNING - empty vdi-export= is passed over"]),
    (["vm-export=web template"], 2, ["ERROR - vm(s) List does not exist: web template"]),
    (["vm-export=(", "vdi-export=db"], 3, ["***ERROR - invalid regex: vm-export=("]),
])
def test_the_program_tells_what_matched_nothing(sim, tmp_path, lines, status, texts):
    result = preview(sim, tmp_path, *lines)
    assert result.status == status, result
    for text in texts:
        assert text in result.lines


def test_an_invalid_expression_stops_before_anything_is_asked(sim, tmp_path):
    sim.reset_calls()
    assert preview(sim, tmp_path, "vm-export=db", "exclude=[").status == 3
    assert sim.calls() == []


def test_an_expression_of_exponential_time_is_stopped(sim, tmp_path):
    result = preview(sim, tmp_path, "vm-export=(a+)+$", code="import vmbackup, sys;"
                     " vmbackup.REGEX_TIMEOUT = 0.5; sys.exit(vmbackup.main())")
    assert result.status == 3, result
    assert "takes too long" in result.lines[-1]
    assert [line for line in result.lines if "ERROR" in line] == result.lines[-1:]
    assert not sim.sessions()


def test_the_time_limit_leaves_no_timer_behind():
    before = signal.getsignal(signal.SIGALRM)
    with vmbackup.time_limit(50, "x"):
        pass
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    assert signal.getsignal(signal.SIGALRM) is before


# --- properties ---

NAMES = st.text("ab-._ é1", min_size=1, max_size=4)
VALUES = st.one_of(NAMES, st.sampled_from(["a.*", ".*", "[ab]", "a|b", "b$", "", "é."]))
LINES = st.lists(st.tuples(st.sampled_from([VM, VDI, "exclude"]), VALUES,
                           st.sampled_from(["", ":1", ":12"])), max_size=8)


@QUICK
@given(LINES, st.sets(NAMES, max_size=8))
def test_every_vm_goes_where_the_rules_say(lines, names):
    """Against the rules in other words: for one name, the last simple line, or else the last
    expression, of vdi-export and then of vm-export."""
    lines = [(key, value.strip(), "" if key == "exclude" else keep) for key, value, keep in lines]
    lines = [line for line in lines if line[1] or line[0] == VM]

    def simple(value):
        return bool(value) and not set(value) & set(".*[]|$")

    def fits(value, name):
        return value == name if simple(value) else bool(re.match(value, name))

    expected = {}
    in_file = {value for key, value, _ in lines if key != "exclude" and simple(value)}
    for name in names | in_file:
        if name in names and any(key == "exclude" and fits(value, name) for key, value, _ in lines):
            continue
        for kind in (VM, VDI):  # the second one wins
            mine = [line for line in lines if line[0] == kind]
            by_name = [line for line in mine if simple(line[1]) and line[1] == name]
            by_regex = [line for line in mine if not simple(line[1]) and re.match(line[1], name)]
            last = (by_name or (by_regex if name in names else []))[-1:]
            for _, _, keep in last:
                expected[name] = (kind, int(keep[1:]) if keep else None)
    assert chosen(["%s=%s%s" % line for line in lines], names) == expected


@QUICK
@given(st.lists(st.tuples(st.sampled_from([VM, VDI, "exclude"]), st.text(max_size=12)), max_size=4),
       st.lists(st.text(max_size=6), max_size=4))
def test_no_selector_raises_anything_of_its_own(lines, names):
    try:
        selected = chosen(["%s=%s" % line for line in lines], names)
    except vmbackup.ConfigError:
        return
    assert set(selected) - set(names) <= {name for name in selected if vmbackup.is_simple(name)}


def escaped(name):
    """The contract's words for the names of folders, char by char."""
    found = ""
    for index, char in enumerate(name):
        control = unicodedata.category(char) == "Cc"
        if char in "/%" or control or (char == "." and index == 0):
            found += "".join("%%%02X" % byte for byte in char.encode("utf-8"))
        else:
            found += char
    return found


TRICKY = st.text(st.sampled_from("/%.~2Fa5Ee0\0\n\x7f\x85é🐘-"), max_size=8)
LONG = st.builds(lambda start, char, count, end: start + char * count + end, TRICKY,
                 st.sampled_from("aé🐘%/"), st.integers(30, 210),
                 st.one_of(TRICKY, st.text("0123456789abcdef", min_size=8, max_size=8)
                           .map(lambda digits: "~" + digits)))
ANY_NAME = st.one_of(st.text(max_size=30), TRICKY, LONG)


@QUICK
@given(ANY_NAME)
@example("")
@example(".")
@example("..")
@example("success")
@example("-rf")
@example("a" * 200)
@example("a" * 201)
def test_a_folder_lies_inside_backup_dir(name):
    folder = vmbackup.folder_name(name)
    data = os.fsencode(vmbackup.native(folder))
    assert data == folder.encode("utf-8")
    assert 0 < len(data) <= 200
    assert os.path.dirname(os.path.normpath(b"/backups/" + data)) == b"/backups"
    assert not data.startswith(b".")
    assert not [char for char in folder if unicodedata.category(char) == "Cc"]


@QUICK
@given(st.text(min_size=1, max_size=60))
@example("a" * 200)
@example("é" * 100)
@example("/etc/passwd")
@example("../../x")
@example("100%")
@example("a.b")
@example("a\x85\n\0")
def test_a_short_name_is_escaped_as_the_contract_says(name):
    assume(len(escaped(name).encode("utf-8")) <= 200)
    assert vmbackup.folder_name(name) == escaped(name)


@QUICK
@given(LONG)
def test_a_long_name_ends_in_its_hash(name):
    assume(len(escaped(name).encode("utf-8")) > 200)
    digits = hashlib.sha256(name.encode("utf-8")).hexdigest()[:8]
    folder = vmbackup.folder_name(name)
    assert folder.endswith("~" + digits)
    assert escaped(name).startswith(folder[:-9])
    assert len(folder.encode("utf-8")) > 190


@QUICK
@given(st.lists(ANY_NAME, min_size=2, max_size=12, unique=True))
@example(["/", "%2F", "%252F"])
@example([".a", "%2Ea"])
@example(["a" * 300, "a" * 301])
def test_two_names_never_share_a_folder(names):
    folders = [vmbackup.folder_name(name) for name in names]
    folders += [vmbackup.folder_name(folder) for folder in set(folders) - set(names)]
    assert len(set(folders)) == len(folders)


def test_a_name_that_looks_like_a_cut_one_gets_a_folder_of_its_own():
    long = "a" * 300
    assert vmbackup.folder_name(vmbackup.folder_name(long)) != vmbackup.folder_name(long)


FOLDERS = st.lists(st.builds(
    vmbackup.Folder, st.text(string.ascii_letters, min_size=1, max_size=6),
    st.one_of(st.none(), st.integers(0, 20).map(float)),
    st.one_of(st.none(), st.sampled_from(vmbackup.MARKERS)), st.booleans(),
), max_size=12, unique_by=lambda folder: folder.name)


@QUICK
@given(FOLDERS, st.integers(-1, 6), st.data())
def test_only_good_backups_beyond_the_newest_expire(folders, keep, data):
    """G3: never what bears no marker or date, never the newest good one, never the one just made,
    and what goes is older than all that stays."""
    good = {folder.name: folder.created for folder in folders
            if folder.marker and folder.created is not None}
    newest = data.draw(st.sampled_from([None] + sorted(good)))
    doomed = vmbackup.expired(folders, keep, newest)
    stay = set(good) - set(doomed)
    assert len(set(doomed)) == len(doomed)
    assert set(doomed) <= set(good)
    assert len(stay) == min(len(good), max(keep, 1))
    assert newest is None or newest in stay
    ages = [good[name] for name in doomed]
    assert ages == sorted(ages)
    assert not ages or all(good[name] >= ages[-1] for name in stay - {newest})


@pytest.mark.parametrize("marker", ["success", "success_restore", "success_compress",
                                    "success_compressing"])
def test_every_marker_of_upstream_counts(tmp_path, marker):
    for day in "123":
        folder = tmp_path / ("backup-2026-01-0%s-(02:00:00)" % day)
        folder.mkdir()
        (folder / marker).write_text("")
    (tmp_path / "backup-2026-01-04-(02:00:00)").mkdir()
    (tmp_path / "@keep").mkdir()
    found = vmbackup.list_folders(str(tmp_path), [vmbackup.DEFAULT_PATTERN])
    assert vmbackup.expired(found, 2) == ["backup-2026-01-01-(02:00:00)"]

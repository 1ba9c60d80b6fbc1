# SPDX-License-Identifier: GPL-3.0-or-later
"""list and check: what is there, how old it is, and what a monitor hears of it."""
import datetime
import json
import os
import random
import re
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import forks
from support.harness import SCRIPT, Result, start, vmbackup
from support.monitor import Answer, outside
from support.upstream import MARKERS, leave_backup, leave_pool_dump
from support.world import wait_until

HOUR = 3600


def call(*words):
    return Result(*forks.run(words))


def check(*words):
    return Answer(call("check", *words))


def listed(*words):
    result = call("list", *words, "json")
    assert result.status == (0 if json.loads(result.out) else 2) and result.err == ""
    return json.loads(result.out)


def night(hours):
    """(seconds since 1970, name of a backup's folder) of that many hours ago, in UTC."""
    created = int(time.time() - hours * HOUR)
    return created, time.strftime("backup-%Y-%m-%d-(%H:%M:%S)", time.gmtime(created))


def leave(top, vm, *ages, label=None, uuid="ab-1", size=10, suffix="xva", marked=True):
    """Backups of these ages in hours, as this program makes them; the folder of the last."""
    for hours in ages:
        created, name = night(hours)
        folder = top / vm / name
        (folder / "DISK-xvda").mkdir(parents=True)
        (folder / ("%s.%s" % (vm, suffix))).write_bytes(b"x" * size)
        told = (label or vm).replace("\\", "\\\\").replace("\n", "\\n")
        (folder / "vm.cfg").write_text("name_label=%s\norig_uuid=%s\n" % (told, uuid),
                                       encoding="utf-8", errors="surrogateescape")
        (folder / ("success" if marked else "unfinished.partial")).write_text(
            "created=%d\n" % created)
    return folder


@pytest.fixture
def top(tmp_path):
    folder = tmp_path / "backups"
    folder.mkdir()
    return folder


@pytest.fixture
def config(top):
    """config(line, ...) writes a config file for this backup_dir."""
    def write(*lines):
        path = top.parent / "weekend.cfg"
        path.write_text("\n".join(["backup_dir=%s" % top] + list(lines)) + "\n", encoding="utf-8")
        return path

    return write


# --- check ---

def test_the_line_of_the_contract(top, config):
    for number in range(39):
        leave(top, "vm%02d" % number, 2 + number / 100, 30)
    leave(top, "db1", 74)
    answer = check(config("vm-export=.*", "vm-export=web"))
    assert answer.state == "CRITICAL"
    assert answer.text == "2 of 41 VMs: web (never), db1 (3 d 2 h)"
    assert answer.more == ["web: never", "db1: 3 d 2 h"]
    assert list(answer.figures) == ["vms", "late", "oldest", "newest", "free"]
    assert answer.figures["vms"] == (41, "", "", "")
    assert answer.figures["late"] == (2, "", "0", "0")
    assert abs(answer.figures["oldest"].value - 74 * HOUR) < 60
    assert answer.figures["oldest"][1:] == ("s", "93600", "180000")
    assert abs(answer.figures["newest"].value - 2 * HOUR) < 60
    assert answer.figures["newest"][1:] == ("s", "", "")
    assert answer.figures["free"].value > 0 and answer.figures["free"].unit == "B"
    assert answer.alerts() == {"late": "CRITICAL", "oldest": "CRITICAL"}


@pytest.mark.parametrize("hours, words, state", [
    (1, [], "OK"), (25.9, [], "OK"), (26.1, [], "WARNING"), (49.9, [], "WARNING"),
    (50.1, [], "CRITICAL"), (9000, [], "CRITICAL"),
    (-0.9, [], "OK"), (-1.1, [], "CRITICAL"), (-9000, [], "CRITICAL"),
    (1.4, ["warn=90m"], "OK"), (1.6, ["warn=90m"], "WARNING"), (1.6, ["WARN=90M"], "WARNING"),
    (71, ["warn=3d", "crit=2w"], "OK"), (73, ["crit=2w", "warn=3d"], "WARNING"),
    (337, ["warn=3d", "crit=2w"], "CRITICAL"), (73, ["warn=3d", "crit=3d"], "CRITICAL"),
])
def test_ages(top, hours, words, state):
    leave(top, "web", hours)
    answer = check(top, *words)
    assert answer.state == state
    assert (answer.more == []) == (state == "OK")
    assert answer.figures["late"].value == (state != "OK")
    if state == "CRITICAL":
        assert outside(answer.figures["oldest"].value, answer.figures["oldest"].crit)


def test_the_newest_counts_and_only_a_marked_one(top):
    leave(top, "web", 2, 60, 100)
    leave(top, "db1", 60)
    leave(top, "db1", 2, marked=False)
    answer = check(top)
    assert answer.text == "1 of 2 VMs: db1 (2 d 12 h)"
    assert answer.figures["newest"].value < 3 * HOUR


def test_the_worst_come_first(top, config):
    for vm, hours in (("warn", 30), ("gone", 9000), ("late", 60), ("fine", 1), ("ahead", -5.01)):
        leave(top, vm, hours)
    answer = check(config("vm-export=.*", "vm-export=none"))
    names = [line.partition(":")[0] for line in answer.more]
    assert names == ["none", "gone", "late", "ahead", "warn"]
    assert answer.text == ("5 of 6 VMs: none (never), gone (375 d), late (2 d 12 h),"
                           " ahead (5 h in the future), warn (1 d 6 h)")


def test_one_that_is_long_gone(top):
    leave(top, "new", 29 * 24)
    leave(top, "old", 31 * 24)
    answer = check(top)
    assert answer.more == ["old: 31 d; gone? exclude=old, or move its folder", "new: 29 d"]


def test_hundreds_that_are_late_still_give_a_short_line(top):
    for number in range(300):
        leave(top, "a machine with a long name, number %03d" % number, 60 + number)
    answer = check(top)
    assert "300 of 300 VMs: " in answer.text and answer.text.endswith("and 288 more")
    assert len(answer.more) == 300


@pytest.mark.parametrize("words, text", [
    (["{0}", "warn=26"], "warn=26"), (["{0}", "warn=0h"], "warn=0h"),
    (["{0}", "warn=26x"], "warn=26x"), (["{0}", "wran=26h"], "wran=26h"),
    (["{0}", "warn="], "warn="), (["{0}", "web", "db1"], "db1"),
    (["{0}", "crit=1h"], "below"), (["{0}", "warn=3d"], "below"),
    (["{0}/nothing"], "no such config file or folder"), ([], "config-file"),
    (["{0}/empty"], "no backup in"), (["{0}/bad.cfg"], "max_backup"),
    (["{0}/gone.cfg"], "no such config file or folder"), (["{0}/secret"], ""),
])
def test_what_cannot_be_told_is_unknown(top, words, text):
    leave(top, "web", 2)
    (top / "empty").mkdir()
    (top / "bad.cfg").write_text("max_backup=3\nvm-export=web\n")
    (top / "gone.cfg").write_text("backup_dir=/nowhere\nvm-export=web\n")
    (top / "secret").write_text("c2VjcmV0\n")
    answer = check(*[word.format(top) for word in words])
    assert answer.state == "UNKNOWN" and text in answer.text
    assert not answer.more and not answer.figures and "c2VjcmV0" not in answer.text


def test_a_name_without_a_backup_is_critical(top, config):
    leave(top, "web", 2)
    (top / "db1").mkdir()
    for where in (top, config("vm-export=web")):
        for name in ("db1", "nothing", "we"):
            answer = check(where, name)
            assert answer.state == "CRITICAL" and answer.text == "1 of 1 VMs: %s (never)" % name
            assert set(answer.figures) == {"vms", "late", "free"}
        assert check(where, "web").text.startswith("1 VM, longest ago web (2 h")


def test_a_config_file_chooses(top, config):
    leave(top, "web", 2)
    leave(top, "prod-1", 60)
    leave(top, "prod-2", 2)
    leave(top, "left out", 9000)
    leave(top, "not mine", 9000)
    answer = check(config("vm-export=prod.*:2", "vdi-export=web", "exclude=prod-1",
                          "exclude=left.*", "vm-export=left.*"))
    assert answer.state == "OK" and answer.figures["vms"].value == 2
    assert check(config("vm-export=")).figures["vms"].value == 5
    assert check(config("exclude=.*")).state == "UNKNOWN"
    assert check(config("vm-export=web", "vm-export=never seen")).state == "CRITICAL"
    assert check(config("vm-export=(web")).state == "UNKNOWN"


def test_a_custom_pattern(top, config):
    created, _ = night(2)
    folder = leave(top, "web", 60)
    fresh = folder.parent / time.strftime("%Y%m%d_%H%M", time.gmtime(created))
    shutil.copytree(str(folder), str(fresh))
    (fresh / "success").write_text("created=%d\n" % created)
    assert check(top).state == "OK"
    assert check(config("vm-export=web", "backup_dir_pattern=%Y%m%d_%H%M")).state == "OK"
    assert check(config("vm-export=web")).state == "CRITICAL"
    (fresh / "success").write_text("")
    assert check(config("vm-export=web", "backup_dir_pattern=%Y%m%d_%H%M")).state == "OK"


@pytest.mark.parametrize("where", ["", "web", "web/{}"])
def test_any_folder_of_the_tree(top, where):
    leave(top, "db1", 90)
    name = leave(top, "web", 30, 60).name
    answer = check(top / where.format(name))
    assert answer.figures["vms"].value == (1 if where else 2)
    assert answer.state == ("WARNING" if where == "web" else "CRITICAL")


HOSTILE = ["a|b", "it's", 'say "hi"', "`id`", "two\nlines", "back\\slash", "k\u00fcche",
           "\u202eevil", "a/b", "..", ".hidden", "100%", "%41", "x=1;2;3", "-e", "success", "json",
           "warn", " ", "METADATA_x", "long " * 50]


def test_hostile_names(top, config):
    """Each is late; nothing of them breaks the line, and each is found by its name."""
    from vmbackup import folder_name, printable

    for name in HOSTILE:
        leave(top, folder_name(name), 60, label=name)
    answer = check(top)
    assert answer.figures["vms"].value == len(HOSTILE) and len(answer.more) == len(HOSTILE)
    assert not set("|'\"`") & set("".join(answer.more))
    assert sorted(item["vm"] for item in listed(top)) == sorted(HOSTILE)
    table = call("list", top)
    assert table.status == 0
    for name in HOSTILE:
        assert printable(name) in table.out
        assert len(listed(top, name)) == 1
        if "=" not in name:
            assert check(top, name, "warn=3d", "crit=3d").state == "OK"
    answer = check(config(*["vm-export=" + name for name in ("it's", "x=1;2;3", "success")]))
    assert answer.text.startswith("3 of 3 VMs: ")
    assert set(answer.text[len("3 of 3 VMs: "):].split(", ")) == {
        "success (2 d 12 h)", "it_s (2 d 12 h)", "x=1;2;3 (2 d 12 h)"}  # as old to the second


def test_names_come_from_the_folder_where_vm_cfg_tells_none(top):
    folder = leave(top, "a%2Fb", 2)
    (folder / "vm.cfg").unlink()
    os.mkfifo(str(folder / "vm.cfg"))
    (leave(top, "100%", 2) / "vm.cfg").write_bytes(b"\xff\n")
    (leave(top, "caf\udce9", 2) / "vm.cfg").unlink()  # not UTF-8
    names = [item["vm"] for item in listed(top)]
    assert names[:2] == ["100%", "a/b"] and names[2].startswith("caf")
    assert check(top).state == "OK"


def test_a_folder_that_was_renamed_is_told_apart(top):
    leave(top, "web", 2)
    leave(top, "web-before", 9000, label="web")
    assert [item["vm"] for item in listed(top)] == ["web", "web (in web-before)"]
    assert "web (in web-before)" in check(top).text
    assert check(top, "web").state == "OK"


def test_trees_of_3_25(top, config):
    """Markers of each kind, no SHA256SUMS, dates of 2019 by the folders' names, pool dumps."""
    for number in range(100):
        for day in (1, 2, 3, 4):
            leave_backup(top, "vm %02d" % number, day, MARKERS[number % 4],
                         ("xva", "xva.gz", "raw", "vhd")[number % 4])
        leave_backup(top, "vm %02d" % number, 5, None)
    leave_pool_dump(top, "xen1", "20190805-020000")
    answer = check(top)
    assert answer.state == "CRITICAL" and answer.figures["vms"].value == 100
    assert all("gone? exclude=vm " in line for line in answer.more)
    found = listed(top)
    assert [item["vm"] for item in found] == ["vm %02d" % number for number in range(100)]
    assert {item["backups"] for item in found} == {4}
    assert {item["newest"] for item in found} == {"2019-08-04T02:00:00+00:00"}
    assert [item["kind"] for item in found[:4]] == ["vm-export"] * 2 + ["vdi-export"] * 2
    assert found[0]["file"] == "vm 00.xva" and found[0]["bytes"] == 19
    assert found[0]["total_bytes"] == 4 * 19
    assert found[0]["odd"] == ["1 foreign"]  # 3.25 left nothing that tells an unfinished one
    details = listed(config("vm-export=vm.*:2"), "vm 01")
    assert [item["kept_by"] for item in details] == [
        None, None, ["last 2"], ["last 2", "newest whole"]]
    assert [item["marker"] for item in details] == ["success_restore"] * 4


def test_pool_dumps_and_other_folders_are_no_vms(top):
    leave(top, "web", 2)
    (top / "METADATA_xen1").mkdir()
    (top / "METADATA_xen1" / "pool_db_20260101-020000.dump").write_text("")
    (top / "ISO" / "images").mkdir(parents=True)
    (top / "lost+found").mkdir()
    (top / ".web.lock").write_text("")
    (top / "#recycle" / "web").mkdir(parents=True)
    (top / "link").symlink_to(top / "web")
    assert [item["vm"] for item in listed(top)] == ["web"]
    assert check(top).figures["vms"].value == 1


def unreadable(*words):
    """A run that root's powers over permissions do not help."""
    if os.geteuid():
        return vmbackup(*words)
    if not shutil.which("setpriv"):
        pytest.skip("no setpriv")
    process = subprocess.Popen(
        ["setpriv", "--bounding-set=-dac_override,-dac_read_search", sys.executable, str(SCRIPT)]
        + [str(word) for word in words], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={"PATH": os.environ["PATH"], "TZ": "UTC"})
    out, err = process.communicate(timeout=60)
    return Result(process.returncode, out, err)


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_what_cannot_be_read(top, config, depth):
    leave(top, "db1", 2)
    inner = leave(top, "web", 2)
    path = (top, inner.parent, inner)[depth]
    where = config("vm-export=web", "vm-export=db.*")
    path.chmod(0)
    try:
        for word in (top, where):
            answer = Answer(unreadable("check", word))
            assert answer.state == "UNKNOWN" and "ermission denied" in answer.text
            if depth:
                assert answer.text.startswith("1 of 2 VMs: web (cannot be read: ")
                assert Answer(unreadable("check", word, "db1")).state == "OK"
        if depth:
            found = {item["vm"]: item for item in json.loads(unreadable("list", top, "json").out)}
            assert "unreadable" in found["web"]["odd"][0] and found["db1"]["odd"] == []
    finally:
        path.chmod(stat.S_IRWXU)


def test_a_critical_one_beside_an_unreadable_one(top):
    leave(top, "db1", 99)
    inner = leave(top, "web", 2)
    inner.chmod(0)
    try:
        answer = Answer(unreadable("check", top))
        assert answer.state == "CRITICAL" and len(answer.more) == 2
        assert answer.figures["late"].value == 1
    finally:
        inner.chmod(stat.S_IRWXU)


def test_a_stop_by_signal_ends_a_rule_without_end(top, config):
    leave(top, "a" * 60, 2)
    for word in ("check", "list"):
        words = [word, config("vm-export=(a+)+b")] + ["a" * 60] * (word == "list")
        process = start(*words)
        about = Path("/proc/%d/status" % process.pid)
        wait_until(lambda about=about: int(re.search(  # it hears SIGTERM by now
            r"SigCgt:\t(\w+)", about.read_text()).group(1), 16) >> 14 & 1)
        time.sleep(1)
        process.terminate()
        process.communicate(timeout=20)
        assert process.returncode in (3, 143)


# --- list ---

def test_the_overview(top):
    leave(top, "web", 2, 26, 50, size=3000)
    leave(top, "db1", 3, size=2000, suffix="raw")
    leave(top, "db1", 1, marked=False)
    (leave(top, "old", 9000, size=0) / "keep").write_text("")
    (top / "old" / "notes").mkdir()
    (leave(top, "old", 8000) / "extra.txt").write_text("")
    result = call("list", top)
    assert result.status == 0
    assert result.lines[0].split() == ["VM", "n", "newest", "age", "kind", "size", "all", "odd"]
    rows = {line.split()[0]: line.split() for line in result.lines[1:4]}
    assert list(rows) == ["db1", "old", "web"]
    assert rows["web"][1] == "3" and " ".join(rows["web"][3:]) == "2 h vm 2.9 KiB 8.8 KiB"
    assert " ".join(rows["db1"][3:]) == "3 h vdi 2.0 KiB 2.0 KiB 1 unfinished"
    assert rows["old"][3:8] == ["333", "d", "8", "h", "vm"] and result.lines[2].endswith(
        "2 foreign, 1 no export, 1 pinned")
    assert result.lines[4].startswith("6 backups of 3 VMs, 10.8 KiB; ")
    assert all(len(line) <= 80 for line in result.lines[:2] + result.lines[3:4])
    found = {item["vm"]: item for item in listed(top)}
    assert list(found["web"]) == ["vm", "backups", "newest", "age_seconds", "kind", "file", "bytes",
                                  "total_bytes", "odd"]
    newest = found["web"]["newest"]
    assert newest.endswith("+00:00")
    assert abs(time.time() - 2 * HOUR - datetime.datetime.strptime(
        newest[:19] + "+0000", "%Y-%m-%dT%H:%M:%S%z").timestamp()) < 60
    assert abs(found["web"]["age_seconds"] - 2 * HOUR) < 60
    assert found["web"]["bytes"] == 3000 and found["web"]["total_bytes"] == 9000
    assert found["old"]["odd"] == ["2 foreign", "1 no export", "1 pinned"]


def test_one_vm_and_the_rules_that_keep_its_backups(top, config):
    leave(top, "web", *[hours * 24 + 2 for hours in range(10)])
    pinned = leave(top, "web", 400 * 24)
    (pinned / "keep").write_text("")
    leave(top, "web", 1, marked=False)
    where = config("max_backups=2", "keep_daily=4", "vm-export=web")
    result = call("list", where, "web")
    assert result.status == 0 and len(result.lines) == 1 + 12 + 1
    assert result.lines[1].endswith("pinned") and pinned.name in result.lines[1]
    assert [line.split("bytes  ")[-1] for line in result.lines[2:12]] == (
        ["would be deleted"] * 6 + ["daily"] * 2 + ["last 2, daily"]
        + ["last 2, daily, newest whole"])
    assert result.lines[12].endswith("unfinished")
    found = listed(where, "web")
    assert list(found[0]) == ["folder", "created", "age_seconds", "kind", "file", "bytes", "marker",
                              "pinned", "kept_by", "odd"]
    assert [item["kept_by"] for item in found] == (
        [["pinned"]] + [None] * 6 + [["daily"]] * 2 + [["last 2", "daily"]]
        + [["last 2", "daily", "newest whole"]])
    assert [item["pinned"] for item in found] == [True] + [False] * 10
    assert {item["marker"] for item in found} == {"success"}
    # :N of a selector in place of max_backups; a VM that is not chosen; no config file at all.
    found = listed(config("max_backups=2", "vm-export=we.*:7"), "web")
    assert [item["kept_by"] for item in found].count(None) == 3
    assert listed(config("vm-export=db.*"), "web")[3]["kept_by"] == ["not chosen"]
    assert listed(top, "web")[3]["kept_by"] == [] == listed(top / "web")[3]["kept_by"]
    assert len(listed(top / "web")) == 11 and len(listed(top / "web" / pinned.name)) == 1


def test_list_says_what_prune_would_do(top, config):
    """The rules are those of the run: another VM's backup, a hollow one."""
    leave(top, "web", 200, uuid="old")
    leave(top, "web", 30, 54, uuid="new")
    leave(top, "web", 3, uuid="new", size=0)
    found = listed(config("max_backups=2", "vm-export=web"), "web")
    assert [item["kept_by"] for item in found] == [
        ["another VM's"], None, ["last 2", "newest whole"], ["last 2"]]
    assert found[-1]["odd"] == ["no export"]


@pytest.mark.parametrize("words, status, text", [
    ([], 2, "0 backups"), (["web"], 2, "0 backups"), (["web", "x"], 3, "invalid parameter x"),
    (["a", "b", "json"], 3, "invalid parameter b"),
])
def test_nothing_there_and_wrong_words(top, words, status, text):
    result = call("list", top, *words)
    assert result.status == status and text in result.out + result.err
    assert json.loads(call("list", top, "json").out) == []
    assert call("list", top / "nowhere").status == 3


def test_words_in_any_locale(top):
    leave(top, "k\u00fcche", 2)
    for locale in ("C", "C.UTF-8"):
        result = vmbackup("list", top, env={"LC_ALL": locale, "PYTHONUTF8": "0",
                                            "PYTHONCOERCECLOCALE": "0"})
        assert result.status == 0 and "k\u00fcche" in result.out
        assert vmbackup("check", top, "k\u00fcche", env={"LC_ALL": locale}).status == 0


def test_nothing_is_changed(top, config):
    leave(top, "web", 2, 30)
    leave(top, "web", 1, marked=False)
    before = {path: path.stat().st_mtime_ns for path in top.rglob("*")}
    for words in (["list"], ["check"]):
        call(*words + [top])
        call(*words + [config("vm-export=web", "max_backups=1")])
    assert {path: path.stat().st_mtime_ns for path in top.rglob("*")} == before


def test_a_thousand_vms(top):
    """Ten backups each; the measured figure is in the README, this only bounds it."""
    dice = random.Random(1)
    source = leave(top, "vm", 2)
    for number in range(1000):
        for day in range(10):
            created, name = night(dice.random() + 24 * day)
            folder = top / ("vm %d" % number) / name
            folder.mkdir(parents=True)
            for file in ("vm.cfg", "success"):
                os.link(str(source / file), str(folder / file))
    shutil.rmtree(str(source.parent))
    begin = time.monotonic()
    assert check(top).figures["vms"].value == 1000
    assert len(listed(top)) == 1000
    assert time.monotonic() - begin < 20

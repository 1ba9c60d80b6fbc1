# SPDX-License-Identifier: GPL-3.0-or-later
"""What somebody at a terminal sees: progress, colours; and what cron gets in its place."""
import os
import re
import signal
import subprocess
import time

import pytest
from simulator.pool import MIB, Pool, disk
from support.harness import LINE
from support.terminal import assert_log, start

LABEL = r"\[\d+/\d+\] %s  "
FAR = r"50 %% of about 4\.0 MiB  "
FIGURES = LABEL + FAR + r"\d+(\.\d)? MB/s  [\dmins ]+ left"
SHORT = r"\[\d+\] %s 50 %%"
TICKS = {"SILENCE": 0.1}  # the host is asked at each tick of the watch: so a test can count them


def two_vms():
    pool = Pool(password="open sesame")
    for name in ("web", "db"):
        pool.vm(name, disks=[disk(4 * MIB, seed=name)])
    return pool


def gate(here, vm):
    """Lets an export stand still at its third MiB; returns what lets it go on."""
    number = here.sim.fault("export_silence", vm=vm, after=2 * MIB + 4096, seconds=3600)
    return lambda: here.sim.clear_faults(number)


def ticks(here, vm):
    """How often the watch has asked for the task of a VM's export."""
    mine = {ref for ref, task in here.sim.tasks().items()
            if task["name_label"].endswith("] " + vm)}
    return sum(call["method"] == "task.get_record" and call["args"][1] in mine
               for call in here.sim.calls())


def until(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.05)


def wait_for_ticks(here, vm, count):
    more = ticks(here, vm) + count
    until(lambda: ticks(here, vm) >= more)


def set_clock(folder, seconds):
    """Puts the clock of the runs with jump=folder/jump so far ahead of the real one."""
    (folder / "new").write_text(str(seconds))
    os.rename(str(folder / "new"), str(folder / "jump"))


# --- progress -------------------------------------------------------------------------------------

def test_progress_rewrites_itself_and_leaves_log_lines_whole(turn, terminal):
    here = turn(two_vms())
    here.configure("vm-export=web", "vm-export=db", "parallel=2")
    let_web, let_db = gate(here, "web"), gate(here, "db")
    term = terminal(here.sim.password, here.config)
    both = "|".join(["%s  \\|  %s" % (SHORT, SHORT)] * 2) % ("web", "db", "db", "web")
    term.until(lambda: re.match("(%s)\\Z" % both, term.row))
    shown, rows = len(term.erased), len(term.rows)
    term.until(lambda: len(term.erased) >= shown + 2)
    assert len(term.rows) == rows, "a line of its own for each"
    let_db()
    term.until(lambda: any("db: *** success: db.xva" in row for row in term.rows))
    term.until(lambda: re.match((FIGURES + r"\Z") % "web", term.row))
    let_web()
    assert term.end() == 0
    assert_log(term.rows)
    assert term.rows[-1].endswith("VmBackup ended - Success - S:2 W:0 E:0")
    assert term.row == "", "the last progress line was not erased"
    assert max(map(len, term.erased)) < 100
    assert b"\x1b[3" not in term.raw, "colour without an error or warning"


def test_progress_at_the_terminal_and_the_log_in_a_file(turn, terminal, tmp_path):
    here = turn(two_vms())
    here.configure("vm-export=web", "vm-export=gone")
    let_on = gate(here, "web")
    with (tmp_path / "log").open("wb") as log:
        term = terminal(here.sim.password, here.config, stdout=log)
        term.until(lambda: " web  50 % of about 4.0 MiB" in term.row)
        let_on()
        assert term.end() == 2
    assert (term.rows, term.row) == ([], "")
    log = (tmp_path / "log").read_text()
    assert "\x1b" not in log and "\r" not in log
    assert_log(log.splitlines())
    assert "vm-export gone - ***ERROR***" in log


@pytest.mark.parametrize("columns, in_a_file, shown", [
    (120, False, FIGURES + r"  \|  " + FIGURES), (40, True, SHORT + r"  \|  " + SHORT),
    (24, False, SHORT + r"  \|  \+1")])
def test_progress_is_not_longer_than_the_terminal_is_wide(turn, terminal, tmp_path, columns,
                                                          in_a_file, shown):
    """Whether standard output, of which Python would tell the width, is that terminal or not."""
    here = turn(two_vms())
    here.configure("vm-export=web", "vm-export=db", "parallel=2")
    lets = gate(here, "web"), gate(here, "db")
    either = [shown % pair[:shown.count("%s")] for pair in (("web", "db"), ("db", "web"))]
    with (tmp_path / "log").open("wb") as log:
        term = terminal(here.sim.password, here.config, columns=columns,
                        stdout=log if in_a_file else None)
        term.until(lambda: any(re.match(one + r"\Z", term.row) for one in either))
        term.until(lambda: len(term.erased) >= 2)
        assert max(map(len, term.erased)) < columns
        for let in lets:
            let()
        assert term.end() == 0


def test_many_exports_share_one_line_of_80_columns(turn, terminal):
    """Each is told as far as there is room, and how many more there are."""
    pool = Pool()
    names = ["application-server-number-%d" % number for number in range(8)]
    for name in names:
        pool.vm(name, disks=[disk(4 * MIB, seed=name)])
    here = turn(pool)
    here.configure("vm-export=.*", "parallel=8")
    lets = [gate(here, name) for name in names]
    term = terminal(here.sim.password, here.config, columns=80)
    shown = r"(\[\d\] \S+\u2026\S+ 50 %  \|  ){2,}\+\d\Z"
    term.until(lambda: re.match(shown, term.row))
    assert len(term.row) < 80
    for let in lets:
        let()
    assert term.end() == 0


def test_a_silent_host_and_a_snapshot_under_way_are_shown_as_such(turn, terminal, tmp_path):
    here = turn(two_vms())
    here.configure("vm-export=web")
    set_clock(tmp_path, 0)
    here.sim.fault("snapshot_slow", seconds=4)
    let_on = gate(here, "web")
    term = terminal(here.sim.password, here.config, jump=tmp_path / "jump")
    term.until(lambda: re.match(LABEL % "web" + r"snapshot  \d s\Z", term.row))
    term.until(lambda: re.match(FIGURES % "web" + r"\Z", term.row))
    set_clock(tmp_path, 400)
    silent = (LABEL + FAR + r"host silent for 6 min \d+ s\Z") % "web"
    term.until(lambda: re.match(silent, term.row))
    let_on()
    assert term.end() == 0


def test_what_is_to_expect_follows_the_tasks_progress(turn, terminal):
    here = turn(two_vms())
    here.configure("vm-export=web")
    let_on = gate(here, "web")
    term = terminal(here.sim.password, here.config, constants=TICKS)
    term.until(lambda: " web  50 % of about 4.0 MiB" in term.row)
    (task,) = [ref for ref, record in here.sim.tasks().items()
               if record["name_label"] == "vmbackup: [1/1] web"]
    here.sim.set("task", task, "progress", 0.25)
    term.until(lambda: " web  25 % of about 8.0 MiB" in term.row)
    let_on()
    assert term.end() == 0


def test_ctrl_c_in_an_export(turn, terminal):
    here = turn(two_vms())
    here.configure("vm-export=web", "compress=zstd")
    here.sim.setting(progress_interval=0.05)
    here.sim.fault("export_silence", vm="web", after=MIB, seconds=3600)
    term = terminal(here.sim.password, here.config)
    term.until(lambda: " web  25 % of about 4.0 MiB" in term.row)
    term.type("\x03")
    here.sim.clear_faults()
    assert term.end() == 130
    assert_log([row.replace("^C", "") for row in term.rows])
    assert term.row == ""
    assert not here.folders("web", marked=False)
    here.assert_pool_is_clean()


def test_the_terminal_is_closed_in_an_export(turn, terminal):
    here = turn(two_vms())
    here.configure("vm-export=web")
    here.sim.setting(progress_interval=0.05)
    here.sim.fault("export_silence", vm="web", after=MIB, seconds=3600)
    term = terminal(here.sim.password, here.config)
    term.until(lambda: " web  25 % of about 4.0 MiB" in term.row)
    term.hang_up()
    here.sim.clear_faults()
    assert term.process.wait(60) == 128 + signal.SIGHUP
    assert not here.folders("web", marked=False)
    here.assert_pool_is_clean()


QUIET = {  # what is no terminal, or one that wants to be left in peace
    "NO_COLOR": {"env": {"NO_COLOR": "1"}},
    "TERM=dumb": {"env": {"TERM": "dumb"}},
    "no TERM": {"env": {"TERM": None}},
    "stderr in a file": {"stderr": True},
    "all in files": {"stdout": True, "stderr": True},
}


def test_neither_progress_nor_colour_where_none_is_wanted(turn, terminal, tmp_path):
    """All at once, each with a VM of its own, for as long as would have shown it three times, and
    for some minutes more."""
    pool = Pool()
    for name in QUIET:
        pool.vm(name, disks=[disk(4 * MIB, seed=name)])
    here = turn(pool)
    here.configure("exclude=nobody", "exclude=no.?body")
    config = here.config.read_text()
    lets = [gate(here, vm) for vm in QUIET]
    set_clock(tmp_path, 0)
    terms = {}
    for number, (vm, options) in enumerate(QUIET.items()):
        path = tmp_path / ("%d.cfg" % number)
        path.write_text(config + "vm-export=^%s$\n" % re.escape(vm))
        given = {name: (tmp_path / ("%d.%s" % (number, name))).open("wb")
                 for name in ("stdout", "stderr") if options.get(name)}
        terms[vm] = terminal(here.sim.password, path, env=options.get("env"), constants=TICKS,
                             jump=tmp_path / "jump", **given)
        for file in given.values():
            file.close()
    for vm in QUIET:
        until(lambda vm=vm: ticks(here, vm) >= 3)
    set_clock(tmp_path, 600)
    there = {vm: ticks(here, vm) for vm in QUIET}
    for vm in QUIET:
        until(lambda vm=vm: ticks(here, vm) >= there[vm] + 2)
    for let in lets:
        let()
    for number, (vm, term) in enumerate(terms.items()):
        assert term.end() == 1, (vm, term.rows)
        written = {name: (tmp_path / ("%d.%s" % (number, name))).read_bytes()
                   for name in ("stdout", "stderr") if QUIET[vm].get(name)}
        assert not written.get("stderr"), vm
        if "stdout" in written:
            assert term.raw == b""
        text = written.get("stdout", term.raw)
        assert b"WARNING - vm(s) Exclude does not exist" in text, vm
        if vm != "stderr in a file":  # there standard output is a terminal, and may be coloured
            assert b"\x1b" not in text, vm
        assert b"\r" not in text.replace(b"\r\n", b""), vm
        # What is no terminal gets a plain line after some minutes, and a terminal never.
        assert text.count(b" of about ") == ("stderr" in written), vm


def test_plain_progress_lines_in_a_log_every_few_minutes(turn, tmp_path):
    here = turn(two_vms())
    here.configure("vm-export=web")
    let_on = gate(here, "web")

    def told():
        lines = (tmp_path / "log").read_text().splitlines()
        return [line for line in lines if " of about " in line]

    set_clock(tmp_path, 0)
    log, err = (tmp_path / "log").open("wb"), (tmp_path / "err").open("wb")
    with log, err:
        process = start([here.sim.password, here.config], subprocess.DEVNULL, log, err,
                        jump=tmp_path / "jump", constants=TICKS)
    try:
        wait_for_ticks(here, "web", 2)
        set_clock(tmp_path, 55)
        wait_for_ticks(here, "web", 2)
        assert told() == []
        set_clock(tmp_path, 600)
        until(lambda: len(told()) == 1)
        wait_for_ticks(here, "web", 2)
        assert len(told()) == 1
        set_clock(tmp_path, 1200)
        until(lambda: len(told()) == 2)
        let_on()
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
    assert (tmp_path / "err").read_bytes() == b""
    assert len(told()) == 2
    for line in told():
        told_of = LINE.match(line).group(1)
        assert re.match("progress " + (LABEL + FAR) % "web" + "host silent for ", told_of), line
    assert b"\r" not in (tmp_path / "log").read_bytes()
    assert b"\x1b" not in (tmp_path / "log").read_bytes()


# --- colour ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("env", [{}, {"NO_COLOR": ""}])  # an empty one does not count
def test_errors_and_warnings_alone_are_coloured(turn, terminal, env):
    here = turn(two_vms())
    here.configure("vm-export=web", "vm-export=gone", "exclude=nobody")
    here.sim.fault("vm_destroy_error", vm="web")
    term = terminal(here.sim.password, here.config, columns=200, env=env)
    assert term.end() == 2
    assert_log(term.rows)
    seen = set()
    for row, runs in zip(term.rows, term.colours):
        assert len(runs) == 1, "a line of two colours: %s" % row
        colour = {"31": "ERROR", "33": "WARNING"}.get(runs[0][0], runs[0][0])
        bad, odd = re.search("ERROR|  FAILED ", row), re.search("WARNING|  warning ", row)
        assert colour == ("ERROR" if bad else "WARNING" if odd else ""), row
        seen.add(colour)
    assert seen == {"ERROR", "WARNING", ""}
    assert not term._colour, "the terminal stays coloured"


@pytest.mark.parametrize("env", [{"NO_COLOR": "1"}, {"TERM": "dumb"}, {"TERM": None}])
def test_no_colour_where_none_is_wanted(turn, terminal, env):
    here = turn(two_vms())
    here.configure("vm-export=web", "vm-export=gone", "exclude=nobody")
    term = terminal(here.sim.password, here.config, "preview", env=env)
    assert term.end() == 2
    assert any("ERROR" in row for row in term.rows)
    assert b"\x1b" not in term.raw

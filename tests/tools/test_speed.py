# SPDX-License-Identifier: GPL-3.0-or-later
"""What keeps the program fast, as far as it shows without a clock; the clock is benchmark.py's."""
import collections
import re
import signal
import sys
import time

import pytest
from simulator.pool import MIB, Pool, disk, snapshot, vif
from support.harness import LINE, SCRIPT, finish

from tools.benchmark import measure


def pool_of(vms, disks=1, nics=1):
    pool = Pool()
    for number in range(vms):
        pool.vm("vm%d" % number, vifs=[vif() for _ in range(nics)],
                disks=[disk(MIB, seed=1) for _ in range(disks)])
    return pool


def calls_of(site, *words):
    """{method: how often} of a run; polling counts once, for it depends on the clock."""
    site.sim.reset_calls()
    result = site.run(*words)
    assert result.status == 0, result
    calls = collections.Counter(site.sim.methods())
    calls["task.get_record"] = 1
    return calls


@pytest.mark.parametrize("vms, disks", [(1, 1), (5, 9), (49, 2), (51, 1), (120, 1)])
def test_a_preview_makes_seven_calls_however_large_the_pool(turn, vms, disks):
    site = turn(pool_of(vms, disks))
    site.configure("vm-export=")
    site.sim.reset_calls()
    assert site.run("preview").status == 0
    assert len(site.sim.methods()) <= 7, site.sim.methods()


def test_candidates_are_filtered_on_the_host(turn):
    pool = pool_of(2)
    pool.template("golden", disks=[disk(MIB)])
    site = turn(pool)
    site.configure("vm-export=")
    assert "VM.get_all_records" not in calls_of(site)


def test_a_backup_makes_no_call_per_disk_but_the_one_that_destroys_it(turn):
    made = []
    for disks in (2, 9):
        site = turn(pool_of(1, disks, nics=disks))
        site.configure("vm-export=vm0")
        calls = calls_of(site)
        assert calls.pop("VDI.destroy") == disks
        made.append(calls)
    assert made[0] == made[1]
    assert sum(made[0].values()) <= 35, made[0]


def test_snapshots_of_the_users_cost_no_call_for_each_disk(turn):
    made = []
    for disks in (2, 9):
        pool = Pool()
        pool.vm("vm0", disks=[disk(MIB, seed=1) for _ in range(disks)],
                snapshots=[snapshot("monday"), snapshot("tuesday")])
        site = turn(pool)
        site.configure("vm-export=vm0")
        calls = calls_of(site)
        assert calls.pop("VDI.destroy") == disks
        made.append(calls)
    assert made[0] == made[1]


def test_a_backup_does_not_call_more_in_a_larger_pool(turn):
    made = []
    for vms in (1, 60):
        site = turn(pool_of(vms))
        site.configure("vm-export=vm0")
        made.append(calls_of(site))
    assert made[0] == made[1]


def test_memory_does_not_grow_with_the_disk(site):
    peaks = []
    for size in (4, 256):
        pool = Pool()
        pool.vm("vm", disks=[disk(size * MIB, seed=1)])
        here = site(pool)
        here.configure("vm-export=vm")
        peaks.append(measure([sys.executable, SCRIPT, here.sim.password, here.config]).rss)
        assert here.file("vm").stat().st_size > size * MIB
    assert peaks[1] < peaks[0] + 16, "MB: %s" % peaks


def test_parallel_reports_as_a_serial_run_does(turn):
    reports = []
    for parallel in (1, 4):
        site = turn(pool_of(7))
        site.configure("vm-export=", "parallel=%d" % parallel)
        site.sim.fault("export_rate", vm="vm0", bytes=2 * MIB)  # the first is not done first
        site.sim.fault("export_cut", vm="vm3", after=MIB // 2, task="failure")
        result = site.run()
        assert result.status == 2, result
        assert all(LINE.match(line) for line in result.out.splitlines()), result.out
        ends = [re.sub("Ref:[0-9]+", "Ref", line) for line in result.lines
                if re.match("VmBackup( vm-export .* -| ended)", line)]
        status = [line.split(",")[1:5] for line in site.status_log.read_text().splitlines()]
        reports.append((ends, status))
        site.assert_pool_is_clean()
        site.status_log.unlink()
    (serial, serial_status), (parallel, status) = reports
    assert serial == parallel
    assert [line.split()[2] for line in serial[:-1]] == ["vm%d" % n for n in range(7)]
    # The status log tells at once: one VM after the other, or the slow first one behind others.
    assert sorted(status) == sorted(serial_status)
    assert [words[2] for words in serial_status] == ["begin"] + ["begin", "end"] * 7 + ["end"]
    assert [words[3] for words in status if words[2] == "end"][0] != "SUCCESS vm0"


def test_parallel_streams_are_open_at_the_same_time(turn):
    site = turn(pool_of(5))
    site.configure("vm-export=", "parallel=4")
    site.sim.fault("export_rate", bytes=20000)  # no stream ends while this test looks
    process = site.start()
    deadline = time.monotonic() + 60
    while site.sim.methods().count("GET /export") < 4 and time.monotonic() < deadline:
        time.sleep(0.05)
    methods = site.sim.methods()
    process.send_signal(signal.SIGTERM)
    result = finish(process)
    assert methods.count("GET /export") == 4 and "VM.destroy" not in methods, methods
    assert result.status == 128 + signal.SIGTERM
    assert "vm4" not in "".join(line for line in result.lines if "begins" in line)
    site.assert_pool_is_clean()

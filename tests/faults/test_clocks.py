# SPDX-License-Identifier: GPL-3.0-or-later
"""Clocks that jump and time zones that change: whatever the folders are called, the backup that is
really the oldest is the one to go. The clock is that of shim.py."""
import calendar
import time

import pytest
from simulator.pool import Pool, disk
from support.tally import Ledger, is_good

BERLIN = "CET-1CEST,M3.5.0/2,M10.5.0/3"


def at(moment, zone="UTC", **more):
    """The environment of a run at that moment (UTC), in that time zone."""
    seconds = calendar.timegm(time.strptime(moment, "%Y-%m-%d %H:%M"))
    return dict(more, TZ=zone, SHIM_TIME=str(seconds))


RUNS = {  # the runs, and what the first two folders are called, to the minute
    "time zones": (
        [at("2026-10-25 02:00", "FAR-14"), at("2026-10-25 02:01", "WEST12"),
         at("2026-10-25 02:02")],
        ["2026-10-25-(16:00", "2026-10-24-(14:01"]),
    "end of daylight saving, an hour that comes twice": (
        [at("2026-10-25 00:40", BERLIN), at("2026-10-25 01:10", BERLIN),
         at("2026-10-25 01:50", BERLIN)],
        ["2026-10-25-(02:40", "2026-10-25-(02:10"]),
    "clock set back a year": (
        [at("2026-10-25 02:00"), at("2025-10-25 02:00"), at("2025-10-26 02:00")],
        ["2026-10-25-(02:00", "2025-10-25-(02:00"]),
    "clock once far ahead": (
        [at("2036-01-01 02:00"), at("2026-10-25 02:00"), at("2026-10-26 02:00")],
        ["2036-01-01-(02:00", "2026-10-25-(02:00"]),
    "clock once at the beginning": (
        [at("2026-10-25 02:00"), at("1970-01-01 00:01", "WEST12"), at("2026-10-26 02:00")],
        ["2026-10-25-(02:00", "1969-12-31-(12:01"]),
    "runs in one second": (
        [at("2026-10-25 02:00", SHIM_STANDS="1")] * 3,
        ["2026-10-25-(02:00", "2026-10-25-(02:00"]),
}


@pytest.mark.parametrize("runs, names", list(RUNS.values()), ids=list(RUNS))
def test_the_oldest_goes_whatever_the_clock_says(turn, tally, shim, runs, names):
    pool = Pool()
    pool.vm("web", disks=[disk(8192, seed=1)])
    site = turn(pool)
    site.configure("vm-export=web", "max_backups=2")
    made, ledger = [], None
    for env in runs:
        result = site.run("host=" + site.sim.http, env=dict(env, LD_PRELOAD=str(shim)))
        assert result.status == 0, result
        ledger = ledger or Ledger(site)
        (new,) = [folder.name for folder in site.folders("web") if folder.name not in made]
        made.append(new)
        assert sorted(made[-2:]) == [folder.name for folder in site.folders("web", marked=False)]
        assert all(map(is_good, site.folders("web")))
    assert [name[:24] for name in made[:2]] == ["backup-" + name for name in names]
    tally("a clock or time zone that changes", len(runs) - 1, ledger)

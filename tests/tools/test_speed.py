# SPDX-License-Identifier: GPL-3.0-or-later
"""What keeps the program fast, as far as it shows without a clock; the clock is benchmark.py's."""
import collections
import sys

from simulator.pool import MIB, Pool, disk, snapshot, vif
from support.harness import SCRIPT
from support.world import pool_of

from tools.benchmark import measure


def a_vm_of(disks, snapshots=1):
    """A VM with so many disks and networks, and snapshots of it that are somebody else's."""
    pool = Pool()
    pool.vm("vm0", disks=[disk(MIB, seed=1) for _ in range(disks)],
            vifs=[vif() for _ in range(disks)],
            snapshots=[snapshot("mine %d" % number) for number in range(snapshots)])
    return pool


def calls_of(site, *words):
    """{method: how often} of a run; polling counts once, for it depends on the clock."""
    site.sim.reset_calls()
    result = site.run(*words)
    assert result.status == 0, result
    calls = collections.Counter(site.sim.methods())
    calls["task.get_record"] = 1
    return calls


def test_a_backup_makes_a_few_calls_and_a_few_more_for_each_disk(turn):
    made = []
    for disks, snapshots in ((2, 1), (9, 1), (2, 8)):
        site = turn(a_vm_of(disks, snapshots))
        site.configure("vm-export=vm0")
        made.append(sum(calls_of(site).values()))
    assert made[0] <= 50, made
    assert made[1] - made[0] <= 7 * 11, made  # a disk and a network
    assert made[2] - made[0] <= 7 * (1 + 2), made  # a snapshot of two disks


def test_a_backup_does_not_call_more_in_a_larger_pool(turn):
    made = []
    for vms in (1, 60):
        site = turn(pool_of(*["vm%d" % number for number in range(vms)]))
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

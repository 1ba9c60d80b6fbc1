# SPDX-License-Identifier: GPL-3.0-or-later
"""What all tests share. vmbackup.py and the modules of tests/ can be imported by name."""
import collections
import itertools
import signal
import socket
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

import pytest  # noqa: E402
from simulator.client import Simulator  # noqa: E402
from support.harness import Site  # noqa: E402
from support.shim import shim  # noqa: E402, F401
from support.tally import pytest_terminal_summary, tally  # noqa: E402, F401
from support.terminal import terminal  # noqa: E402, F401
from support.world import clock, refused, small_disk  # noqa: E402, F401
from tools import counter  # noqa: E402

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # for all children, even if these tests run by nohup

LONG = ("test_death_and_signals.py", "test_of_the_host.py", "test_preview.py", "test_mail.py",
        "test_benchmark.py")


def pytest_configure(config):
    counter.register(config)
    config.addinivalue_line(
        "markers", "newest: does not depend on the Python; run.py runs it on the newest one only")


def pytest_collection_modifyitems(items):
    """The longest tests first, so that no worker begins one when the others are done."""
    items.sort(key=lambda item: item.fspath.basename not in LONG)


@pytest.fixture(scope="session")
def idle():
    """{number of hosts: simulators that run and wait for a pool}"""
    simulators = collections.defaultdict(list)
    yield simulators
    for sim in itertools.chain(*simulators.values()):
        sim.stop()


@pytest.fixture
def site(idle, tmp_path):
    """site(pool) gives the user's Site at a simulator of its own: an idle one or a new one."""
    lent = []

    def make(pool=None, **options):
        hosts = len(pool.description["hosts"]) if pool and not options else None
        if idle[hosts]:
            sim = idle[hosts].pop()
            sim.load(pool)
        else:
            sim = Simulator.start(pool, **options)
        lent.append((hosts, sim))
        path = tmp_path / ("site%d" % len(lent))
        path.mkdir()
        return Site(sim, path)

    yield make
    for hosts, sim in lent:
        if hosts and serves(sim):
            idle[hosts].append(sim)
        else:
            sim.stop()


def serves(sim):
    """Whether all members still take connections: a test may have let a host go down."""
    try:
        for host in sim.hosts:
            socket.create_connection((host["address"], host["port"]), 10).close()
    except OSError:
        return False
    return True


@pytest.fixture(scope="session")
def simulator():
    """One simulator for all tests that take turns; see `turn`."""
    with Simulator.start() as sim:
        yield sim


@pytest.fixture
def turn(simulator, tmp_path):
    """turn(pool) gives a Site as well, sooner than site(): at a simulator that runs already."""
    def make(pool):
        simulator.load(pool)
        return Site(simulator, tmp_path)

    return make

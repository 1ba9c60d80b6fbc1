# SPDX-License-Identifier: GPL-3.0-or-later
"""What all tests share. vmbackup.py and the modules of tests/ can be imported by name."""
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

import pytest  # noqa: E402
from harness import Site  # noqa: E402
from shim import shim  # noqa: E402, F401
from simulator.client import Simulator  # noqa: E402
from tally import pytest_terminal_summary, tally  # noqa: E402, F401


@pytest.fixture
def site(tmp_path):
    """site(pool) starts a simulator with that pool and gives the user's Site; it ends by itself."""
    started = []

    def make(pool=None, **options):
        sim = Simulator.start(pool, **options)
        started.append(sim)
        path = tmp_path / ("site%d" % len(started))
        path.mkdir()
        return Site(sim, path)

    yield make
    for sim in started:
        sim.stop()


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

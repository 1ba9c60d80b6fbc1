# SPDX-License-Identifier: GPL-3.0-or-later
"""How far pytest is: conftest.py registers the counter, run.py reads what it writes meanwhile.

It writes to the file that the environment variable TESTS_COUNTER names: the numbers of tests done,
of all tests, and of those that failed.
"""
import os

VARIABLE = "TESTS_COUNTER"


class Counter:
    """A plugin of the one process that hears of all tests."""

    def __init__(self, path):
        self._path, self._done, self._total, self._failed = path, 0, 0, set()

    def _write(self):
        new = self._path + ".new"
        with open(new, "w") as file:
            file.write("%d %d %d\n" % (self._done, self._total, len(self._failed)))
        os.replace(new, self._path)

    def pytest_collection_finish(self, session):
        self._total = len(session.items)
        self._write()

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self._failed.add(report.nodeid)
        self._done += report.when == "teardown"
        self._write()


class CounterOfWorkers(Counter):
    """The same where pytest-xdist collects and runs the tests in other processes."""

    def pytest_collection_finish(self, session):
        """Nothing is collected here."""

    def pytest_xdist_node_collection_finished(self, ids):
        self._total = len(ids)
        self._write()


def register(config):
    """Called by pytest_configure of conftest.py, in each process."""
    path = os.environ.get(VARIABLE)
    if path and not hasattr(config, "workerinput"):
        parallel = config.pluginmanager.hasplugin("xdist") and config.getoption("numprocesses")
        config.pluginmanager.register((CounterOfWorkers if parallel else Counter)(path))


def progress(path):
    """What to say of the pytest that writes there: "420 of 1034 tests, 0 failed"."""
    try:
        with open(path) as file:
            return "{} of {} tests, {} failed".format(*file.read().split())
    except FileNotFoundError:
        return "no test has begun"

# SPDX-License-Identifier: GPL-3.0-or-later
"""What faults did to backups and pool: inspected after each test, told in a table at the end.

    ledger = Ledger(site)           # what exists now: good backups, and everything on the pool
    ... faults, runs, a last run without faults ...
    tally("export cut off", injected, ledger)

A test that has the fixture `tally` adds rows so; rows of the same fault are added up. The figures
come from the ledger's own look at disk and pool, and the test fails if one of them is not 0.
conftest.py imports the fixture and the hook; reports carry the rows, from pytest-xdist's too.
"""
import hashlib
import subprocess
from collections import OrderedDict

import pytest

COLUMNS = ("times injected", "backups lost", "foreign objects destroyed",
           "leftovers after the next run")


def tree(folder):
    """{file below a folder: SHA-256}, and None for folders."""
    return {str(path.relative_to(folder)):
            None if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest()
            for path in folder.rglob("*")} if folder.exists() else {}


def is_good(backup):
    """Whether a backup bears the marker and sha256sum finds every file as it was written."""
    return (backup / "success").exists() and subprocess.run(
        ["sha256sum", "--strict", "--quiet", "-c", "SHA256SUMS"], cwd=str(backup),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0


class Ledger:
    """What a site has that must not be lost, and what is there later on."""

    def __init__(self, site, foreign_tasks=()):
        self._site, self._foreign_tasks = site, set(foreign_tasks)
        tops = [top for top in site.backups.iterdir() if top.is_dir()]
        self.trees = {top.name: tree(top) for top in tops if any(map(is_good, top.iterdir()))}
        self._there = {ref for cls in ("VM", "VDI") for ref in site.sim.records(cls)}

    def untouched(self, vm):
        """Whether the VM's folder is byte for byte what it was: nothing gone, nothing added."""
        return tree(self._site.backups / vm) == self.trees[vm]

    def lost(self, vms=None):
        """VMs that had a good backup and have none now, neither the old one nor a newer."""
        return sorted(vm for vm in self.trees if vms is None or vm in vms
                      if not any(map(is_good, self._site.folders(vm, marked=False))))

    def destroyed(self, by_others=()):
        """Names of VMs and disks that are gone and were there before, or were no snapshots."""
        return sorted(
            item["record"]["name_label"] for item in self._site.sim.destroyed()
            if item["class"] in ("VM", "VDI") and item["record"]["name_label"] not in by_others
            and (item["ref"] in self._there or not item["record"]["is_a_snapshot"]))

    def leftovers(self, vms=None):
        """Snapshots, tasks and sessions on the pool, and unfinished files and folders on disk.

        The host's to collect are a finished Async task whose reference never reached the client,
        and a task that was destroyed while it was pending (taskHelper.ml).
        """
        sim = self._site.sim
        found = [record["name_label"] for cls in ("VM", "VDI")
                 for ref, record in sim.records(cls).items()
                 if record["is_a_snapshot"] and ref not in self._there]
        given_up = {call["args"][1] for call in sim.calls() if call["method"] == "task.destroy"}
        found += [record["name_label"] for ref, record in sim.tasks().items()
                  if ref not in self._foreign_tasks | given_up
                  and not (record["name_label"].startswith("Async.")
                           and record["status"] != "pending")]
        found += ["session of " + record["originator"] for record in sim.sessions().values()]
        tops = [self._site.backups / vm for vm in vms] if vms else [self._site.backups]
        for path in (path for top in tops for path in top.rglob("*")):
            of_a_vm = path.is_dir() and path.parent.parent == self._site.backups
            unmarked = of_a_vm and not is_good(path)
            if unmarked or path.is_file() and path.name.endswith((".partial", ".lock")):
                found.append(str(path.relative_to(self._site.backups)))
        return sorted(found)


@pytest.fixture
def tally(record_property):
    """tally(fault, injected, ledger) adds a row to the table and asserts that its figures are 0.

    by_others: what somebody else destroyed; vms: those that the fault concerned, if not all.
    """
    def add(fault, injected, ledger, by_others=(), vms=None):
        assert injected, "%s never happened" % fault
        found = ledger.lost(vms), ledger.destroyed(by_others), ledger.leftovers(vms)
        record_property("tally", [fault, injected] + [len(names) for names in found])
        assert found == ([], [], []), (fault, found)

    return add


def pytest_terminal_summary(terminalreporter):
    """Prints the table of all rows."""
    rows = OrderedDict()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if getattr(report, "when", None) == "call":
                for name, value in report.user_properties:
                    if name == "tally":
                        sums = rows.get(value[0], [0] * len(COLUMNS))
                        rows[value[0]] = [old + new for old, new in zip(sums, value[1:])]
    if not rows:
        return
    rows["all"] = [sum(column) for column in zip(*rows.values())]
    terminalreporter.section("faults")
    width = max(map(len, rows))
    terminalreporter.write_line("%-*s  %s" % (width, "fault", "  ".join(COLUMNS)))
    for name, figures in sorted(rows.items(), key=lambda row: (row[0] == "all", row[0])):
        cells = ["%*d" % (len(title), figure) for title, figure in zip(COLUMNS, figures)]
        terminalreporter.write_line("%-*s  %s" % (width, name, "  ".join(cells)))

# SPDX-License-Identifier: GPL-3.0-or-later
"""Drives vmbackup.py as a user does: as a process, through its command line."""
import os
import re
import subprocess
import sys

from tools.environment import ROOT

from support import forks

SCRIPT = ROOT / "vmbackup.py"
LINE = re.compile(r"\d{4}-\d\d-\d\d-\(\d\d:\d\d:\d\d\) - (.*)")


class Result:
    """What a finished run gave: status, out and err as text, lines without their time."""

    def __init__(self, status, out, err):
        self.status, self.raw = status, out
        self.out, self.err = out.decode("utf-8"), err.decode("utf-8", "replace")
        self.lines = [LINE.match(line).group(1) if LINE.match(line) else line
                      for line in self.out.splitlines()]
        assert "Traceback" not in self.out + self.err, self.out + self.err

    def has(self, text):
        return any(text in line for line in self.lines)

    def __repr__(self):
        return "exit status %s\n%s%s" % (self.status, self.out, self.err)


def start(*words, env=None, cwd=None, stdin=subprocess.DEVNULL):
    """The process of `vmbackup.py words...`, in an environment without a user's settings."""
    clean = {"PATH": os.environ["PATH"], "HOME": str(cwd or "/nonexistent"), "TZ": "UTC"}
    clean.update(env or {})
    return subprocess.Popen([sys.executable, str(SCRIPT)] + [str(word) for word in words],
                            env=clean, cwd=str(cwd) if cwd else None, stdin=stdin,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(process, input=None, timeout=100):
    try:
        out, err = process.communicate(input, timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        raise AssertionError("still running after %d s:\n%s%s" % (
            timeout, out.decode("utf-8", "replace"), err.decode("utf-8", "replace"))) from None
    return Result(process.returncode, out, err)


def vmbackup(*words, env=None, cwd=None, input=None, timeout=100):
    """Runs `vmbackup.py words...` to its end and returns the Result."""
    stdin = subprocess.DEVNULL if input is None else subprocess.PIPE
    return finish(start(*words, env=env, cwd=cwd, stdin=stdin), input, timeout)


def hasty(site, *words, **constants):
    """Starts a run with the site's config file whose constants are these, to make it wait less."""
    code = ["import sys, vmbackup"]
    code += ["vmbackup.%s  # it must exist\nvmbackup.%s = %r" % (name, name, value)
             for name, value in constants.items()]
    code.append("sys.exit(vmbackup.main())")
    env = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "TZ": "UTC", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", "\n".join(code), site.sim.password, str(site.config)]
    return subprocess.Popen(command + list(words), env=env, stdin=subprocess.DEVNULL,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


class Site:
    """One user's place: a simulator, a backup_dir, a config file, a status log."""

    def __init__(self, sim, path):
        self.sim, self.path = sim, path
        self.backups, self.config = path / "backups", path / "weekend.cfg"
        self.status_log = path / "status.log"
        self.backups.mkdir(exist_ok=True)

    def configure(self, *lines):
        """Writes the config file: where to, which host, and these lines."""
        head = ["backup_dir=%s" % self.backups, "status_log=%s" % self.status_log,
                "host=%s" % self.sim.url]
        self.config.write_text("\n".join(head + list(lines)) + "\n", encoding="utf-8")
        return self.config

    def run(self, *words, constants=None, **options):
        """A run with the config file. It is a fork of a process that has loaded vmbackup.py, unless
        options (env, cwd, input) ask for a new one; constants: see forks.run."""
        words = (self.sim.password, self.config) + words
        if options:
            return vmbackup(*words, **options)
        return Result(*forks.run(words, constants))

    def start(self, *words, **options):
        return start(self.sim.password, self.config, *words, **options)

    def folders(self, vm, marked=True):
        """The backups of a VM, oldest name first: those with a marker, or all folders."""
        top = self.backups / vm
        found = sorted(item for item in top.iterdir() if item.is_dir()) if top.exists() else []
        return [item for item in found if (item / "success").exists()] if marked else found

    def file(self, vm, suffix="xva"):
        """The export in the newest backup of a VM."""
        return self.folders(vm)[-1] / ("%s.%s" % (vm, suffix))

    def snapshots(self):
        """Names of all snapshots on the pool."""
        return sorted(vm["name_label"] for vm in self.sim.records("VM").values()
                      if vm["is_a_snapshot"])

    def assert_pool_is_clean(self, snapshots=()):
        """No snapshot but these, no session, no task of ours is left."""
        assert self.snapshots() == sorted(snapshots)
        assert not self.sim.sessions()
        # A task that was destroyed while pending is the host's to collect (taskHelper.ml).
        given_up = {call["args"][1] for call in self.sim.calls()
                    if call.get("method") == "task.destroy"}
        assert not [task for ref, task in self.sim.tasks().items()
                    if ref not in given_up and not task["name_label"].startswith("Async.")]
        lone = {vbd["VDI"] for vbd in self.sim.records("VBD").values()}
        assert not [vdi["name_label"] for ref, vdi in self.sim.records("VDI").items()
                    if vdi["is_a_snapshot"] and ref not in lone]

# SPDX-License-Identifier: GPL-3.0-or-later
"""Hundreds of runs of vmbackup.py in little time.

A process of its own loads the modules once; each run is a fork of it, so a real process with real
signals and an end of its own, that only saves the time which Python needs to start and to import.

    result = run(words)             # from its start to its end: status, out, err

    with Forks(folder, preload=shim) as forks:  # for tests that walk through all steps of a run
        started = forks.start(site, "vm-export=web", env={"KILL_AT": "7"})
        site.sim.fault("kill_client_at", pid=started.pid, method="*", skip=3)
        started.go()                # it waited until the test had set its faults
        started.status, started.out # the status is negative where a signal ended it, as Popen's
"""
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from tools.environment import ROOT

_FORKER = """
import json, os, signal, sys, time
sys.path.insert(0, sys.argv[1])
import _strptime, importlib.util, queue, tempfile, encodings.idna, encodings.utf_8_sig
import concurrent.futures.thread, XenAPI, requests, urllib3, vmbackup, xxhash
for line in iter(sys.stdin.readline, ""):
    words, env, constants, out, err, waits = json.loads(line)
    pid = os.fork()
    if not pid:
        files = [os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
                 for path in (out, err) if path]
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0), os.dup2(files[0], 1), os.dup2(files[-1], 2)
        for file in files:
            os.close(file)
        os.environ.update(env)
        time.tzset()
        for name, value in constants.items():
            old = getattr(vmbackup, name)
            setattr(vmbackup, name, tuple(value) if isinstance(old, tuple) else value)
        if waits:
            os.kill(os.getpid(), signal.SIGSTOP)
        # As Python itself decodes arguments in this locale.
        words = [os.fsdecode(word.encode("utf-8", "surrogateescape")) for word in words]
        sys.exit(vmbackup.main(words))
    if waits:
        os.waitpid(pid, os.WUNTRACED)
        print(pid, flush=True)
        sys.stdin.readline()
        os.kill(pid, signal.SIGCONT)
    else:
        print(pid, flush=True)
    status = os.waitpid(pid, 0)[1]
    print(-os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status), flush=True)
"""
_running = []  # the process that run() uses, once there is one


class Forker:
    """The process that forks the runs, one after the other."""

    def __init__(self, preload=None):
        env = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "TZ": "UTC"}
        if preload:
            env["LD_PRELOAD"] = str(preload)
        self._process = subprocess.Popen([sys.executable, "-c", _FORKER, str(ROOT)], env=env,
                                         stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def tell(self, line):
        self._process.stdin.write(line.encode("utf-8") + b"\n")
        self._process.stdin.flush()

    def hear(self, timeout=None):
        """The number that it answers; None if it does not until the timeout."""
        if not select.select([self._process.stdout], [], [], timeout)[0]:
            return None
        return int(self._process.stdout.readline())

    def ask(self, line):
        self.tell(line)
        return self.hear()

    def stop(self):
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(30)


def run(words, constants=None, timeout=100):
    """A run of `vmbackup.py words...` in a clean environment; returns its status, out and err.

    constants: those of vmbackup.py that have another value in this run, to make it wait less.
    """
    if not _running:
        _running.append(Forker())
    forker = _running[0]
    with tempfile.TemporaryDirectory() as folder:
        out, err = os.path.join(folder, "out"), os.path.join(folder, "err")
        words = [str(word) for word in words]
        pid = forker.ask(json.dumps([words, {}, constants or {}, out, err, False]))
        status = forker.hear(timeout)
        if status is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            forker.hear()
        told = [Path(path).read_bytes() for path in (out, err)]
    if status is None:
        raise AssertionError("still running after %d s:\n%s%s" % (
            (timeout,) + tuple(text.decode("utf-8", "replace") for text in told)))
    return [status] + told


class Forks(Forker):
    """One for runs that wait to be started, or that a library of LD_PRELOAD disturbs."""

    def __init__(self, folder, preload=None):
        super().__init__(preload)
        self._out = str(folder / "fork.out")

    def start(self, site, *words, env=None):
        """A run with the site's config file that waits for go(); without TLS, to save its time."""
        return self.begin([site.sim.password, site.config, "host=" + site.sim.http] + list(words),
                          env=env)

    def begin(self, words, constants=None, env=None):
        """The same for any words; constants: see run() above."""
        words = [str(word) for word in words]
        pid = self.ask(json.dumps([words, env or {}, constants or {}, self._out, "", True]))
        return _Run(self, pid, self._out)

    def run(self, site, *words, env=None):
        """A run from its start to its end."""
        return self.start(site, *words, env=env).go()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()


class _Run:
    def __init__(self, forks, pid, out):
        self._forks, self.pid, self._path = forks, pid, out
        self.status = self.out = None

    def go(self):
        """Runs to the end and returns itself."""
        self.status = self._forks.ask("go")
        with open(self._path, encoding="utf-8") as file:
            self.out = file.read()
        assert "Traceback" not in self.out, self.out
        return self

    def __repr__(self):
        return "exit status %s\n%s" % (self.status, self.out)

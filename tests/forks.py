# SPDX-License-Identifier: GPL-3.0-or-later
"""Hundreds of runs of vmbackup.py in little time, for tests that walk through all of its steps.

    with Forks(preload=shim) as forks:
        run = forks.start(site, "vm-export=web", env={"KILL_AT": "7"})
        site.sim.fault("kill_client_at", pid=run.pid, method="*", skip=3)
        run.go()
        run.status, run.out         # the status is negative where a signal ended it, as Popen's

A process of its own loads the modules once; each run is a fork of it, so a real process with real
signals, which waits to be started until the test has set its faults.
"""
import json
import os
import subprocess
import sys

from harness import ROOT

_FORKER = """
import json, os, signal, sys, time, traceback
sys.path.insert(0, sys.argv[1])
import _strptime, importlib.util, queue, tempfile, encodings.idna, encodings.utf_8_sig
import XenAPI, requests, urllib3, vmbackup, xxhash
for line in sys.stdin:
    words, env, out = json.loads(line)
    pid = os.fork()
    if not pid:
        file = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(file, 1), os.dup2(file, 2), os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.environ.update(env)
        time.tzset()
        os.kill(os.getpid(), signal.SIGSTOP)
        status = 70
        try:
            status = vmbackup.main(words)
        except BaseException:
            traceback.print_exc()
        os._exit(status)
    os.waitpid(pid, os.WUNTRACED)
    print(pid, flush=True)
    sys.stdin.readline()
    os.kill(pid, signal.SIGCONT)
    status = os.waitpid(pid, 0)[1]
    print(-os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status), flush=True)
"""


class Forks:
    """The process that forks the runs, one after the other."""

    def __init__(self, folder, preload=None):
        self._out = str(folder / "fork.out")
        env = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "TZ": "UTC"}
        if preload:
            env["LD_PRELOAD"] = str(preload)
        self._process = subprocess.Popen([sys.executable, "-c", _FORKER, str(ROOT)], env=env,
                                         stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def start(self, site, *words, env=None):
        """A run with the site's config file that waits for go(); without TLS, to save its time."""
        words = [site.sim.password, str(site.config), "host=" + site.sim.http] + list(words)
        return _Run(self, self.ask(json.dumps([words, env or {}, self._out])), self._out)

    def run(self, site, *words, env=None):
        """A run from its start to its end."""
        return self.start(site, *words, env=env).go()

    def ask(self, line):
        self._process.stdin.write(line.encode("utf-8") + b"\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(30)


class _Run:
    def __init__(self, forks, pid, out):
        self._forks, self.pid, self._path = forks, pid, out
        self.status = self.out = None

    def go(self):
        """Runs to the end and returns itself."""
        self.status = self._forks.ask("go")
        with open(self._path, encoding="utf-8") as file:
            self.out = file.read()
        assert "Traceback" not in self.out and self.status != 70, self.out
        return self

    def __repr__(self):
        return "exit status %s\n%s" % (self.status, self.out)

# SPDX-License-Identifier: GPL-3.0-or-later
"""Start the simulator from a test, and drive it.

    from simulator.client import Simulator
    from simulator.pool import MIB, Pool, disk

    pool = Pool()
    pool.vm("web", power_state="Running", disks=[disk(3 * MIB + 512, seed=1)])
    with Simulator.start(pool) as sim:
        sim.url, sim.http, sim.socket, sim.password, sim.fingerprint, sim.certificate
        sim.hosts                       # every member, see __main__.py
        sim.fault("export_cut", vm="web", after=2 * MIB)
        ... run the program under test against sim.url ...
        assert "VM.destroy" in sim.methods()

``start`` takes a ``pool.Pool``, the path of a description, or ``database=PATH`` of a dump;
``arguments=[...]`` are more options of the program.  The process ends with the ``with`` block, and
with this process in any case.  It can be one pool after another: ``sim.load(pool)``.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request

_PROGRAM = os.path.dirname(os.path.abspath(__file__))
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Simulator:
    """A running simulator; what it printed at its start is there as attributes."""

    def __init__(self, process, ready):
        self._process = process
        self.ready = ready
        self.url = ready["url"]
        self.http = ready["http"]
        self.socket = ready["socket"]
        self.control = ready["control"]
        self.fingerprint = ready["fingerprint"]
        self.certificate = ready["certificate"]
        self.username = ready["username"]
        self.password = ready["password"]
        self.hosts = ready["hosts"]
        self.pid = process.pid

    @classmethod
    def start(cls, pool=None, database=None, arguments=()):
        """Start a simulator and wait until it serves."""
        path = None
        command = [sys.executable, _PROGRAM, "--stdin-guard"] + list(arguments)
        if database is not None:
            command += ["--database", str(database)]
        elif hasattr(pool, "dump"):
            descriptor, path = tempfile.mkstemp(suffix=".json")
            os.close(descriptor)
            pool.dump(path)
            command += ["--pool", path]
        elif pool is not None:
            command += ["--pool", str(pool)]
        try:
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            line = process.stdout.readline()
        finally:
            if path:
                os.unlink(path)
        if not line:
            process.wait()
            raise RuntimeError("the simulator did not start: %s" % " ".join(command))
        return cls(process, json.loads(line.decode("utf-8")))

    def stop(self):
        """End it."""
        self._process.stdin.close()  # it ends with its standard input
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:  # a thread of it still holds something: nobody needs it
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()

    def _do(self, what, **arguments):
        body = json.dumps(dict(arguments, do=what)).encode("utf-8")
        request = urllib.request.Request(  # noqa: S310 - our own URL
            self.control, body, {"Content-Type": "application/json"})
        try:
            with _OPENER.open(request) as answer:
                return json.loads(answer.read().decode("utf-8"))
        except urllib.error.HTTPError as error:
            raise ValueError(json.loads(error.read().decode("utf-8"))) from None

    def load(self, pool):
        """Be another pool, with as many hosts: faster than another process.

        Faults, settings, calls, sessions and tasks are those of the new pool: none.  The address,
        the ports, the certificates stay.
        """
        self._do("load", description=pool.description)
        self.username = pool.description["username"]
        self.password = pool.description["password"]

    # --- what goes wrong --------------------------------------------------------------------------

    def fault(self, name, **options):
        """Set a fault (see ``faults.py``); returns its number."""
        return self._do("fault", name=name, options=options)

    def clear_faults(self, name=None):
        """Take away all faults, or those of that name or number."""
        self._do("clear_faults", name=name)

    def faults(self):
        """All faults, with "fired": how often each happened."""
        return self._do("faults")

    def setting(self, **settings):
        """Change settings (see ``faults.py``)."""
        self._do("setting", settings=settings)

    # --- what was asked ---------------------------------------------------------------------------

    def calls(self):
        """Every call and request in order, as dictionaries.

        kind ("rpc" or "http"), method ("VM.snapshot", "GET /export"), args (a list, or the query),
        headers (http), host (index of the member), transport ("tls", "http" or "unix"), time,
        number, outcome ("Success", an error's code, an HTTP status) and bytes (of a body).
        """
        return self._do("calls")

    def methods(self):
        """Their methods alone."""
        return [call["method"] for call in self.calls()]

    def catch_up(self):
        """Wait until all is done that clients asked for over HTTP while this process was stopped.

        They must be gone.  Whoever connected before this connection is accepted before it.
        """
        try:
            _OPENER.open(self.http + "/").close()
        except urllib.error.HTTPError as error:
            error.close()
        while self._do("connections") or any(
                task["status"] == "pending" and task["name_label"].startswith("Async.")
                for task in self.tasks().values()):
            time.sleep(0.05)

    def reset_calls(self):
        """Forget what was asked."""
        self._do("reset_calls")

    # --- the pool ---------------------------------------------------------------------------------

    def records(self, cls):
        """All records of a class by reference; integers are integers here."""
        return self._do("records", cls=cls)

    def record(self, cls, name):
        """One record, by reference, uuid or name; KeyError for none."""
        for ref, record in self.records(cls).items():
            if name in (ref, record["uuid"], record.get("name_label")):
                return record
        raise KeyError(name)

    def ref(self, cls, name):
        """The reference of a record, by uuid or name."""
        return self._do("find", cls=cls, name=name)

    def set(self, cls, name, field, value):
        """Change a field of a record."""
        self._do("set", cls=cls, name=name, field=field, value=value)

    def sessions(self):
        """The open sessions."""
        return self.records("session")

    def tasks(self):
        """The tasks that are there."""
        return self.records("task")

    def destroyed(self):
        """All that was ever destroyed: dictionaries with class, ref, record, time."""
        return self._do("destroyed")

    def add_vm(self, vm):
        """Add a VM (as ``Pool.vm`` describes it); returns its reference."""
        return self._do("add_vm", vm=vm)

    def delete_vm(self, name):
        """Remove a VM and its disks."""
        self._do("delete_vm", name=name)

    def take_snapshot(self, vm, name):
        """Take a snapshot as somebody else would; returns its reference."""
        return self._do("take_snapshot", vm=vm, name=name)

    # --- disks ------------------------------------------------------------------------------------

    def disks_of(self, vm):
        """(userdevice, VDI record) of the disks of a VM."""
        ref = self.ref("VM", vm)
        vdis = self.records("VDI")
        return sorted((vbd["userdevice"], vdis[vbd["VDI"]]) for vbd in self.records("VBD").values()
                      if vbd["VM"] == ref and vbd["type"] == "Disk" and vbd["VDI"] in vdis)

    def disk_sha256(self, vdi):
        """The SHA-256 of a disk's bytes."""
        return self._do("disk_sha256", vdi=vdi)

    def disk_bytes_to(self, vdi, path):
        """Write a disk's bytes to a file (sparse)."""
        self._do("disk_bytes_to", vdi=vdi, path=str(path))

    def set_content(self, vdi, content):
        """Put something else on a disk, as ``pool.disk`` describes it; snapshots keep theirs."""
        self._do("set_content", vdi=vdi, content=content)

    def attached(self):
        """The disks (references) that exports have attached."""
        return self._do("attached")

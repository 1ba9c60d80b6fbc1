# SPDX-License-Identifier: GPL-3.0-or-later
"""The simulated pool as a whole: its state, its members, what was asked of it."""

import contextlib
import os
import threading
import time

from . import api
from .database import now
from .faults import SETTINGS, Faults
from .schema import NULL
from .xva import Ids


class Simulator:
    """State shared by all members of the pool and the control interface."""

    def __init__(self, world, settings=None):
        self.members = []           # server.Member, in the order of world.hosts
        self.dispatcher = api.Dispatcher(self)
        self.restarts = 0
        self._calls = []
        self._calls_lock = threading.Lock()
        self.adopt(world, settings)

    def adopt(self, world, settings=None):
        """Be this pool from now on, with nothing left of another one; as many members as before."""
        if self.members and len(self.members) != len(world.hosts):
            raise ValueError("this simulator has %d hosts" % len(self.members))
        for host, member in zip(world.hosts, self.members):
            world.db.set("host", host, "address", member.address)
        self.restarts += 1
        for member in self.members:
            member.close_connections()
        self.world = world
        self.db = world.db
        self.faults = Faults()
        self.settings = dict(SETTINGS)
        self.ids = Ids(self.settings["first_id"])
        self.change_settings(settings or {})
        self.task_sessions = {}     # task: the session that created it
        self.cancelled = set()      # tasks that someone asked to cancel
        self.doomed_tasks = set()   # tasks destroyed while pending: they go when they complete
        self.attached = {}          # VDI: how many exports have it attached
        self.reset_calls()

    def change_settings(self, settings):
        """Change settings; an unknown one is refused."""
        for name, value in settings.items():
            if name not in SETTINGS:
                raise ValueError("no such setting: %s" % name)
            self.settings[name] = value
            if name == "first_id":
                self.ids = Ids(value)

    def change_faults(self, faults):
        """Set the faults of a pool description."""
        for fault in faults:
            self.add_fault(fault["name"], {
                key: value for key, value in fault.items() if key != "name"})

    def add_fault(self, name, options):
        """Set a fault; an action that waits for nothing is done at once.  Returns its number."""
        fault = self.faults.add(name, options)
        if fault.immediate:
            self.faults.spend(fault)
            self._do(fault)
        return fault.number

    # --- the record of what was asked -------------------------------------------------------------

    def log(self, **entry):
        """Note a call or request; returns the entry, whose outcome is filled in later."""
        with self._calls_lock:
            entry["time"] = time.time()
            entry["number"] = len(self._calls) + 1
            self._calls.append(entry)
            return entry

    def calls(self):
        """Everything that was asked, in order."""
        with self._calls_lock:
            return [dict(entry) for entry in self._calls]

    def reset_calls(self):
        """Forget what was asked."""
        with self._calls_lock:
            self._calls = []

    # --- names ------------------------------------------------------------------------------------

    def names(self, cls, ref):
        """What a fault may call a VM or disk: its name, uuid, reference, and its original's."""
        names = []
        record = self.db.get(cls, ref)
        while record is not None:
            names += [ref, record["uuid"], record["name_label"]]
            ref = record["snapshot_of"]
            record = self.db.get(cls, ref)
        return names

    def master_address(self, asked):
        """The master's address, with its port where that is not the asked member's own."""
        master = self.members[self.world.master]
        same = master.port == self.members[asked].port
        return master.address if same else "%s:%d" % (master.address, master.port)

    def certificate_of(self, host):
        """The certificate (PEM) of a host."""
        with open(self.members[self.world.hosts.index(host)].certificate) as file:
            return file.read()

    # --- changes of state -------------------------------------------------------------------------

    def busy(self, vm, operations):
        """The error for a VM on which other operations are under way."""
        names = [operation for _, operation in operations]
        if self.settings["operation_shape"] == "old":
            return api.XapiError("OTHER_OPERATION_IN_PROGRESS", "VM.%s" % names[0], vm)
        return api.XapiError(
            "OTHER_OPERATION_IN_PROGRESS", "VM", vm,
            names[0] if len(names) == 1 else "{%s}" % ",".join(names), operations[0][0])

    def complete_task(self, task, status, result="", error_info=()):
        """End a task; once ended it does not change again, and one that is gone stays so."""
        with self.db.lock:
            record = self.db.get("task", task)
            if record is None or record["status"] not in ("pending", "cancelling"):
                return
            self.cancelled.discard(task)
            self.db.set("task", task, "finished", now())
            self.db.set("task", task, "progress", 1.0)
            self.db.set("task", task, "result", result)
            self.db.set("task", task, "error_info", list(error_info))
            self.db.set("task", task, "allowed_operations", [])
            self.db.set("task", task, "current_operations", {})
            self.db.set("task", task, "status", status)
            if task in self.doomed_tasks:
                self.doomed_tasks.discard(task)
                self.db.delete("task", task)

    def vanish_task(self, task):
        """Make a task disappear."""
        with self.db.lock:
            if self.db.get("task", task) is not None:
                self.db.delete("task", task)

    def delete_vm(self, vm):
        """Remove a VM's records; its disks stay."""
        db = self.db
        record = db.get("VM", vm)
        for child in list(record["children"]):
            db.set("VM", child, "parent", record["parent"])
        for vbd in list(record["VBDs"]):
            db.delete("VBD", vbd)
        for vif in list(record["VIFs"]):
            db.delete("VIF", vif)
        for cls, field in (("VM_metrics", "metrics"), ("VM_guest_metrics", "guest_metrics")):
            if record[field] in db.tables[cls]:
                db.delete(cls, record[field])
        db.delete("VM", vm)

    def halt_vm(self, vm):
        """Make a VM Halted."""
        for field, value in (("power_state", "Halted"), ("resident_on", NULL), ("domid", -1)):
            self.db.set("VM", vm, field, value)
        for vbd in self.db.get("VM", vm)["VBDs"]:
            self.db.set("VBD", vbd, "currently_attached", False)
        for vif in self.db.get("VM", vm)["VIFs"]:
            self.db.set("VIF", vif, "currently_attached", False)
        self.world.refresh_operations(vm)

    def attach(self, vdi, change):
        """Count an export's hold of a disk up (1) or down (-1)."""
        with self.db.lock:
            self.attached[vdi] = self.attached.get(vdi, 0) + change
            if not self.attached[vdi]:
                del self.attached[vdi]

    def let_go(self, vdi, slow=None):
        """End a hold of a disk: at once, or after the seconds of a fault."""
        if slow is None:
            self.attach(vdi, -1)
            return
        timer = threading.Timer(slow.get("seconds", 1), self.attach, (vdi, -1))
        timer.daemon = True
        timer.start()

    # --- actions ----------------------------------------------------------------------------------

    def act(self, trigger, **occasion):
        """Do the actions that wait for this occasion."""
        for fault in self.faults.actions(trigger, **occasion):
            self._do(fault)

    def byte_actions(self, path, host, **names):
        """(offset, function) of the actions that wait for a byte of this body."""
        return [(fault.get("after", 0), lambda fault=fault: self._do(fault))
                for fault in self.faults.actions("after", path=path, host=host, **names)]

    def _do(self, fault):
        getattr(self, "_do_" + fault.name)(fault)

    def _do_kill_client_at(self, fault):
        with contextlib.suppress(ProcessLookupError):
            os.kill(fault.get("pid"), fault.get("signal", 9))

    def _do_session_lost(self, _):
        with self.db.lock:
            for session in list(self.db.tables["session"]):
                self.db.delete("session", session)

    def _do_task_vanish(self, _):
        for task in list(self.db.tables["task"]):
            self.vanish_task(task)

    def _do_tasks_cancelled(self, _):
        for task in list(self.db.tables["task"]):
            self.complete_task(task, "cancelled")

    def _do_xapi_restart(self, fault):
        self.restarts += 1
        self._do_session_lost(fault)
        self._do_task_vanish(fault)
        with self.db.lock:
            for vm, record in self.db.tables["VM"].items():
                if record["current_operations"]:
                    self.db.set("VM", vm, "current_operations", {})
        for member in self.members:
            member.close_connections()

    def _do_master_moves(self, fault):
        self.db.set("pool", self.world.pool, "master", self.world.hosts[fault.get("to", 1)])
        self._do_session_lost(fault)
        self._do_task_vanish(fault)

    def _do_vm_renamed(self, fault):
        self.db.set("VM", self.db.find("VM", fault.get("target")), "name_label", fault.get("to"))

    def _do_vm_stopped(self, fault):
        with self.db.lock:
            self.halt_vm(self.db.find("VM", fault.get("target")))

    def _do_vm_deleted(self, fault):
        with self.db.lock:
            vm = self.db.find("VM", fault.get("target"))
            disks = [self.db.get("VBD", vbd)["VDI"] for vbd in self.db.get("VM", vm)["VBDs"]
                     if self.db.get("VBD", vbd)["type"] == "Disk"]
            self.delete_vm(vm)
            for vdi in disks:
                if self.db.get("VDI", vdi) is not None:
                    self.db.delete("VDI", vdi)

    def _do_host_down(self, fault):
        self.members[fault.get("member", 0)].stop()

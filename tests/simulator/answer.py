# SPDX-License-Identifier: GPL-3.0-or-later
"""What the HTTP handlers of both directions share: who asks, for what, and what goes wrong."""

import random
import threading
import time
import urllib.parse

from .api import Call, DropConnection, XapiError, new_session
from .database import now

SERVER = "Server: xapi/26.17"
NO_STORE = ("Connection: close", "Cache-Control: no-cache, no-store")
NO_BOOL = XapiError("INTERNAL_ERROR", 'Invalid_argument("bool_of_string")')
EPIPE = ("CLIENT_ERROR", 'INTERNAL_ERROR: [ Unix.Unix_error(Unix.EPIPE, "write", "") ]')
BAD_REQUEST = ("400", "Bad Request", "<h1>HTTP 400 bad request</h1>The HTTP request was malformed. "
                                     "Please correct and retry.")
TIMEOUT = ("408", "Request Timeout",
           "<h1>HTTP 408 request timeout</h1>Timed out waiting for the request.")
TOO_LARGE = ("431", "Request Header Fields Too Large",
             "<h1>HTTP 431 request header fields too large</h1>Exceeded the maximum header size.")


def sleep_unless(stop, seconds):
    """Sleep, but no longer than until ``stop()``."""
    event = threading.Event()
    while seconds > 0 and not stop():
        event.wait(min(seconds, 0.1))
        seconds -= 0.1


class Cut(Exception):
    """The body ends here; the task ends as given."""

    def __init__(self, task=None, error_info=(), wire=False):
        super().__init__()
        self.task, self.error_info, self.wire = task, error_info, wire


class Failure(Exception):
    """The body ends here because the transfer failed; the task gets the error."""

    def __init__(self, error_info, text=True, cancelled=False):
        super().__init__()
        self.error_info, self.text, self.cancelled = error_info, text, cancelled


class Finished(Exception):
    """The request is answered."""


class Answer:
    """The answer to one request; the classes of the handlers say to which."""

    actions = {}        # path: the role's name; the first that begins the request's path counts

    def __init__(self, connection, request, entry):
        self.connection = connection
        self.request = request
        self.entry = entry
        self.simulator = connection.simulator
        self.db = self.simulator.db
        self.world = self.simulator.world
        self.host = connection.member.index
        self.path = next((path for path in self.actions if request.path.startswith(path)), None)
        self.names = {}
        self.task = None
        self.own_task = False
        self.session = None
        self.vm = self.vdi = None
        self._locked = []

    def run(self):
        """Answer the request; the connection closes afterwards."""
        if self.path is None:
            self.connection.error_page(self.request, "404", "Not Found", "<h1>Not Found</h1>")
            return
        try:
            with self.db.lock:
                self._find_objects()
            if self.fault("export_431"):
                self._page(*TOO_LARGE)
            if self.fault("export_408"):
                self._page(*TIMEOUT)
            self._authenticate()
            self.answer()
        except Finished:
            pass
        finally:
            if self.own_task:
                self.simulator.vanish_task(self.task)

    def answer(self):
        """Answer a request of somebody who may ask."""
        raise NotImplementedError

    # --- before the body --------------------------------------------------------------------------

    def fault(self, name):
        """The fault of that name, if it happens to this request."""
        return self.simulator.faults.take(name, path=self.path, host=self.host, **self.names)

    def _find_objects(self):
        query, db = self.request.query, self.db
        if "ref" in query:
            self.vm = query["ref"]
        elif "uuid" in query:
            self.vm = db.by_uuid("VM", query["uuid"])
        vdi = self.request.parameter("vdi")
        if vdi is not None:
            self.vdi = vdi if db.get("VDI", vdi) else db.by_uuid("VDI", vdi)
        self.names = {"vm": self.simulator.names("VM", self.vm), "vdi": None}
        if self.vdi:
            self.names["vdi"] = self.simulator.names("VDI", self.vdi)

    def _page(self, *page, **options):
        self.entry["outcome"] = page[0]
        self.connection.error_page(self.request, *page, **options)
        raise Finished

    def _authenticate(self):
        """Session by cookie or query, or user and password; over the unix socket: anybody."""
        call = Call(self.simulator, self.host, self.connection.kind == "unix")
        given = self.request.parameter("session_id")
        if self.fault("export_401") is None:
            if given is not None and self.db.get("session", given) is not None:
                self.session = given
                return
            if self.connection.kind == "unix":
                return
            credentials = self.request.basic_credentials()
            if credentials == (self.world.username, self.world.password):
                for _ in range(3):
                    with self.db.lock:
                        self.db.delete("session", new_session(call, credentials[0]))
                return
        self._page("401", "Unauthorised", "<h1>HTTP 401 unauthorised</h1>Please check your "
                   "credentials and retry.",
                   headers=[("WWW-Authenticate", 'Basic realm="%s"' % self.actions[self.path])])

    def _take_task(self, label):
        """The client's task, or one of our own that nobody will see the end of."""
        given = self.request.parameter("task_id")
        if given is None:
            self.own_task = True
            self.task = self.db.insert(
                "task", name_label=label, created=now(), resident_on=self.world.hosts[self.host])
        elif self.db.get("task", given) is None:
            self._fail_before_body(XapiError("HANDLE_INVALID", "task", given))
        else:
            self.task = given
            self.db.set("task", given, "progress", 0.0)

    def _fail_before_body(self, error, status=True):
        """The task fails with the error, the answer is HTTP 500."""
        if self.task:
            self.simulator.complete_task(self.task, "failure", error_info=error.info)
        self.entry["outcome"] = "500 %s" % error.info[0]
        if status:
            self.connection.internal_error(self.request, error)
        raise Finished

    def _fail_without_task(self, error):
        """An unknown object ends the request as strangely as in xapi."""
        if self.simulator.settings["bad_uuid"] == "failure":
            task = self.request.parameter("task_id")
            self.simulator.complete_task(task, "failure", error_info=[
                "RBAC_PERMISSION_DENIED", "http/%s" % self.actions[self.path], str(error)])
        self.connection.internal_error(self.request, error)
        self.entry["outcome"] = "500 %s" % error.info[0]
        raise Finished

    def _empty_reply(self, error_info):
        self.simulator.complete_task(
            self.request.parameter("task_id"), "failure", error_info=error_info)
        self.entry["outcome"] = "empty reply"
        raise DropConnection

    def _redirect(self, location):
        self.connection.head("HTTP/1.1 302 Found", NO_STORE[0], NO_STORE[1],
                             "Location: " + location)
        self.entry["outcome"] = "302"
        raise Finished

    def _location(self, index):
        query = urllib.parse.urlencode(self.request.query, quote_via=urllib.parse.quote)
        return "%s%s?%s" % (self.simulator.members[index].url, self.request.path, query)

    def _redirect_faults(self):
        fault = self.fault("export_302")
        if fault:
            to = fault.get("to", "next")
            if to == "next":
                to = (self.host + 1) % len(self.simulator.members)
            self._redirect(fault.get("location") or self._location(to))
        fault = self.fault("export_empty_reply")
        if fault:
            self._empty_reply(fault.get("error_info", ["NO_HOSTS_AVAILABLE"]))

    def _choose_host(self, srs):
        """Stay, when this member sees all the SRs, or redirect to one that does."""
        here = self.world.hosts[self.host]
        if all(self.world.sees(here, sr) for sr in srs):
            return
        able = [index for index, host in enumerate(self.world.hosts)
                if all(self.world.sees(host, sr) for sr in srs)]
        if not able:
            self._empty_reply(["NO_HOSTS_AVAILABLE"])
        self._redirect(self._location(random.choice(able)))  # noqa: S311 - as xapi does

    def _fail_by_fault(self):
        fault = self.fault("export_500")
        if fault:
            self._fail_before_body(XapiError(*fault.get("error_info", ["INTERNAL_ERROR", "?"])))

    # --- the body and its end ---------------------------------------------------------------------

    def _wire_triggers(self, size, raw_cut=None):
        """(byte, action) of what happens at bytes that the client gets or sends."""
        triggers = self.simulator.byte_actions(self.path, self.host, **self.names)
        if raw_cut and raw_cut.get("after", 0) >= 0:
            triggers.append((raw_cut.get("after", 0), raiser(lambda: raw(raw_cut))))
        reset = self.fault("export_reset")
        if reset:
            triggers.append((reset.get("after", 0), self._reset))
        silence = self.fault("export_silence")
        if silence:
            restarts = self.simulator.restarts
            triggers.append((silence.get("after", 0), lambda: sleep_unless(
                lambda: self.simulator.restarts != restarts or not self.simulator.faults.is_set(
                    silence), silence.get("seconds", 1))))
        return [(offset_of(after, size), action) for after, action in triggers]

    def _archive_triggers(self, size):
        """The same for bytes of the archive, before compression."""
        triggers = []
        cut = self.fault("export_cut")
        if cut:
            triggers.append((cut.get("after", 0), raiser(lambda: Cut(
                cut.get("task"), cut.get("error_info", ())))))
        for name, text in (("export_fail", True), ("export_fail_silent", False)):
            fault = self.fault(name)
            if fault:
                info = fault.get("error_info", ["VDI_IO_ERROR", "Device I/O errors"])
                triggers.append((fault.get("after", 0),
                                 raiser(lambda info=info, text=text: Failure(info, text))))
        cancel = self.fault("export_cancel")
        if cancel:
            triggers.append((cancel.get("after", 0), raiser(self._cancelled)))
        return [(offset_of(after, size), action) for after, action in triggers]

    def _cancelled(self):
        """A transfer that is cancelled; a disk's says so in its task, a VM's does not."""
        return Failure(["TASK_CANCELLED", self.task], cancelled="raw_vdi" not in self.path)

    def _reset(self):
        self._complete("failure", EPIPE)
        self.connection.reset()
        raise DropConnection

    def _end_cut(self, cut):
        """xapi is gone: nothing follows; what becomes of the task is an option."""
        if cut.task == "vanish":
            self.simulator.vanish_task(self.task)
        elif cut.task in ("failure", "success"):
            self._complete(cut.task, cut.error_info)
        self.entry["outcome"] = "200, cut"
        raise DropConnection

    def _progress(self):
        """What xapi does now and then: write the progress, look whether it was cancelled."""
        with self.db.lock:
            record = self.db.get("task", self.task)
            if record is not None and record["status"] == "pending":
                self.db.set("task", self.task, "progress", min(0.9, record["progress"] + 0.05))
        if self.task in self.simulator.cancelled:
            raise self._cancelled()

    def _lock_vm(self, vm, operation):
        """Take the VM for the operation, or raise why not."""
        db = self.db
        coexists = ("clone", "copy", "export") if operation == "export" else (operation,)
        deadline = time.monotonic() + self.simulator.settings["busy_wait"]
        with db.lock:
            while True:
                record = db.get("VM", vm)
                if record is None:
                    raise XapiError("HANDLE_INVALID", "VM", vm)
                if record["is_control_domain"] and operation == "export":
                    raise XapiError("OPERATION_NOT_ALLOWED", "This is a control domain")
                if operation in record["blocked_operations"]:
                    raise XapiError("OPERATION_BLOCKED", vm,
                                    record["blocked_operations"][operation])
                if operation == "export" and record["power_state"] not in ("Halted", "Suspended"):
                    raise XapiError("VM_BAD_POWER_STATE", vm, "halted, suspended",
                                    record["power_state"].lower())
                others = [(task, name) for task, name in record["current_operations"].items()
                          if name not in coexists]
                if not others:
                    db.set("VM", vm, "current_operations",
                           dict(record["current_operations"], **{self.task: operation}))
                    self._locked.append(vm)
                    return
                left = deadline - time.monotonic()
                if left <= 0:
                    raise self.simulator.busy(vm, others)
                db.changed.wait(left)

    def _unlock(self):
        """Let go of the VMs that are still locked."""
        with self.db.lock:
            while self._locked:
                vm = self._locked.pop()
                record = self.db.get("VM", vm)
                if record is not None:
                    operations = dict(record["current_operations"])
                    operations.pop(self.task, None)
                    self.db.set("VM", vm, "current_operations", operations)

    def _complete(self, status, error_info=(), result=""):
        """End the task, after the VM is free again and before the connection closes."""
        self._unlock()
        self.simulator.complete_task(self.task, status, result=result, error_info=error_info)


def raw(fault):
    """The cut of a fault that counts bytes on the wire."""
    return Cut(fault.get("task"), fault.get("error_info", ()), wire=True)


def raiser(make):
    """A function that raises what ``make`` makes."""
    def act():
        raise make()
    return act


def offset_of(after, size):
    """A byte's number; a negative one counts from the end, where that is known."""
    return max(0, size + after) if after < 0 and size is not None else max(0, after)

# SPDX-License-Identifier: GPL-3.0-or-later
"""The HTTP handlers: /export, /export_metadata, /export_raw_vdi, /pool/xmldbdump."""

import random
import threading
import time
import urllib.parse

from . import server, sinks, vhd, xva
from .api import Call, DropConnection, XapiError, new_session
from .database import now

_PATHS = ("/export_raw_vdi", "/export_metadata", "/export", "/pool/xmldbdump")
_ACTIONS = {"/export": "get_export", "/export_metadata": "get_export_metadata",
            "/export_raw_vdi": "get_export_raw_vdi", "/pool/xmldbdump": "get_pool_xml_db_sync"}
_SERVER = "Server: xapi/26.17"
_NO_STORE = ("Connection: close", "Cache-Control: no-cache, no-store")
_RAW_TYPES = {"raw": "application/octet-stream", "vhd": "application/vhd",
              "tar": "application/x-tar"}
_NO_BOOL = XapiError("INTERNAL_ERROR", 'Invalid_argument("bool_of_string")')
_DUMMY = (b'<?xml version="1.0" encoding="UTF-8"?><database><manifest><pair key="schema_major_vsn"'
          b' value="5"/><pair key="schema_minor_vsn" value="35"/></manifest></database>')
_EPIPE = ("CLIENT_ERROR", 'INTERNAL_ERROR: [ Unix.Unix_error(Unix.EPIPE, "write", "") ]')


class _Cut(Exception):
    """The body ends here; the task ends as given."""

    def __init__(self, task=None, error_info=(), wire=False):
        super().__init__()
        self.task, self.error_info, self.wire = task, error_info, wire


class _Failure(Exception):
    """The body ends here because the export failed; the task gets the error."""

    def __init__(self, error_info, text=True, cancelled=False):
        super().__init__()
        self.error_info, self.text, self.cancelled = error_info, text, cancelled


class _Finished(Exception):
    """The request is answered."""


class Handler:
    """Answers one GET."""

    def __init__(self, connection, request, entry):
        self.connection = connection
        self.request = request
        self.entry = entry
        self.simulator = connection.simulator
        self.db = self.simulator.db
        self.world = self.simulator.world
        self.host = connection.member.index
        self.path = next((path for path in _PATHS if request.path.startswith(path)), None)
        self.names = {}
        self.task = None
        self.own_task = False
        self.session = None
        self.vm = self.vdi = None
        self._locked = []

    def run(self):
        """Answer the request; the connection closes afterwards."""
        answer = {
            "/export": self._export, "/export_metadata": self._export_metadata,
            "/export_raw_vdi": self._export_raw_vdi, "/pool/xmldbdump": self._xmldbdump,
        }.get(self.path)
        if answer is None:
            self.connection.error_page(self.request, "404", "Not Found", "<h1>Not Found</h1>")
            return
        try:
            with self.db.lock:
                self._find_objects()
            if self.fault("export_431"):
                self._page(*server.TOO_LARGE)
            if self.fault("export_408"):
                self._page(*server.TIMEOUT)
            self._authenticate()
            answer()
        except _Finished:
            pass
        finally:
            if self.own_task:
                self.simulator.vanish_task(self.task)

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
        raise _Finished

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
                   headers=[("WWW-Authenticate", 'Basic realm="%s"' % _ACTIONS[self.path])])

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
        raise _Finished

    def _vm_or_fail(self):
        """The VM's reference; an unknown uuid ends the request as strangely as in xapi."""
        if "ref" in self.request.query or self.vm is not None:
            return self.vm
        error = XapiError("UUID_INVALID", "VM", self.request.query.get("uuid", ""))
        if self.simulator.settings["bad_uuid"] == "failure":
            task = self.request.parameter("task_id")
            self.simulator.complete_task(task, "failure", error_info=[
                "RBAC_PERMISSION_DENIED", "http/%s" % _ACTIONS[self.path], str(error)])
        self.connection.internal_error(self.request, error)
        self.entry["outcome"] = "500 UUID_INVALID"
        raise _Finished

    def _empty_reply(self, error_info):
        self.simulator.complete_task(
            self.request.parameter("task_id"), "failure", error_info=error_info)
        self.entry["outcome"] = "empty reply"
        raise DropConnection

    def _redirect(self, location):
        self.connection.head("HTTP/1.1 302 Found", _NO_STORE[0], _NO_STORE[1],
                             "Location: " + location)
        self.entry["outcome"] = "302"
        raise _Finished

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

    # --- /export ----------------------------------------------------------------------------------

    def _export(self):
        query = self.request.query
        vm = self._vm_or_fail()
        self._redirect_faults()
        with self.db.lock:
            try:
                srs = self.world.srs_of(vm)
            except KeyError:
                srs = None
        if srs is None:
            self._empty_reply(["NO_HOSTS_AVAILABLE"])
        self._choose_host(srs)
        self._take_task("VM.export")
        self._fail_by_fault()
        preserve = self.request.parameter("preserve_power_state", "false")
        if preserve not in ("true", "false"):
            self._fail_before_body(_NO_BOOL)
        try:
            self._lock_vm(vm, "export")
        except XapiError as error:
            self._fail_before_body(error)
        try:
            self.connection.head(
                "HTTP/1.0 200 OK", _NO_STORE[0], _NO_STORE[1], "task-id: " + self.task, _SERVER,
                "content-type: application/octet-stream",
                'Content-Disposition: attachment; filename="export.xva"')
            with self.db.lock:
                metadata = xva.Metadata(
                    self.world, self.simulator.ids, [vm], preserve_power_state=preserve == "true")
                document = metadata.ova_xml()
            disks = [(identity, vdi, self.world.content(vdi)) for identity, vdi in metadata.disks()]
            compressor = sinks.COMPRESSORS.get(query.get("use_compression"))
            self._body(lambda: self._archive(document, disks), compressor)
        finally:
            self._unlock()

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

    def _complete(self, status, error_info=()):
        """End the task, after the VM is free again and before the connection closes."""
        self._unlock()
        self.simulator.complete_task(self.task, status, error_info=error_info)

    def _archive(self, document, disks):
        """The buffers of a whole archive."""
        everything = self.simulator.faults
        twice = everything.take("joined_twice", host=self.host, **self.names)
        for _ in range(2 if twice else 1):
            if document is not None:
                yield xva.ova_member(document)
            for identity, vdi, content in disks:
                options = self._disk_options(vdi)
                yield from self._attached(vdi, xva.disk_members(identity, content, options))
            if not everything.take("no_end_blocks", host=self.host, **self.names):
                yield xva.END
        trailing = everything.take("trailing_text", host=self.host, **self.names)
        if trailing:
            yield trailing.get("text", "trailing").encode("utf-8")

    def _attached(self, vdi, buffers):
        """The buffers, with the disk in use meanwhile."""
        self.simulator.attach(vdi, 1)
        try:
            yield from buffers
        finally:
            slow = self.fault("slow_detach")
            if slow:
                timer = threading.Timer(slow.get("seconds", 1), self.simulator.attach, (vdi, -1))
                timer.daemon = True
                timer.start()
            else:
                self.simulator.attach(vdi, -1)

    def _disk_options(self, vdi):
        """How this disk is written, by the faults that concern it."""
        occasion = {"host": self.host, "vm": self.names["vm"],
                    "vdi": self.simulator.names("VDI", vdi)}
        options = xva.DiskOptions()

        def chunks(name, default=-1):
            fault = self.simulator.faults.take(name, **occasion)
            if fault is None:
                return [], None
            chunk = fault.get("chunk", default)
            return chunk if isinstance(chunk, list) else [chunk], fault

        options.sha1 = chunks("sha1_checksums")[1] is not None
        options.all_chunks = chunks("zero_chunks")[1] is not None
        options.missing = chunks("missing_chunk")[0] + chunks("missing_last_chunk")[0]
        options.wrong_hash = chunks("wrong_hash")[0]
        options.keepalive = chunks("keepalive_members", 1)[0]
        restart = chunks("restart_numbers", 0)[0]
        options.restart = restart[0] if restart else None
        flipped, fault = chunks("flip_bit")
        options.flip = {index: fault.get("byte", 0) for index in flipped}
        return options

    # --- the body ---------------------------------------------------------------------------------

    def _body(self, buffers, compressor=None, size=None):
        """Send a body, with all that may happen on its way, and complete the task.

        ``buffers`` makes the sequence of buffers; ``size`` is its length where it is known.
        """
        self.entry["outcome"] = "200"
        slow = self.fault("export_slow_start")
        if slow:
            server.sleep_unless(lambda: not self.simulator.faults.is_set(slow),
                                slow.get("seconds", 1))
        send = self.connection.send
        rate = self.fault("export_rate")
        if rate:
            send = sinks.Throttle(send, rate.get("bytes", 1 << 20))
        raw_cut = self.fault("raw_cut")
        if raw_cut and raw_cut.get("after", 0) < 0:
            send = sinks.Short(send, -raw_cut.get("after"))
        wire = sinks.Counted(send, self._wire_triggers(size, raw_cut))
        try:
            self._send_body(buffers, wire, compressor, size)
            if raw_cut and raw_cut.get("after", 0) < 0:  # only now the end is known
                raise _raw(raw_cut)
        except _Cut as cut:
            self._end_cut(cut)
        except _Failure as failure:
            status = "cancelled" if failure.cancelled else "failure"
            info = () if failure.cancelled else failure.error_info
            self._complete(status, info)
            if failure.text:
                self.connection.internal_error(self.request, XapiError(*failure.error_info))
        except OSError:
            self._complete("failure", _EPIPE)
            self.entry["outcome"] = "200, client gone"
            raise DropConnection from None
        else:
            if self.fault("task_never_completes") is None:
                self._complete("success")
        finally:
            self.entry["bytes"] = wire.position

    def _send_body(self, buffers, wire, compressor, size):
        """Pass the buffers through the compressor to the wire; raises how it ended."""
        packed = compressor(wire.write) if compressor else wire
        archive = sinks.Counted(packed.write, self._archive_triggers(size))
        restarts = self.simulator.restarts
        poll = time.monotonic() + self.simulator.settings["progress_interval"]
        source = buffers()
        try:
            for data in source:
                archive.write(data)
                if time.monotonic() >= poll:
                    poll = time.monotonic() + self.simulator.settings["progress_interval"]
                    self._progress()
                if self.simulator.restarts != restarts:
                    raise _Cut("vanish", wire=True)
            archive.flush_triggers()
        except (_Cut, _Failure) as error:
            if not getattr(error, "wire", False):
                packed.finish()
            raise
        finally:
            source.close()
        packed.finish()
        wire.flush_triggers()
        after = self.fault("export_fail_after_whole")
        if after:
            raise _Failure(after.get("error_info", ["VDI_IO_ERROR", "Device I/O errors"]),
                           after.get("text", False))

    def _progress(self):
        """What xapi does now and then: write the progress, look whether it was cancelled."""
        with self.db.lock:
            record = self.db.get("task", self.task)
            if record is not None and record["status"] == "pending":
                self.db.set("task", self.task, "progress", min(0.9, record["progress"] + 0.05))
        if self.task in self.simulator.cancelled:
            raise self._cancelled()

    def _cancelled(self):
        """An export that is cancelled; a disk's export says so in its task, a VM's does not."""
        return _Failure(["TASK_CANCELLED", self.task], cancelled=self.path != "/export_raw_vdi")

    def _wire_triggers(self, size, raw_cut):
        """What happens at bytes that the client gets."""
        triggers = self.simulator.byte_actions(self.path, self.host, **self.names)
        if raw_cut and raw_cut.get("after", 0) >= 0:
            triggers.append((raw_cut.get("after", 0), _raiser(lambda: _raw(raw_cut))))
        reset = self.fault("export_reset")
        if reset:
            triggers.append((reset.get("after", 0), self._reset))
        silence = self.fault("export_silence")
        if silence:
            restarts = self.simulator.restarts
            triggers.append((silence.get("after", 0), lambda: server.sleep_unless(
                lambda: self.simulator.restarts != restarts or not self.simulator.faults.is_set(
                    silence), silence.get("seconds", 1))))
        return [(_offset(after, size), action) for after, action in triggers]

    def _archive_triggers(self, size):
        """What happens at bytes of the archive, before compression."""
        triggers = []
        cut = self.fault("export_cut")
        if cut:
            triggers.append((cut.get("after", 0), _raiser(lambda: _Cut(
                cut.get("task"), cut.get("error_info", ())))))
        for name, text in (("export_fail", True), ("export_fail_silent", False)):
            fault = self.fault(name)
            if fault:
                info = fault.get("error_info", ["VDI_IO_ERROR", "Device I/O errors"])
                triggers.append((fault.get("after", 0),
                                 _raiser(lambda info=info, text=text: _Failure(info, text))))
        cancel = self.fault("export_cancel")
        if cancel:
            triggers.append((cancel.get("after", 0), _raiser(self._cancelled)))
        return [(_offset(after, size), action) for after, action in triggers]

    def _reset(self):
        self._complete("failure", _EPIPE)
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

    # --- the other handlers -----------------------------------------------------------------------

    def _export_metadata(self):
        query = self.request.query
        flags = {}
        for name, default in (("all", "false"), ("include_dom0", "true"),
                              ("export_snapshots", "true"), ("include_vhd_parents", "false")):
            flags[name] = query.get(name, default)
        self._redirect_faults()
        if flags["all"] == "true":
            vms = [vm for vm, record in list(self.db.tables["VM"].items())
                   if not record["is_default_template"]
                   and (flags["include_dom0"] == "true" or not record["is_control_domain"])]
        else:
            vms = [self._vm_or_fail()]
        self._take_task("VM.export_metadata")
        error = None
        fault = self.fault("export_500")
        if fault:
            error = XapiError(*fault.get("error_info", ["INTERNAL_ERROR", "?"]))
        elif not set(flags.values()) <= {"true", "false"}:
            error = _NO_BOOL
        try:
            for vm in vms if error is None else ():
                self._lock_vm(vm, "metadata_export")
            if error is None:
                with self.db.lock:
                    excluded = query.get("excluded_device_types", "").split(",")
                    document = xva.Metadata(
                        self.world, self.simulator.ids, vms, preserve_power_state=True,
                        with_snapshots=flags["export_snapshots"] == "true",
                        excluded=excluded).ova_xml()
        except XapiError as failed:
            error = failed
        finally:
            self._unlock()
        if error is not None:
            self.connection.head("HTTP/1.1 500 internal error", "content-length: 0")
            self._fail_before_body(error)
        body = xva.ova_member(document) + xva.END
        self.connection.head(
            "HTTP/1.0 200 OK", _NO_STORE[0], _NO_STORE[1], "task-id: " + self.task, _SERVER,
            "content-type: application/octet-stream", "Content-Length: %d" % len(body),
            'Content-Disposition: attachment; filename="export.xva"')
        self._body(lambda: _iterate([body]), size=len(body))

    def _export_raw_vdi(self):
        vdi = self.vdi
        if vdi is None:
            self._fail_before_body(
                XapiError("HANDLE_INVALID", "VDI", self.request.parameter("vdi", "")))
        record = self.db.get("VDI", vdi)
        self._redirect_faults()
        self._choose_host([record["SR"]])
        self._take_task("Exporting raw VDI")
        self._fail_by_fault()
        kind = self.request.parameter("format", "raw")
        if kind not in _RAW_TYPES:
            self.simulator.complete_task(
                self.task, "failure", error_info=["INTERNAL_ERROR", "Unknown format %s" % kind])
            self.connection.head("HTTP/1.0 404 Not Found", *_NO_STORE)
            self.entry["outcome"] = "404"
            raise _Finished
        self.connection.head(
            "HTTP/1.1 200 OK", _NO_STORE[0], _NO_STORE[1], "task-id:" + self.task,
            "content-type:" + _RAW_TYPES[kind],
            'content-disposition: attachment; filename="%s.%s"' % (record["uuid"], kind))
        content = self.world.content(vdi)
        size = content.size if kind == "raw" else None
        self._body(lambda: self._disk_stream(vdi, content, kind), size=size)

    def _disk_stream(self, vdi, content, kind):
        """A disk in one of the formats; fails, behind the headers, when it is in use."""
        in_use = any(self.db.get("VBD", vbd)["currently_attached"]
                     and self.db.get("VBD", vbd)["mode"] == "RW"
                     for vbd in self.db.get("VDI", vdi)["VBDs"])
        if in_use:
            raise _Failure(["VDI_IN_USE", vdi, "attach"])
        if kind == "vhd" and content.size > 2040 << 30:
            raise _Failure(["VDI_TOO_LARGE", vdi, str(2040 << 30)])
        if kind == "tar":
            yield from self._archive(None, [("vdi", vdi, content)])
        elif kind == "vhd":
            yield from self._attached(vdi, vhd.stream(content, self.db.get("VDI", vdi)["uuid"]))
        else:
            yield from self._attached(vdi, xva.raw(content))

    def _xmldbdump(self):
        self._redirect_faults()
        self._take_task("dump database")
        self._fail_by_fault()
        self.connection.head("HTTP/1.1 200 OK", *_NO_STORE)
        if self.host != self.world.master:
            failure = _Failure(["INTERNAL_ERROR", "Db_exn.Database_not_in_memory"])
            self._body(lambda: _iterate([], failure))
        else:
            document = _DUMMY if self.fault("database_dummy") else self.db.dump()
            self._body(lambda: _iterate([document]), size=len(document))


def _iterate(buffers, failure=None):
    """The buffers, then the failure."""
    yield from buffers
    if failure is not None:
        raise failure


def _raw(fault):
    return _Cut(fault.get("task"), fault.get("error_info", ()), wire=True)


def _raiser(make):
    """A function that raises what ``make`` makes."""
    def act():
        raise make()
    return act


def _offset(after, size):
    """A byte's number; a negative one counts from the end, where that is known."""
    return max(0, size + after) if after < 0 and size is not None else max(0, after)

# SPDX-License-Identifier: GPL-3.0-or-later
"""The HTTP handlers of GET: /export, /export_metadata, /export_raw_vdi, /pool/xmldbdump."""

import time

from . import sinks, vhd, xva
from .answer import (
    EPIPE,
    NO_BOOL,
    NO_STORE,
    SERVER,
    Answer,
    Cut,
    Failure,
    Finished,
    raw,
    sleep_unless,
)
from .api import DropConnection, XapiError

_RAW_TYPES = {"raw": "application/octet-stream", "vhd": "application/vhd",
              "tar": "application/x-tar"}
_DUMMY = (b'<?xml version="1.0" encoding="UTF-8"?><database><manifest><pair key="schema_major_vsn"'
          b' value="5"/><pair key="schema_minor_vsn" value="35"/></manifest></database>')


class Handler(Answer):
    """Answers one GET."""

    actions = {"/export_raw_vdi": "get_export_raw_vdi", "/export_metadata": "get_export_metadata",
               "/export": "get_export", "/pool/xmldbdump": "get_pool_xml_db_sync"}

    def answer(self):
        """Send what was asked for."""
        {"/export": self._export, "/export_metadata": self._export_metadata,
         "/export_raw_vdi": self._export_raw_vdi, "/pool/xmldbdump": self._xmldbdump}[self.path]()

    def _vm_or_fail(self):
        """The VM's reference."""
        if "ref" not in self.request.query and self.vm is None:
            self._fail_without_task(
                XapiError("UUID_INVALID", "VM", self.request.query.get("uuid", "")))
        return self.vm

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
            self._fail_before_body(NO_BOOL)
        try:
            self._lock_vm(vm, "export")
        except XapiError as error:
            self._fail_before_body(error)
        try:
            self.connection.head(
                "HTTP/1.0 200 OK", NO_STORE[0], NO_STORE[1], "task-id: " + self.task, SERVER,
                "content-type: application/octet-stream",
                'Content-Disposition: attachment; filename="export.xva"')
            with self.db.lock:
                metadata = xva.Metadata(
                    self.world, self.simulator.ids, [vm], preserve_power_state=preserve == "true",
                    version=self.simulator.settings["archive_version"])
                document = metadata.ova_xml()
            disks = [(identity, vdi, self.world.content(vdi)) for identity, vdi in metadata.disks()]
            compressor = sinks.COMPRESSORS.get(query.get("use_compression"))
            self._body(lambda: self._archive(document, disks), compressor)
        finally:
            self._unlock()

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
            self.simulator.let_go(vdi, self.fault("slow_detach"))

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
            sleep_unless(lambda: not self.simulator.faults.is_set(slow),
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
                raise raw(raw_cut)
        except Cut as cut:
            self._end_cut(cut)
        except Failure as failure:
            status = "cancelled" if failure.cancelled else "failure"
            info = () if failure.cancelled else failure.error_info
            self._complete(status, info)
            if failure.text:
                self.connection.internal_error(self.request, XapiError(*failure.error_info))
        except OSError:
            self._complete("failure", EPIPE)
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
                    raise Cut("vanish", wire=True)
            archive.flush_triggers()
        except (Cut, Failure) as error:
            if not getattr(error, "wire", False):
                packed.finish()
            raise
        finally:
            source.close()
        packed.finish()
        wire.flush_triggers()
        after = self.fault("export_fail_after_whole")
        if after:
            raise Failure(after.get("error_info", ["VDI_IO_ERROR", "Device I/O errors"]),
                           after.get("text", False))

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
            error = NO_BOOL
        try:
            for vm in vms if error is None else ():
                self._lock_vm(vm, "metadata_export")
            if error is None:
                with self.db.lock:
                    excluded = query.get("excluded_device_types", "").split(",")
                    document = xva.Metadata(
                        self.world, self.simulator.ids, vms, preserve_power_state=True,
                        with_snapshots=flags["export_snapshots"] == "true",
                        excluded=excluded,
                        version=self.simulator.settings["archive_version"]).ova_xml()
        except XapiError as failed:
            error = failed
        finally:
            self._unlock()
        if error is not None:
            self.connection.head("HTTP/1.1 500 internal error", "content-length: 0")
            self._fail_before_body(error)
        body = xva.ova_member(document) + xva.END
        self.connection.head(
            "HTTP/1.0 200 OK", NO_STORE[0], NO_STORE[1], "task-id: " + self.task, SERVER,
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
            self.connection.head("HTTP/1.0 404 Not Found", *NO_STORE)
            self.entry["outcome"] = "404"
            raise Finished
        self.connection.head(
            "HTTP/1.1 200 OK", NO_STORE[0], NO_STORE[1], "task-id:" + self.task,
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
            raise Failure(["VDI_IN_USE", vdi, "attach"])
        if kind == "vhd" and content.size > 2040 << 30:
            raise Failure(["VDI_TOO_LARGE", vdi, str(2040 << 30)])
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
        self.connection.head("HTTP/1.1 200 OK", *NO_STORE)
        if self.host != self.world.master:
            failure = Failure(["INTERNAL_ERROR", "Db_exn.Database_not_in_memory"])
            self._body(lambda: _iterate([], failure))
        else:
            document = _DUMMY if self.fault("database_dummy") else self.db.dump()
            self._body(lambda: _iterate([document]), size=len(document))


def _iterate(buffers, failure=None):
    """The buffers, then the failure."""
    yield from buffers
    if failure is not None:
        raise failure

# SPDX-License-Identifier: GPL-3.0-or-later
"""The HTTP handlers of PUT: /import, /import_raw_vdi (xapi's import.ml and import_raw_vdi.ml)."""

import contextlib
import os
import time
import xmlrpc.client

from . import disks, incoming, schema, vhd
from .answer import NO_STORE, Answer, Cut, Failure, Finished, sleep_unless
from .api import XapiError, create_vdi
from .database import new_uuid, now
from .schema import NULL

_PREMATURE = ["IMPORT_ERROR_PREMATURE_EOF"]
_VERSION = (24, 19)     # of this xapi; archives of newer ones are refused


class Handler(Answer):
    """Answers one PUT."""

    actions = {"/import_raw_vdi": "put_import_raw_vdi", "/import": "put_import"}

    def answer(self):
        """Take what is sent."""
        if self.request.path.startswith("/import_metadata"):
            self._page("404", "Not Found", "<h1>Not Found</h1>")
        self._made = []         # (class, reference), in the order of their making
        self._body = None
        {"/import": self._import, "/import_raw_vdi": self._import_raw_vdi}[self.path]()

    # --- before the body --------------------------------------------------------------------------

    def _target(self):
        """The SR that the query names, or the pool's default."""
        db, given = self.db, self.request.parameter
        sr = given("sr_id")
        if sr is not None:
            if db.get("SR", sr) is None:
                raise XapiError("HANDLE_INVALID", "SR", sr)
            return sr
        if given("sr_uuid") is not None:
            sr = db.by_uuid("SR", given("sr_uuid"))
            if sr is None:
                raise XapiError("UUID_INVALID", "SR", given("sr_uuid"))
            return sr
        sr = db.get("pool", self.world.pool)["default_SR"]
        if db.get("SR", sr) is None:
            raise XapiError("DEFAULT_SR_NOT_FOUND", sr)
        return sr

    def _refuse(self, line, error_info, text=None):
        """An answer other than 200, the task failed."""
        self.simulator.complete_task(
            self.task or self.request.parameter("task_id"), "failure", error_info=error_info)
        self.entry["outcome"] = line.split(" ")[1]
        self.connection.head(line, *NO_STORE)
        if text:
            self.connection.internal_error(self.request, XapiError(*error_info))
        raise Finished

    def _length(self):
        text = self.request.headers.get("content-length", "")
        return int(text) if text.isdigit() else None

    def _take(self, take):
        """Answer 200 at once, then let ``take(body)`` read and give the task's result."""
        self.connection.head("HTTP/1.1 200 OK", NO_STORE[0], NO_STORE[1], "task-id:" + self.task,
                             "content-type: application/octet-stream")
        self.entry["outcome"] = "200"
        length = self._length()
        rate = self.fault("export_rate")
        triggers = self._wire_triggers(length) + self._archive_triggers(length)
        self._body = body = incoming.Body(
            self.connection, length, triggers, rate.get("bytes", 1 << 20) if rate else None)
        restarts = self.simulator.restarts
        try:
            result = take(body)
            slow = self.fault("import_slow_end")
            if slow:
                sleep_unless(lambda: self.simulator.restarts != restarts, slow.get("seconds", 1))
        except Cut as cut:
            self._end_cut(cut)
        except Failure as failure:
            self._fail(failure, restarts)
        except XapiError as error:
            self._fail(Failure(error.info), restarts)
        except incoming.EarlyEnd:
            self._fail(Failure(_PREMATURE), restarts)
        else:
            if self.fault("task_never_completes") is None:
                self._complete("success", result=result)
        finally:
            self.entry["bytes"] = body.position

    def _fail(self, failure, restarts):
        """Clear away, then end the task, then say so in the connection."""
        if self.simulator.restarts != restarts:
            return  # xapi is gone; what it made stays
        slow = self.fault("import_slow_cleanup")
        if slow:
            sleep_unless(lambda: self.simulator.restarts != restarts, slow.get("seconds", 1))
        if self.request.query.get("force") != "true":
            self._clear_away()
        self._complete("cancelled" if failure.cancelled else "failure",
                       () if failure.cancelled else failure.error_info)
        if failure.text:
            with contextlib.suppress(OSError, ValueError):
                self.connection.internal_error(self.request, XapiError(*failure.error_info))

    def _clear_away(self):
        leaves = self.fault("import_leaves")
        with self.db.lock:
            for cls, ref in reversed(self._made):
                if (leaves and leaves.get("cls", "VDI") == cls) or self.db.get(cls, ref) is None:
                    continue
                if cls == "VM":
                    self.simulator.delete_vm(ref)
                elif cls == "VDI":
                    self.world.forget_disk(ref)
                else:
                    self.db.delete(cls, ref)

    def _end_cut(self, cut):
        """xapi dies; when it is back, nothing is under way any more."""
        self._unlock()
        super()._end_cut(cut)

    def _reset(self):
        """The line breaks; xapi sees the end of the body and clears away."""
        self.connection.reset()
        raise Failure(_PREMATURE, text=False)

    # --- /import ----------------------------------------------------------------------------------

    def _import(self):
        try:
            sr = self._target()
        except XapiError as error:
            self._fail_without_task(error)
        self._redirect_faults()
        self._choose_host([sr])
        refused = self.fault("import_400")
        if refused:
            self._refuse("HTTP/1.1 400 Bad Request",
                         refused.get("error_info", ["NOT_SUPPORTED_DURING_UPGRADE"]))
        if self.db.get("SR", sr)["content_type"] == "iso":
            self._refuse("HTTP/1.1 400 Bad Request", ["SR_OPERATION_NOT_SUPPORTED", sr])
        self._take_task("VM.import")
        self._fail_by_fault()
        if "transfer-encoding" in self.request.headers:
            self._refuse("HTTP/1.1 403 Forbidden", ["IMPORT_ERROR_CANNOT_HANDLE_CHUNKED"], True)
        self._take(lambda body: self._unpack(body, sr))

    def _unpack(self, body, sr):
        """The whole import; returns the task's result."""
        source, compressed = incoming.source_of(body)
        name, data = incoming.member(source)
        if name != "ova.xml":
            raise XapiError(*(["IMPORT_ERROR_UNEXPECTED_FILE", "ova.xml", name]
                              if compressed else _PREMATURE))
        document = _value(bytes(data))
        version = document["version"]
        if (int(version["xapi_major"]), int(version["xapi_minor"])) > _VERSION:
            raise XapiError("IMPORT_INCOMPATIBLE_VERSION")
        objects = [(one["class"], one["id"], _typed(one["class"], one["snapshot"]))
                   for one in document["objects"] if one["class"] in schema.TYPES]
        made = _Objects(self, objects, sr)
        with self.db.lock:
            vms = made.make()
            if self.db.get("task", self.task) is not None:
                self.db.set("task", self.task, "other_config", dict(
                    self.db.get("task", self.task)["other_config"], object_creation="complete"))
        first = None
        for identity, vdi, size in made.streamed():
            first = self._fill(source, identity, vdi, size, first)
        with self.db.lock:
            snapshots = {vm for vm in vms if self.db.get("VM", vm)["is_a_snapshot"]}
        told = [vm for vm in vms if vm not in snapshots] or vms
        return "<value><array><data>%s</data></array></value>" % "".join(
            "<value>%s</value>" % vm for vm in told)

    def _fill(self, source, identity, vdi, size, first):
        """Read a disk's chunks (recv_all_vdi); returns the length of the archive's first one."""
        content = self.db.contents[vdi]
        last, number, at = -1, "", 0
        poll = 0
        self.simulator.attach(vdi, 1)
        try:
            while at < size:
                name, data = incoming.member(source)
                prefix, _, text = name.rpartition("/")
                if prefix != identity or text <= number or not text.isdigit():
                    raise XapiError("IMPORT_ERROR", "Failure(\"Invalid XVA file\")")
                first = len(data) if first is None else first
                number = text
                at += first * (int(text) - last - 1)
                last = int(text)
                self._check(name, data, *incoming.member(source))
                if at + len(data) > content.size:
                    raise XapiError("VDI_IO_ERROR", "Device I/O error")
                content.write(at, data)
                self.world.grow(vdi, len(data))
                at += len(data)
                if time.monotonic() >= poll:
                    poll = time.monotonic() + self.simulator.settings["progress_interval"]
                    self._progress()
                elif self.task in self.simulator.cancelled:
                    raise self._cancelled()
        finally:
            self.simulator.attach(vdi, -1)
        return first

    def _check(self, name, data, told, digest):
        function = {name + ".xxhash": disks.xxh64, name + ".checksum": disks.sha1}.get(told)
        if function is None:
            raise XapiError("IMPORT_ERROR", "Failure(\"Expected to find an inline checksum\")")
        if function(data) != bytes(digest).decode("ascii", "replace") and \
                self.request.query.get("force") != "true":
            raise XapiError("IMPORT_ERROR", "Stream_vdi.Invalid_checksum(\"%s\")" % name)

    def made(self, cls, ref):
        """Note what has to go if the import fails."""
        self._made.append((cls, ref))
        return ref

    # --- /import_raw_vdi --------------------------------------------------------------------------

    def _import_raw_vdi(self):
        kind = self.request.parameter("format", "raw")
        try:
            sr = self.db.get("VDI", self.vdi)["SR"] if self.vdi else None
            if sr is None and self.request.parameter("vdi") is not None:
                raise XapiError("HANDLE_INVALID", "VDI", self.request.parameter("vdi"))
            new = sr is None
            if new and not {"sr_id", "sr_uuid"} & (set(self.request.query)
                                                   | set(self.request.cookies)):
                self._refuse("HTTP/1.1 400 Bad Request", ["VDI_MISSING"])
            sr = self._target() if new else sr
        except XapiError as error:
            self.task = self.request.parameter("task_id")
            self._fail_before_body(error)
        self._redirect_faults()
        self._choose_host([sr])
        self._take_task("Importing raw VDI")
        self._fail_by_fault()
        if "transfer-encoding" in self.request.headers:
            self._refuse("HTTP/1.0 404 Not Found", ["INTERNAL_ERROR", "Cannot handle encoding"])
        if kind not in ("raw", "vhd"):
            self._refuse("HTTP/1.0 404 Not Found", ["INTERNAL_ERROR", "Unknown format %s" % kind])
        length = self._length()
        if new:
            if length is None or kind != "raw":
                self._refuse("HTTP/1.1 400 Bad Request", ["VDI_MISSING"])
            self.vdi = create_vdi(self, sr=sr, name="Imported VDI", size=length)
        self._take(lambda body: self._write_disk(body, self.vdi, kind, length))

    def _write_disk(self, body, vdi, kind, length):
        """The bytes of a disk, from its start; what was written stays, however it ends."""
        record = self.db.get("VDI", vdi)
        if any(self.db.get("VBD", vbd)["currently_attached"] for vbd in record["VBDs"]) or \
                self.simulator.attached.get(vdi):
            raise XapiError("VDI_IN_USE", vdi, "attach")
        content = self.world.writable(vdi)
        broken = XapiError("VDI_IO_ERROR", "Device I/O errors")
        source = incoming.Source(body.piece)
        self.simulator.attach(vdi, 1)
        try:
            if kind == "vhd":
                vhd.apply(source, content, length, broken)
            else:
                left, at = content.size if length is None else length, 0
                while left:
                    data = source.read(min(left, 1 << 18))
                    if at + len(data) > content.size:
                        raise broken
                    content.write(at, data)
                    at += len(data)
                    left -= len(data)
                    if self.task in self.simulator.cancelled:
                        raise self._cancelled()
        except incoming.EarlyEnd:
            raise broken from None
        finally:
            self.simulator.let_go(vdi, self.fault("slow_detach"))
        return "<value>%s</value>" % vdi


def _value(text):
    """The value of an XML-RPC document without its envelope."""
    try:
        return xmlrpc.client.loads(
            b"<methodResponse><params><param>" + text + b"</param></params></methodResponse>")[0][0]
    except Exception as error:
        raise XapiError("IMPORT_ERROR", repr(error)) from None


def _typed(cls, fields):
    """A record of the schema out of one in an archive; fields that are not known are left out."""
    made = schema.new_record(cls)
    for name, kind in schema.TYPES[cls].items():
        if name in fields:
            value = fields[name]
            made[name] = {"int": int, "float": float}[kind](value) if kind in ("int", "float") \
                else str(value) if kind in ("str", "ref", "date") else value
    return made


class _Objects:
    """The objects of an archive, being made in the pool (import.ml)."""

    def __init__(self, handler, objects, sr):
        self.handler = handler
        self.db, self.world = handler.db, handler.world
        self.restore = handler.request.query.get("restore") == "true"
        self.force = handler.request.query.get("force") == "true"
        self.sr = sr
        self.objects = objects
        self.table = {}         # id in the archive: reference
        self.sizes = {}         # id of a disk: its size in the archive

    def of(self, *classes):
        return [(cls, identity, record) for cls, identity, record in self.objects
                if cls in classes]

    def make(self):
        """All records; returns the references of the VMs."""
        if self.restore:
            for _, _, record in self.of("VM"):
                self._may_restore(record)
        for cls, identity, record in self.of("host"):
            self.table[identity] = self.db.by_uuid(cls, record["uuid"]) or NULL
        for _, identity, _ in self.of("SR"):
            self.table[identity] = self.sr
        isos = {identity for _, identity, record in self.of("SR")
                if record["content_type"] == "iso"}
        for _, identity, record in self.of("VDI"):
            self._disk(identity, record, isos)
        vms = [self._vm(identity, record) for _, identity, record in self.of("VM")]
        for _, identity, record in self.of("network"):
            self._network(identity, record)
        for _, _, record in self.of("VBD"):
            self._vbd(record)
        for _, _, record in self.of("VIF"):
            self._vif(record)
        return vms

    def streamed(self):
        """(id, VDI, size) of the disks whose bytes follow, in the archive's order."""
        return [(identity, self.table[identity], self.sizes[identity])
                for identity in sorted(self.sizes)]

    def _may_restore(self, record):
        for ref, other in self.db.tables["VM"].items():
            seed = record["other_config"].get("mac_seed")
            if seed and other["other_config"].get("mac_seed") == seed and \
                    other["uuid"] != record["uuid"]:
                raise XapiError("DUPLICATE_MAC_SEED", seed)
            if other["uuid"] != record["uuid"]:
                continue
            if other["power_state"] != "Halted":
                raise XapiError("VM_BAD_POWER_STATE", ref, "Halted", other["power_state"])
            if other["version"] >= record["version"] and not self.force:
                raise XapiError("VM_TO_IMPORT_IS_NOT_NEWER_VERSION", ref, other["version"],
                                record["version"])
        ref = self.db.by_uuid("VM", record["uuid"])
        if ref is not None:
            self.handler.simulator.delete_vm(ref)   # its disks stay behind as orphans

    def _disk(self, identity, record, isos):
        if record["SR"] in isos:
            same = [ref for ref, vdi in self.db.tables["VDI"].items()
                    if vdi["location"] == record["location"]
                    and self.db.get("SR", vdi["SR"])["content_type"] == "iso"]
            self.table[identity] = same[0] if same else NULL
            return
        ref = create_vdi(
            self.handler, sr=self.sr, name=record["name_label"], size=record["virtual_size"],
            name_description=record["name_description"], type=record["type"],
            other_config=record["other_config"], tags=record["tags"],
            sharable=record["sharable"], xenstore_data=record["xenstore_data"],
            sm_config={"import_task": self.handler.task})
        self.table[identity] = self.handler.made("VDI", ref)
        self.sizes[identity] = record["virtual_size"]

    def _vm(self, identity, record):
        db = self.db
        if not self.restore:
            record["uuid"] = new_uuid(os.urandom(16))
            record["other_config"]["mac_seed"] = new_uuid(os.urandom(16))
            record["version"] = 0
        else:
            record["version"] += 1
        for field in ("VBDs", "VIFs", "VGPUs", "VTPMs", "snapshots", "children", "consoles",
                      "crash_dumps", "VUSBs", "attached_PCIs"):
            record[field] = []
        record.update(
            blocked_operations={}, appliance=NULL, protection_policy=NULL, snapshot_schedule=NULL,
            power_state="Halted", domid=-1, suspend_VDI=NULL, snapshot_of=NULL, parent=NULL,
            resident_on=NULL, affinity=self.table.get(record["affinity"], NULL))
        record["other_config"]["import_task"] = self.handler.task
        record["metrics"] = db.insert("VM_metrics", last_updated=now())
        told = {one: fields for _, one, fields in self.of("VM_guest_metrics")}
        guest = told.get(record["guest_metrics"])
        record["guest_metrics"] = NULL
        if guest is not None:
            record["guest_metrics"] = db.insert("VM_guest_metrics", dict(guest, uuid=""))
        ref = self.handler.made("VM", db.insert("VM", record))
        self.table[identity] = ref
        self.world.refresh_operations(ref)
        if not self.force:
            self.handler._lock_vm(ref, "import")
        return ref

    def _network(self, identity, record):
        for field in ("name_label", "bridge"):
            for ref, other in self.db.tables["network"].items():
                if record[field] and other[field] == record[field]:
                    self.table[identity] = ref
                    return
        record.update(uuid="", VIFs=[], PIFs=[], current_operations={}, other_config=dict(
            record["other_config"], import_task=self.handler.task))
        self.table[identity] = self.handler.made("network", self.db.insert("network", record))

    def _again(self, cls, record):
        """Whether a record of that uuid is there and is taken as it is; else gives it a uuid."""
        if self.restore and self.db.by_uuid(cls, record["uuid"]):
            return True
        if not self.restore:
            record["uuid"] = ""
        return False

    def _vbd(self, record):
        if self._again("VBD", record):
            return
        vdi = self.table.get(record["VDI"], NULL)
        if record["type"] == "Disk" and vdi == NULL:
            return
        record.update(VM=self.table[record["VM"]], VDI=vdi, currently_attached=False,
                      current_operations={}, allowed_operations=["attach"],
                      empty=vdi == NULL)
        self.handler.made("VBD", self.db.insert("VBD", record))

    def _vif(self, record):
        if self._again("VIF", record):
            return
        record.update(VM=self.table[record["VM"]], network=self.table.get(record["network"], NULL),
                      currently_attached=False, current_operations={})
        if not self.restore:
            record["MAC"] = "fa:%s" % ":".join("%02x" % byte for byte in os.urandom(16)[:5])
            record["MAC_autogenerated"] = True
        self.handler.made("VIF", self.db.insert("VIF", record))

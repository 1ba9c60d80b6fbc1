# SPDX-License-Identifier: GPL-3.0-or-later
"""The archive of an exported VM: ova.xml and the disks in chunks of 1 MiB, as xapi writes it."""

import itertools
import threading
import time

from . import disks, schema, xmlrpc
from .schema import EPOCH, NULL

BLOCK = 512
END = bytes(2 * BLOCK)

_ORDER = ("host", "VM", "VM_metrics", "VM_guest_metrics", "VBD", "VIF", "network", "VDI", "SR")
_TEMPLATE = bytearray(BLOCK)
_TEMPLATE[100:108] = b"0000400\0"
_TEMPLATE[108:116] = _TEMPLATE[116:124] = b"0000000\0"
_TEMPLATE[148:156] = b" " * 8


def tar_header(name, size, mtime=0):
    """The header of a member in the old (V7) format."""
    block = bytearray(_TEMPLATE)
    name = name.encode("utf-8")
    block[:len(name)] = name
    block[124:136] = b"%011o\0" % size
    block[136:148] = b"%011o\0" % mtime
    block[148:156] = b"%07o\0" % sum(block)
    return bytes(block)


def padding(size):
    """The zeros that fill a member of that size up to a whole block."""
    return bytes(-size % BLOCK)


def small_member(name, data, mtime=0):
    """A whole small member."""
    return tar_header(name, len(data), mtime) + data + padding(len(data))


class Ids:
    """The ids of objects in archives: one counter for the whole life of xapi."""

    def __init__(self, first=1):
        self._counter = itertools.count(first)
        self._lock = threading.Lock()

    def next(self):
        with self._lock:
            return "Ref:%d" % next(self._counter)


class Metadata:
    """The objects that an export takes along, their new ids, and the ova.xml of them."""

    def __init__(self, world, ids, vms, preserve_power_state=False, with_snapshots=False,
                 excluded=(), version="1.20"):
        self.world = world
        self.db = world.db
        self.ids = ids
        self.preserve = preserve_power_state
        self.with_snapshots = with_snapshots
        self.excluded = excluded
        self.version = version
        self.table = {}
        self.classes = {cls: [] for cls in _ORDER}
        for vm in vms:
            self._add_vm(vm, with_snapshots)

    def _add(self, cls, ref):
        if ref in self.table or self.db.get(cls, ref) is None:
            return False
        self.table[ref] = self.ids.next()
        self.classes[cls].append(ref)
        return True

    def _add_vm(self, ref, with_snapshots):
        if not self._add("VM", ref):
            return
        vm = self.db.get("VM", ref)
        if "vif" not in self.excluded:
            for vif in vm["VIFs"]:
                self._add("VIF", vif)
                self._add("network", self.db.get("VIF", vif)["network"])
        if "vbd" not in self.excluded:
            for vbd in vm["VBDs"]:
                self._add("VBD", vbd)
                if not self.db.get("VBD", vbd)["empty"]:
                    self._add_vdi(self.db.get("VBD", vbd)["VDI"])
        if with_snapshots:
            for snapshot in vm["snapshots"]:
                self._add_vm(snapshot, False)
        if self.preserve and vm["power_state"] == "Suspended":
            self._add_vdi(vm["suspend_VDI"])
        self._add("VM_metrics", vm["metrics"])
        self._add("VM_guest_metrics", vm["guest_metrics"])
        self._add("host", vm["resident_on"])
        self._add("host", vm["affinity"])
        if with_snapshots:
            self._add_vm(vm["parent"], False)

    def _add_vdi(self, ref):
        if self._add("VDI", ref):
            self._add("SR", self.db.get("VDI", ref)["SR"])

    def disks(self):
        """(id, VDI reference) of the disks to stream, in the archive's order."""
        found = {}
        for vbd in self.classes["VBD"]:
            fields = self.db.get("VBD", vbd)
            if fields["type"] != "CD" and fields["VDI"] in self.table:
                sr = self.db.get("VDI", fields["VDI"])["SR"]
                if self.db.get("SR", sr)["content_type"] != "iso":
                    found[self.table[fields["VDI"]]] = fields["VDI"]
        ordered = sorted(found.items())
        suspended = [
            (self.table[self.db.get("VM", vm)["suspend_VDI"]], self.db.get("VM", vm)["suspend_VDI"])
            for vm in self.classes["VM"]
            if self.preserve and self.db.get("VM", vm)["suspend_VDI"] in self.table]
        return suspended + ordered

    def ova_xml(self):
        """The document."""
        version = xmlrpc.struct([(name, "<value>%s</value>" % value) for name, value in (
            ("hostname", "localhost"), ("date", "2026-02-01"), ("product_version", "8.3.0"),
            ("product_brand", "XCP-ng"), ("build_number", "cloud"),
            ("xapi_major", self.version.split(".")[0]), ("xapi_minor", self.version.split(".")[1]),
            ("export_vsn", "2"))])
        objects = []
        for cls in _ORDER:
            for ref in self.classes[cls]:
                fields = getattr(self, "_" + cls.lower(), self._plain)(
                    cls, dict(self.db.get(cls, ref)))
                objects.append(xmlrpc.struct([
                    ("class", "<value>%s</value>" % cls),
                    ("id", "<value>%s</value>" % self.table[ref]),
                    ("snapshot", xmlrpc.record(cls, fields))]))
        return xmlrpc.struct([("version", version), ("objects", xmlrpc.array(objects))]).encode(
            "utf-8")

    def _plain(self, cls, fields):
        """Every reference replaced by its id, or by none."""
        for name, kind in schema.TYPES[cls].items():
            if kind == "ref":
                fields[name] = self.table.get(fields[name], NULL)
            elif kind == "refs":
                fields[name] = [self.table[ref] for ref in fields[name] if ref in self.table]
        if "current_operations" in fields:
            fields.update(current_operations={}, allowed_operations=[])
        return fields

    def _vm(self, cls, fields):
        snapshots = list(fields["snapshots"])
        fields = self._plain(cls, fields)
        fields.update(consoles=[], crash_dumps=[], blobs={}, children=[], protection_policy=NULL)
        if not self.preserve:
            fields.update(power_state="Halted", suspend_VDI=NULL)
        if self.with_snapshots:
            fields["snapshots"] = snapshots
        else:
            fields.update(is_a_snapshot=False, snapshot_of=NULL, snapshots=[], parent=NULL,
                          snapshot_time=EPOCH, transportable_snapshot_id="")
        return fields

    def _vbd(self, cls, fields):
        fields = self._plain(cls, fields)
        if not self.preserve:
            fields["currently_attached"] = False
        return fields

    _vif = _vbd

    def _host(self, cls, fields):
        fields = self._plain(cls, fields)
        for name in ("license_params", "blobs", "external_auth_configuration", "logging",
                     "cpu_configuration", "other_config", "software_version"):
            fields[name] = {}
        for name in ("supported_bootloaders", "capabilities", "ha_statefiles", "ha_network_peers",
                     "tags"):
            fields[name] = []
        fields.update(external_auth_type="", external_auth_service_name="", sched_policy="")
        return fields


class DiskOptions:
    """How a disk is written into an archive; the defaults are those of a healthy xapi."""

    sha1 = False            # .checksum members with SHA-1, as before 2019
    all_chunks = False      # zero chunks are written too
    keepalive = ()          # chunks before which a zero-length member stands
    missing = ()            # chunks left out; -1 is the last one
    wrong_hash = ()         # chunks whose checksum member is wrong
    flip = {}               # chunk: offset of the byte in which a bit is flipped
    restart = None          # chunk after which the numbers start again at 0


def disk_members(identity, content, options):
    """The members of a disk, as a rising sequence of buffers."""
    suffix, function = (".checksum", disks.sha1) if options.sha1 else (".xxhash", disks.xxh64)
    last = content.chunks - 1
    missing = {last if index == -1 else index for index in options.missing}
    wrong = {last if index == -1 else index for index in options.wrong_hash}
    shift = 0
    tail = b""
    for index in _wanted(content, options.all_chunks):
        if index in missing:
            continue
        if index in options.keepalive:
            name = "%s/%08d" % (identity, index + shift)
            tail += tar_header(name, 0)
            tail += small_member(name + suffix, function(b"").encode("ascii"))
            shift += 1
        size = content.length(index)
        name = "%s/%08d" % (identity, index + shift)
        digest = content.hash(index, function)
        if index in wrong:
            digest = digest[::-1] if digest != digest[::-1] else "0" * len(digest)
        data = content.chunk(index)
        flip = options.flip.get(index, options.flip.get(-1) if index == last else None)
        if flip is not None:
            data = bytearray(data)
            data[flip % size] ^= 1
        yield tail + tar_header(name, size)
        yield data
        tail = padding(size) + small_member(name + suffix, digest.encode("ascii"))
        if index == options.restart:
            shift = -index - 1
    yield tail


def _wanted(content, everything):
    """The chunks that stand in an archive: the first, the last, and those that are not zeros."""
    if everything:
        return range(content.chunks)
    found = content.populated()
    if isinstance(found, range) and len(found) == content.chunks:
        return found
    return sorted(set(found) | {0, content.chunks - 1})


def ova_member(document):
    """The archive's first member."""
    return small_member("ova.xml", document, int(time.time()))


def raw(content):
    """The bytes of a disk, zeros included."""
    for index in range(content.chunks):
        if content.size:
            yield content.chunk(index)

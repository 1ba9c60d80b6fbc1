# SPDX-License-Identifier: GPL-3.0-or-later
"""The pool's database: complete records by class and reference, with what hangs on them.

Sets of references back (``VM.VBDs``, ``VDI.snapshots`` ...) follow the references by themselves.
Every record keeps its XML, so that ``get_all_records`` of thousands of VMs costs nothing twice.
"""

import bisect
import os
import threading
import time
from xml.sax.saxutils import quoteattr

from . import schema, xmlrpc
from .schema import NULL


def new_ref():
    """A fresh opaque reference."""
    return "OpaqueRef:%s" % new_uuid(os.urandom(16))


def new_uuid(data):
    """A uuid made of 16 bytes, as text."""
    digits = data.hex()
    return "%s-%s-4%s-a%s-%s" % (
        digits[:8], digits[8:12], digits[13:16], digits[17:20], digits[20:])


def now():
    """This moment, as XAPI writes dates."""
    return time.strftime("%Y%m%dT%H:%M:%SZ", time.gmtime())


class Database:
    """All records of the pool; every access holds ``lock``."""

    def __init__(self):
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)
        self.tables = {cls: {} for cls in schema.TYPES}
        self.contents = {}      # VDI reference: disks.Content
        self.no_snapshot = set()    # references of the SRs that cannot take snapshots
        self.destroyed = []     # what was ever destroyed: class, ref, record, time
        self._uuids = {cls: {} for cls in schema.TYPES}
        self._xml = {cls: {} for cls in schema.TYPES}
        self._changes = []      # (generation, class, ref), rising
        self._created = {}      # (class, ref): generation
        self.generation = 0

    def insert(self, cls, record=None, ref=None, **fields):
        """Add a record and return its reference; a uuid is made where none is given."""
        with self.lock:
            record = schema.new_record(cls, **fields) if record is None else record
            record["uuid"] = record["uuid"] or new_uuid(os.urandom(16))
            ref = ref or new_ref()
            self.tables[cls][ref] = record
            self._uuids[cls][record["uuid"]] = ref
            for (child, field), back in schema.RELATIONS.items():
                if child == cls:
                    self._link(back, record[field], ref)
            self._note(cls, ref)
            self._created[(cls, ref)] = self.generation
            return ref

    def load(self, tables):
        """Take over whole tables of records ({class: {ref: record}}), making the sets of
        references back anew."""
        with self.lock:
            for cls, rows in tables.items():
                self.tables[cls].update(rows)
                for ref, record in rows.items():
                    self._uuids[cls][record["uuid"]] = ref
                    self._note(cls, ref)
                    self._created[(cls, ref)] = self.generation
            for cls, field in schema.RELATIONS.values():
                for record in self.tables[cls].values():
                    record[field] = []
            for (cls, field), back in schema.RELATIONS.items():
                for ref, record in self.tables[cls].items():
                    self._link(back, record[field], ref)

    def set(self, cls, ref, field, value):
        """Change a field."""
        with self.lock:
            record = self.tables[cls][ref]
            back = schema.RELATIONS.get((cls, field))
            if back:
                self._unlink(back, record[field], ref)
            if field == "uuid":
                self._uuids[cls].pop(record["uuid"], None)
                self._uuids[cls][value] = ref
            record[field] = value
            if back:
                self._link(back, value, ref)
            self._note(cls, ref)

    def delete(self, cls, ref):
        """Remove a record; it stays in the list of what was destroyed."""
        with self.lock:
            record = self.tables[cls].pop(ref)
            self._uuids[cls].pop(record["uuid"], None)
            for (child, field), back in schema.RELATIONS.items():
                if child == cls:
                    self._unlink(back, record[field], ref)
            self.destroyed.append({"class": cls, "ref": ref, "record": dict(record),
                                   "time": time.time()})
            self.contents.pop(ref, None)
            self._note(cls, ref)

    def get(self, cls, ref):
        """The record, or None."""
        return self.tables[cls].get(ref)

    def by_uuid(self, cls, value):
        """The reference of the record with that uuid, or None."""
        return self._uuids[cls].get(value)

    def find(self, cls, name):
        """The reference of a record by reference, uuid or name_label; KeyError for none."""
        with self.lock:
            if name in self.tables[cls]:
                return name
            if name in self._uuids[cls]:
                return self._uuids[cls][name]
            for ref, record in self.tables[cls].items():
                if record.get("name_label") == name:
                    return ref
        raise KeyError("no %s %r" % (cls, name))

    def xml(self, cls, ref):
        """The record as an XML-RPC value."""
        cache = self._xml[cls]
        if ref not in cache:
            cache[ref] = xmlrpc.record(cls, self.tables[cls][ref])
        return cache[ref]

    def warm_up(self):
        """Encode all VMs, so that the first listing of a large pool is as fast as the others."""
        for ref in self.tables["VM"]:
            self.xml("VM", ref)

    def changes_since(self, generation, wanted):
        """What changed after a generation, as (generation, class, ref, operation), each once."""
        with self.lock:
            start = bisect.bisect_right(self._changes, (generation, "~", "~"))
            last = {}
            for number, cls, ref in self._changes[start:]:
                if wanted(cls, ref):
                    last.pop((cls, ref), None)
                    last[(cls, ref)] = number
            events = []
            for (cls, ref), number in last.items():
                created = self._created.get((cls, ref), 0) > generation
                if ref in self.tables[cls]:
                    events.append((number, cls, ref, "add" if created else "mod"))
                elif not created:
                    events.append((number, cls, ref, "del"))
            return events

    def dump(self):
        """The whole database in xapi's XML; sessions and tasks are never in it."""
        with self.lock:
            parts = ['<?xml version="1.0" encoding="UTF-8"?><database><manifest>'
                     '<pair key="schema_major_vsn" value="5"/>'
                     '<pair key="schema_minor_vsn" value="790"/>'
                     '<pair key="generation_count" value="%d"/></manifest>' % self.generation]
            for cls in sorted(self.tables):
                rows = self.tables[cls] if cls not in ("session", "task") else {}
                if not rows:
                    parts.append('<table name="%s"/>' % cls)
                    continue
                parts.append('<table name="%s">' % cls)
                for ref, record in rows.items():
                    parts.append(_dump_row(cls, ref, record, self._created[(cls, ref)]))
                parts.append("</table>")
            parts.append("</database>")
            return "".join(parts).encode("utf-8")

    def _note(self, cls, ref):
        self.generation += 1
        self._changes.append((self.generation, cls, ref))
        self._xml[cls].pop(ref, None)
        self.changed.notify_all()

    def _link(self, back, target, ref):
        cls, field = back
        record = self.tables[cls].get(target)
        if target != NULL and record is not None and ref not in record[field][-1:]:
            record[field].append(ref)
            self._note(cls, target)

    def _unlink(self, back, target, ref):
        cls, field = back
        record = self.tables[cls].get(target)
        if record is not None and ref in record[field]:
            record[field].remove(ref)
            self._note(cls, target)


def _dump_row(cls, ref, record, created):
    attributes = ['<row ref=%s __ctime="%d" __mtime="%d" _ref=%s' % (
        quoteattr(ref), created, created, quoteattr(ref))]
    for field, kind in schema.TYPES[cls].items():
        text = schema.to_db(kind, record[field])
        for plain, coded in (("%", "%%"), ("\n", "%n"), ("\r", "%r"), ("\t", "%t"), ("  ", "%_%_")):
            text = text.replace(plain, coded)
        attributes.append("%s=%s" % (schema.db_name(cls, field), quoteattr(text)))
    return " ".join(attributes) + "/>"

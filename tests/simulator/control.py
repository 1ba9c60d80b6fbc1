# SPDX-License-Identifier: GPL-3.0-or-later
"""The control interface: POST {"do": name, ...arguments} to its port, JSON comes back.

``client.py`` has a method for each name.
"""

import http.server
import json
import socketserver
import threading

from . import disks
from . import world as worlds
from .schema import TYPES
from .world import Builder


class Control:
    """What a test may ask; every public method is a name of the interface."""

    def __init__(self, simulator, builder):
        self._simulator = simulator
        self._builder = builder

    @property
    def _db(self):
        return self._simulator.db

    def load(self, description):
        builder = Builder(description)
        self._simulator.adopt(builder.build(), description.get("settings"))
        self._builder = builder
        self._simulator.change_faults(description.get("faults", ()))

    def fault(self, name, options):
        return self._simulator.add_fault(name, options)

    def clear_faults(self, name):
        self._simulator.faults.clear(name)

    def faults(self):
        return self._simulator.faults.describe()

    def setting(self, settings):
        self._simulator.change_settings(settings)

    def calls(self):
        return self._simulator.calls()

    def reset_calls(self):
        self._simulator.reset_calls()

    def records(self, cls):
        with self._db.lock:
            return {ref: dict(record) for ref, record in self._db.tables[cls].items()}

    def find(self, cls, name):
        return self._db.find(cls, name)

    def destroyed(self):
        with self._db.lock:
            return list(self._db.destroyed)

    def set(self, cls, name, field, value):
        ref = self._db.find(cls, name)
        if field not in TYPES[cls]:
            raise ValueError("%s has no field %s" % (cls, field))
        with self._db.lock:
            self._db.set(cls, ref, field, value)
            if cls == "VM" and field in ("power_state", "is_a_template", "blocked_operations"):
                self._simulator.world.refresh_operations(ref)

    def add_vm(self, vm):
        if self._builder is None:
            raise ValueError("only for a pool that was described")
        with self._db.lock:
            return self._builder.vm(vm)

    def delete_vm(self, name):
        self._simulator.add_fault("vm_deleted", {"target": name})

    def take_snapshot(self, vm, name):
        with self._db.lock:
            return worlds.take_snapshot(
                self._simulator.world, self._db.find("VM", vm), name)

    def set_content(self, vdi, content):
        ref = self._db.find("VDI", vdi)
        record = self._db.get("VDI", ref)
        self._db.contents[ref] = disks.content(content, record["virtual_size"], record["uuid"])

    def disk_sha256(self, vdi):
        return self._content(vdi).sha256()

    def disk_bytes_to(self, vdi, path):
        content = self._content(vdi)
        with open(path, "wb") as file:
            for index in content.populated():
                file.seek(index * disks.MIB)
                file.write(content.chunk(index))
            file.truncate(content.size)

    def connections(self):
        return sum(member.connections() for member in self._simulator.members)

    def attached(self):
        return dict(self._simulator.attached)

    def _content(self, vdi):
        with self._db.lock:
            return self._simulator.world.content(self._db.find("VDI", vdi))


class _Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
    daemon_threads = True
    request_queue_size = 64


def serve(simulator, builder, port=0):
    """Start to serve; returns the URL."""
    control = Control(simulator, builder)

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            try:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])).decode(
                    "utf-8"))
                name = request.pop("do")
                if name.startswith("_") or not hasattr(control, name):
                    raise ValueError("no such thing to do: %s" % name)
                status, answer = 200, getattr(control, name)(**request)
            except Exception as error:
                status, answer = 400, "%s: %s" % (type(error).__name__, error)
            body = json.dumps(answer).encode("utf-8")
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            """Nothing is logged."""

    server = _Server(("127.0.0.1", port), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return "http://127.0.0.1:%d" % server.server_port

#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-3.0-or-later
"""Compares vmbackup.py with what one would do by hand: python3 tests/tools/benchmark.py

Prints Markdown tables. Every figure is the median of rounds in which the commands of a table ran
one after the other, and every ratio the median of the ratios within a round, so that a machine
that is busy for a while slows all of them. "vmbackup / this" below 1 means that vmbackup needs
less. At the end stand the table of the README and the goals with what was measured.

The simulator of the tests serves the bytes; it sends chunks that it holds ready, as fast as Python
writes to a socket. It compresses slower than any client reads, so compressed exports come from a
plain server of the same bytes, made before. Exports of curl are of the same halted VM, without a
snapshot. vmbackup's figures are of the whole program: start, login, snapshot, export, proof, fsync,
metadata, destroying the snapshot. What is read from disk was read just before.

    python3 tests/tools/benchmark.py                            everything, an hour
    python3 tests/tools/benchmark.py --quick                    does it work? two minutes
    python3 tests/tools/benchmark.py --only previews,starts
    python3 tests/tools/benchmark.py --against OTHER/vmbackup.py
"""
import argparse
import collections
import contextlib
import datetime
import mmap
import os
import platform
import random
import re
import shutil
import socket
import ssl
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import urllib.parse
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.environment import ROOT, dotted, interpreters, prepare_tests, probe  # noqa: E402

MIB, GIB = 1 << 20, 1 << 30
SCRIPT = str(ROOT / "vmbackup.py")
Sample = collections.namedtuple("Sample", "wall cpu rss")  # seconds, seconds, MB

# A small process in between: a child's peak RSS counts that of the process it was forked from.
LAUNCHER = """
import os, sys, time
begin = time.time()
pid = os.fork()
if not pid:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.execvp(sys.argv[1], sys.argv[1:])
_, status, used = os.wait4(pid, 0)
print(status, time.time() - begin, used.ru_utime + used.ru_stime, used.ru_maxrss)
"""

# The limit of the network side: reads into one buffer and keeps nothing.
READER = """
import socket, ssl, sys
host, port, request = sys.argv[1:]
if port:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    sock = context.wrap_socket(socket.create_connection((host, int(port))))
else:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(host)
sock.sendall(request.encode())
buffer = bytearray(1 << 18)
while sock.recv_into(buffer):
    pass
"""

# The calls that a run made, none of which takes anything but the session, and nothing else.
SAME_CALLS = """
import sys, XenAPI
session = XenAPI.Session(sys.argv[1], ignore_ssl=True)
session.login_with_password("root", "secret", "1.0", "benchmark")
for method in sys.argv[2:]:
    session.xenapi_request(method, ())
session.xenapi.session.logout()
"""

COMPILE = 'compile(open("vmbackup.py").read(), "v", "exec")'

BY_HAND = """
for vm in $1; do
    curl -q -k -s -f -u root:secret "$2/export?uuid=$vm" | tee "$3/$vm.xva" | sha256sum
done
"""


def measure(command, good=(0,)):
    """The Sample of one command, its children included; one that fails ends the benchmark. It runs
    in the folder of vmbackup.py."""
    launch = [sys.executable, "-I", "-S", "-c", LAUNCHER] + [str(word) for word in command]
    done = subprocess.run(launch, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=True,
                          cwd=str(ROOT))
    status, wall, cpu, rss = done.stdout.decode().split()
    if int(status) >> 8 not in good or int(status) & 255:
        sys.exit("wait status %s of: %s" % (status, " ".join(launch[5:])))
    return Sample(float(wall), float(cpu), int(rss) * 1024 / 1e6)


class Race:
    """Commands that run side by side, round by round. clean() comes after each command."""

    def __init__(self, rounds, clean=lambda: None):
        self._rounds, self._clean = rounds, clean
        self._commands, self.samples = collections.OrderedDict(), {}

    def add(self, label, *command):
        self._commands[label] = command

    def run(self):
        self.samples = {label: [] for label in self._commands}
        for _ in range(self._rounds):
            for label, command in self._commands.items():
                self.samples[label].append(measure(command))
                self._clean()
        return self

    def median(self, label, field):
        return statistics.median(getattr(sample, field) for sample in self.samples[label])

    def ratio(self, one, other, field):
        pairs = zip(self.samples[one], self.samples[other])
        return statistics.median(getattr(a, field) / max(getattr(b, field), 1e-3)
                                 for a, b in pairs)

    def table(self, title, size=None):
        """Markdown; the first command is the one that the others are compared with. size: bytes of
        the disk, for the figures per GiB; without it they are in all."""
        scale = GIB / size if size else 1
        head = ["", "wall s", "CPU s/GiB" if size else "CPU s", "peak RSS MB"]
        first = next(iter(self._commands))
        if len(self._commands) > 1:
            head += ["%s / this: wall" % first, "CPU"]
        rows = []
        for label in self._commands:
            row = [label, "%.2f" % self.median(label, "wall"),
                   "%.2f" % (self.median(label, "cpu") * scale),
                   "%.0f" % self.median(label, "rss")]
            if label != first:
                row += ["%.2f" % self.ratio(first, label, field) for field in ("wall", "cpu")]
            rows.append(row)
        return markdown(title, head, rows)


def own_waits(calls):
    """(looks at a task again, attempts again to destroy a disk) in a list of calls: each came after
    a pause that the program made by itself."""
    seen, looks, again = set(), 0, 0
    for call in calls:
        if call["method"] == "task.get_record":
            looks += call["args"][-1] in seen
            seen.add(call["args"][-1])
        again += call["outcome"] in ("VDI_IN_USE", "OTHER_OPERATION_IN_PROGRESS")
    return looks, again


def markdown(title, head, rows):
    width = len(head)
    lines = [head, ["---"] + ["---:"] * (width - 1)]
    lines += [row + [""] * (width - len(row)) for row in rows]
    return "**%s**\n\n%s\n" % (title, "\n".join("| %s |" % " | ".join(line) for line in lines))


class PlainServer:
    """Serves one file as the body of every /export, and passes all else on to the simulator."""

    def __init__(self, sim, path, folder):
        from simulator import certificates

        self._sim = sim
        self._file = open(str(path), "rb")  # noqa: SIM115 - closed in close()
        self._body = memoryview(mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ))
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(*certificates.make(str(folder), "plain", "127.0.0.1"))
        self._listener = socket.socket()
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen(16)
        self.url = "https://127.0.0.1:%d" % self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                sock = self._listener.accept()[0]
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock):
        with contextlib.suppress(OSError), self._context.wrap_socket(sock, server_side=True) as tls:
            head = tls.recv(65536)
            if head.startswith(b"GET /export?"):
                self._export(tls, head.split()[1].decode())
            elif head:
                self._pass_on(tls, head)

    def _export(self, tls, target):
        tls.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
        for at in range(0, len(self._body), MIB):
            tls.sendall(self._body[at : at + MIB])
        task = urllib.parse.parse_qs(target).get("task_id")
        if task:
            self._sim.set("task", task[0], "status", "success")
        tls.unwrap()

    def _pass_on(self, tls, head):
        url = urllib.parse.urlsplit(self._sim.http)
        with socket.create_connection((url.hostname, url.port)) as onward:
            onward.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            onward.sendall(head)
            back = threading.Thread(target=self._copy, args=(onward, tls), daemon=True)
            back.start()
            self._copy(tls, onward, self._rename)
            back.join()

    def _rename(self, data):
        """Gives a new snapshot's disk the uuid of the disk that the file was made of: vmbackup
        looks for it in there."""
        if b"VM.add_to_other_config" in data:
            vdis = self._sim.records("VDI")
            for ref, vdi in vdis.items():
                if vdi["is_a_snapshot"]:
                    self._sim.set("VDI", ref, "uuid", vdis[vdi["snapshot_of"]]["uuid"])

    @staticmethod
    def _copy(source, target, look=lambda data: None):
        with contextlib.suppress(OSError):
            for data in iter(lambda: source.recv(65536), b""):
                look(data)
                target.sendall(data)
        with contextlib.suppress(OSError):
            socket.socket.shutdown(target, socket.SHUT_RDWR)

    def close(self):
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._body.release()
        self._file.close()


class Benchmark:
    """The parts of the benchmark; each yields Markdown."""

    def __init__(self, options, pythons, folder):
        self.options, self.pythons, self.folder = options, pythons, folder
        self.newest = list(pythons)[-1]
        self.backups = folder / "backups"
        self.file = folder / "by-hand.xva"
        self.exports, self.goals = [], []  # rows of the tables at the end

    @property
    def middle(self):
        """MiB of the disk for what is not measured at every size: 2 GiB."""
        return self.options.sizes[min(1, len(self.options.sizes) - 1)]

    def goal(self, what, sign, bound, measured, form="%.2f"):
        """Notes a figure and what it has to be."""
        met = measured <= bound if sign == "at most" else measured >= bound
        self.goals.append([what, "%s %s" % (sign, form % bound), form % measured,
                           "yes" if met else "**no**"])

    def export(self, label, race, size):
        """A row of the README's table."""
        others = ("curl -o", "curl -o, then sync", "curl \\| openssl sha256, no file",
                  "curl \\| tee \\| sha256sum")
        self.exports.append([label, "%.2f" % race.median("vmbackup", "wall"),
                             "%.2f" % (race.median("vmbackup", "cpu") * GIB / size),
                             "%.0f" % race.median("vmbackup", "rss")] + [
            "%.2f" % race.ratio("vmbackup", other, "wall") if other in race.samples else ""
            for other in others])

    def clean(self):
        shutil.rmtree(str(self.backups), ignore_errors=True)
        self.backups.mkdir()
        with contextlib.suppress(FileNotFoundError):
            self.file.unlink()

    def vmbackup(self, version, url, *words, password="secret", script=SCRIPT):
        """A command line for all VMs at url."""
        return [self.pythons[version], script, password, ".*", "host=" + url,
                "backup_dir=%s" % self.backups] + list(words)

    def start(self, *disks, **options):
        from simulator.client import Simulator
        from simulator.pool import Pool

        pool = Pool()
        for number, disk in enumerate(disks):
            pool.vm("vm%d" % number, disks=[disk])
        return Simulator.start(pool, **options)

    def downloads(self, race, url, target, unix=None, compress="", bounds=False):
        """Adds what one would do by hand to a Race: curl, and what bounds it if asked."""
        curl = "curl -q -k -s -f -u root:secret"
        if unix:
            curl += " --unix-socket " + unix
            host, port = unix, ""
        else:
            parts = urllib.parse.urlsplit(url)
            host, port = parts.hostname, str(parts.port)
        race.add("curl -o", *(curl.split() + ["-o", self.file, url + target]))
        race.add("curl \\| tee \\| sha256sum", "sh", "-c",
                 curl + ' "$1" | tee "$2" | sha256sum', "-", url + target, self.file)
        if compress:
            race.add("curl -o, then %s -t" % compress, "sh", "-c",
                     curl + ' -o "$2" "$1" && %s -qt "$2"' % compress, "-", url + target, self.file)
            return
        # What is on disk for sure, and what is only hashed: together they are vmbackup's job.
        race.add("curl -o, then sync", "sh", "-c", curl + ' -o "$2" "$1" && sync "$2"', "-",
                 url + target, self.file)
        race.add("curl \\| openssl sha256, no file", "sh", "-c",
                 curl + ' "$1" | openssl dgst -sha256', "-", url + target)
        if not bounds:
            return
        kept = self.folder / "kept.xva"
        measure(curl.split() + ["-o", kept, url + target])
        race.add("cp file to file", "cp", kept, self.file)
        basic = "Authorization: Basic cm9vdDpzZWNyZXQ="  # root:secret
        request = "GET %s HTTP/1.0\r\n%s\r\n\r\n" % (target, basic)
        race.add("socket reader to /dev/null", self.pythons[self.newest], "-I", "-S", "-c", READER,
                 host, port, request)

    def streams(self):
        """HTTPS at every size, and the unix socket; the lowest and the newest Python."""
        from simulator.pool import disk

        yield "### Streams\n"
        for size in self.options.sizes:
            with self.start(disk(size * MIB, seed=1)) as sim:
                target = "/export?uuid=" + sim.record("VM", "vm0")["uuid"]
                for transport in ("HTTPS", "unix socket")[: 1 + (size == self.middle)]:
                    race = Race(self.options.rounds, self.clean)
                    unix = sim.socket if transport == "unix socket" else None
                    for version in reversed(list(self.pythons)):
                        label = "vmbackup" if version == self.newest else "vmbackup, Python %s"
                        label = label.replace("%s", dotted(version))
                        race.add(label, *self.vmbackup(
                            version, unix or sim.url, password="local" if unix else "secret"))
                    self.downloads(race, "http://localhost" if unix else sim.url, target, unix,
                                   bounds=size == self.middle)
                    yield race.run().table(
                        "%s, disk of %d MiB, vmbackup under Python %s" % (
                            transport, size, dotted(self.newest)), size * MIB)
                    self.export("%s, %s" % (transport, size_of(size)), race, size * MIB)
                    if not unix:
                        self._stream_goals(race, size)
        with contextlib.suppress(FileNotFoundError):
            (self.folder / "kept.xva").unlink()

    def _stream_goals(self, race, size):
        what = "HTTPS, %s: " % size_of(size)
        if size == self.middle:
            openssl, tee = "curl \\| openssl sha256, no file", "curl \\| tee \\| sha256sum"
            self.goal(what + "wall / `curl \\| openssl sha256`", "at most", 1.10,
                      race.ratio("vmbackup", openssl, "wall"))
            for field, bound in (("wall", 0.43), ("cpu", 0.40)):
                self.goal(what + "%s / `curl \\| tee \\| sha256sum`" % field, "at most", bound,
                          race.ratio("vmbackup", tee, field))
            self.goal(what + "CPU s/GiB", "at most", 2.2,
                      race.median("vmbackup", "cpu") * GIB / (size * MIB))
        self.goal(what + "peak RSS MB", "at most", 50, race.median("vmbackup", "rss"), "%.0f")

    def compressed(self):
        """gzip and zstd, from the plain server."""
        from simulator.pool import disk

        yield "### Compressed by the host (plain server of the same bytes)\n"
        size = self.middle * MIB
        image = self.folder / "disk.img"
        write_like_a_system(image, size)
        for compress in ("gzip", "zstd"):
            with self.start(disk(size, content={"file": str(image)})) as sim:
                target = "/export?uuid=%s&use_compression=%s" % (
                    sim.record("VM", "vm0")["uuid"], {"gzip": "true"}.get(compress, compress))
                body = self.folder / "body"
                measure(["curl", "-q", "-k", "-s", "-f", "-u", "root:secret", "-o", body,
                         sim.url + target])
                server = PlainServer(sim, body, self.folder)
                race = Race(self.options.rounds, self.clean)
                words = ["compress=" + compress, "space_check=False"]
                race.add("vmbackup", *self.vmbackup(self.newest, server.url, *words))
                self.downloads(race, server.url, target, compress=compress)
                race.run()
                server.close()
                yield race.table("%s over HTTPS, disk of %d MiB, %d MiB compressed" % (
                    compress, size // MIB, body.stat().st_size // MIB), size)
                self.export("%s, %s by the host" % (size_of(size // MIB), compress), race, size)
        image.unlink()
        body.unlink()

    def sparse(self):
        """Disks that are mostly zeros: XAPI leaves them out of an XVA, not out of a raw disk."""
        from simulator.pool import disk

        yield "### Sparse disks\n"
        size = self.options.sizes[-1]
        with self.start(disk(size * MIB, seed=1, sparse=list(range(0, size, 16)))) as sim:
            race = Race(self.options.rounds, self.clean)
            race.add("vmbackup", *self.vmbackup(self.newest, sim.url))
            self.downloads(race, sim.url, "/export?uuid=" + sim.record("VM", "vm0")["uuid"])
            yield race.run().table("HTTPS, disk of %d MiB, one MiB in 16 in use" % size)

    def shelf(self):
        """verify and extract of a backup."""
        from simulator.pool import disk

        yield "### verify and extract\n"
        size = self.middle
        with self.start(disk(size * MIB, seed=1)) as sim:
            measure(self.vmbackup(self.newest, sim.url))
        folder = next(self.backups.glob("vm0/backup-*"))
        export, to = folder / "vm0.xva", self.folder / "extracted"
        python = self.pythons[self.newest]

        def warm():
            shutil.rmtree(str(to), ignore_errors=True)
            to.mkdir()
            measure(["cat", export])

        warm()
        race = Race(self.options.rounds, warm)
        race.add("verify", python, SCRIPT, "verify", folder)
        race.add("sha256sum -c", "sh", "-c", 'cd "$1" && sha256sum -c --quiet SHA256SUMS', "-",
                 folder)
        yield race.run().table("verify of an XVA of %s" % size_of(size), size * MIB)
        self.goal("verify: wall / `sha256sum -c`", "at most", 1.0,
                  race.ratio("verify", "sha256sum -c", "wall"))
        race = Race(self.options.rounds, warm)
        race.add("extract", python, SCRIPT, "extract", folder, "to=%s" % to)
        tar = 'tar xOf "$1" | cat > "$2"'
        race.add("tar xOf \\| cat", "sh", "-c", tar, "-", export, to / "image")
        race.add("tar xOf \\| cat, then sync", "sh", "-c", tar + ' && sync "$2"', "-", export,
                 to / "image")
        yield race.run().table("extract of an XVA of %s" % size_of(size), size * MIB)
        self.goal("extract: wall / `tar xOf \\| cat`", "at most", 1.2,
                  race.ratio("extract", "tar xOf \\| cat", "wall"))
        shutil.rmtree(str(to))
        self.clean()

    def restore(self):
        """restore of a backup."""
        from simulator.client import Simulator
        from simulator.pool import Pool, disk

        yield "### restore\n"
        size, pool = self.middle, Pool()
        pool.vm("vm0", disks=[disk(size * MIB, seed=1)])
        with Simulator.start(pool) as sim:
            measure(self.vmbackup(self.newest, sim.url))
            folder = next(self.backups.glob("vm0/backup-*"))
            export = folder / "vm0.xva"

            def undo():
                sim.load(pool)  # the pool as it was: nothing that was restored
                measure(["cat", export])

            undo()
            race = Race(self.options.rounds, undo)
            for version in reversed(list(self.pythons)):
                label = "restore" if version == self.newest else "restore, Python %s"
                race.add(label.replace("%s", dotted(version)), self.pythons[version], SCRIPT,
                         "restore", "secret", folder, "host=" + sim.url)
            curl = 'curl -q -k -s -f -u root:secret -H Expect: -T "$1" "$2"'
            upload = ["-", export, sim.url + "/import"]
            race.add("curl -T", "sh", "-c", curl, *upload)
            race.add("sha256sum, then curl -T", "sh", "-c", 'sha256sum "$1" && ' + curl, *upload)
            yield race.run().table("restore of an XVA of %s over HTTPS" % size_of(size), size * MIB)
            sim.load(Pool())
        self.goal("restore: wall / `curl -T`", "at most", 1.3,
                  race.ratio("restore", "curl -T", "wall"))
        self.goal("restore: wall / `sha256sum`, then `curl -T`", "at most", 1.0,
                  race.ratio("restore", "sha256sum, then curl -T", "wall"))
        self.goal("restore: peak RSS MB", "at most", 50, race.median("restore", "rss"), "%.0f")
        self.clean()

    def previews(self):
        """preview against a script that makes the same calls."""
        from simulator.client import Simulator

        yield "### preview\n"
        rows = []
        for count in self.options.vms:
            with Simulator.start(arguments=["--vms", str(count)]) as sim:
                words = self.vmbackup(self.newest, sim.url, "preview", "space_check=False")
                sample, calls = measure(words), sim.calls()
                if any(len(call["args"]) > 1 for call in calls[1:]):
                    sys.exit("preview makes calls that the script cannot make")
                race = Race(self.options.rounds)
                race.add("vmbackup", *words)
                race.add("bare", self.pythons[self.newest], "-c", SAME_CALLS, sim.url,
                         *[call["method"] for call in calls[1:-1]])
                race.run()
                rows.append(["%d VMs" % count] + [
                    "%.2f" % race.median(label, field)
                    for field in ("wall", "cpu") for label in ("vmbackup", "bare")] + [
                    "%.2f" % race.ratio("vmbackup", "bare", field) for field in ("wall", "cpu")] + [
                    "%.0f" % sample.rss, str(len(calls))])
                if count in (1000, 10000) or self.options.quick:
                    self.goal("preview of %d VMs: wall / the same calls" % count, "at most",
                              1.15 if count > 1000 else 1.3,
                              race.ratio("vmbackup", "bare", "wall"))
        yield markdown(
            "preview of all VMs, against a script that makes the same calls by XenAPI",
            ["pool", "wall s", "script", "CPU s", "script", "wall ratio", "CPU ratio",
             "peak RSS MB", "calls"], rows)

    def tiny(self):
        """The fixed cost of a backup."""
        from simulator.pool import disk

        yield "### Many tiny VMs\n"
        count = 5 if self.options.quick else 50
        with self.start(*[disk(MIB, seed=1)] * count) as sim:
            race = Race(self.options.rounds, self.clean)
            race.add("vmbackup", *self.vmbackup(self.newest, sim.url))
            race.add("vmbackup parallel=4", *self.vmbackup(self.newest, sim.url, "parallel=4"))
            uuids = " ".join(vm["uuid"] for vm in sim.records("VM").values()
                             if vm["name_label"].startswith("vm"))
            race.add("curl \\| tee \\| sha256sum, no snapshot, no metadata", "sh", "-c", BY_HAND,
                     "-", uuids, sim.url, self.backups)
            yield race.run().table("%d VMs with a disk of 1 MiB each, in all" % count)

    def far(self):
        """The same at a host that takes its time for each call: what counts is how many there
        are."""
        from simulator.pool import disk

        yield "### A far host\n"
        count, delay, logs = self.options.far, 0.01, []
        with self.start(*[disk(MIB, seed=1)] * count) as sim:
            def keep_log():
                logs.append(sim.calls())
                sim.reset_calls()
                self.clean()

            sim.setting(delay_ms=delay * 1000)
            race = Race(self.options.rounds, keep_log)
            for parallel in (1, 4):
                race.add("parallel=%d" % parallel, *self.vmbackup(
                    self.newest, sim.url, "parallel=%d" % parallel))
            race.run()
        rows, ratio = [], {}
        for number, label in enumerate(race.samples):
            mine = logs[number::2]
            ratio[label] = statistics.median(
                sample.wall / (len(log) * delay) for sample, log in zip(race.samples[label], mine))
            looks, again = zip(*map(own_waits, mine))
            rows.append([label, "%.2f" % race.median(label, "wall"),
                         "%.2f" % race.median(label, "cpu"), "%d" % len(mine[-1]),
                         "%.1f" % (len(mine[-1]) / count), "%.2f" % ratio[label],
                         "%d" % statistics.median(looks), "%d" % statistics.median(again)])
        yield markdown(
            "%d VMs with a disk of 1 MiB each, every call %d ms" % (count, delay * 1000),
            ["", "wall s", "CPU s", "calls", "for each VM", "wall / (calls x delay)",
             "looks at a task again", "VDI_IN_USE"], rows)
        self.goal("%d small VMs: wall / (calls x delay)" % count, "at most", 1.3,
                  ratio["parallel=1"])
        self.goal("%d small VMs: parallel=4 faster by" % count, "at least", 3.5,
                  race.ratio("parallel=1", "parallel=4", "wall"))

    def parallel(self):
        """parallel=4 under a rate for each stream, and its memory at full speed."""
        from simulator.pool import disk

        yield "### parallel=4\n"
        size = self.options.sizes[0] * MIB
        with self.start(*[disk(size, seed=1)] * 4) as sim:
            for rate in (size // (1 if self.options.quick else 8), None):
                if rate:
                    sim.fault("export_rate", bytes=rate)
                race = Race(self.options.rounds, self.clean)
                race.add("parallel=4", *self.vmbackup(self.newest, sim.url, "parallel=4"))
                race.add("parallel=1", *self.vmbackup(self.newest, sim.url))
                at = "%d MiB/s for each stream" % (rate // MIB) if rate else "full speed"
                yield race.run().table("4 VMs of %d MiB, %s" % (size // MIB, at), 4 * size)
                self.goal("parallel=4, %s: peak RSS MB" % at, "at most", 70,
                          race.median("parallel=4", "rss"), "%.0f")
                sim.clear_faults()

    def starts(self):
        """What the start costs before anything is done: Python compiles a script each time."""
        yield "### Start\n"
        for version, python in self.pythons.items():
            race = Race(max(self.options.rounds, 1 if self.options.quick else 9))
            race.add("vmbackup.py help", python, SCRIPT, "help")
            race.add("compile(vmbackup.py)", python, "-c", COMPILE)
            race.add("import requests, XenAPI", python, "-c", "import requests, XenAPI")
            race.add("python -c pass", python, "-c", "pass")
            yield race.run().table("Python %s" % dotted(version))
            self.goal("help, Python %s: wall / compile(vmbackup.py)" % dotted(version), "at most",
                      1.5, race.ratio("vmbackup.py help", "compile(vmbackup.py)", "wall"))

    def folders(self):
        """list and check of many backups."""
        from simulator.pool import disk

        yield "### list and check\n"
        vms, each = self.options.folders, 10
        with self.start(disk(MIB, seed=1)) as sim:
            measure(self.vmbackup(self.newest, sim.url))
        made = next(self.backups.glob("vm0/backup-*"))
        tree = self.folder / "shelf"
        multiply(made, tree, vms, each)
        config, python = self.folder / "shelf.cfg", self.pythons[self.newest]
        config.write_text("backup_dir=%s\nvm-export=.*\n" % tree)
        count = vms * each
        commands = collections.OrderedDict([
            ("list FOLDER", [python, SCRIPT, "list", tree]),
            ("list CONFIG-FILE json", [python, SCRIPT, "list", config, "json"]),
            ("check FOLDER", [python, SCRIPT, "check", tree]),
            ("check CONFIG-FILE", [python, SCRIPT, "check", config]),
            ("find -size +0 (for comparison)", ["find", tree, "-size", "+0"])])
        race = Race(self.options.rounds)
        for label, command in commands.items():
            race.add(label, *command)
        race.run()
        begin = {label: self.system_calls(command) for label, command in commands.items()}
        rows = []
        shutil.rmtree(str(tree))
        multiply(made, tree, 1, 1)
        for label, command in commands.items():
            calls = self.system_calls(command)
            rows.append([label] + ["%.2f" % race.median(label, field) for field in ("wall", "cpu")]
                        + ["%.0f" % (race.median(label, "wall") / count * 1e6),
                           "%.1f" % ((begin[label] - calls) / max(count - 1, 1)) if calls else "",
                           "%.0f" % race.median(label, "rss")])
            if label in ("list FOLDER", "check FOLDER"):
                self.goal("%s, %d backups: wall s" % (label, count), "at most", 2.0,
                          race.median(label, "wall"))
        yield markdown("%d VMs with %d backups each" % (vms, each),
                       ["", "wall s", "CPU s", "us for each backup",
                        "system calls for each backup", "peak RSS MB"], rows)
        shutil.rmtree(str(tree))
        self.clean()

    def system_calls(self, command):
        """How many a command makes, its threads and children included; 0 without strace."""
        if not shutil.which("strace"):
            return 0
        told = self.folder / "strace"
        measure(["strace", "-f", "-c", "-o", told] + command)
        total = re.search(r"^100\.00 .*? (\d+) +(?:\d+ +)?total$", told.read_text(), re.M)
        return int(total.group(1))

    def against(self):
        """This vmbackup.py and another, in the same rounds."""
        from simulator.pool import disk

        yield "### Against %s\n" % self.options.against
        size = self.middle
        with self.start(disk(size * MIB, seed=1)) as sim:
            for version in reversed(list(self.pythons)):
                race = Race(self.options.rounds, self.clean)
                race.add("vmbackup", *self.vmbackup(version, sim.url))
                race.add("the other", *self.vmbackup(version, sim.url,
                                                     script=self.options.against))
                yield race.run().table("HTTPS, disk of %s, Python %s" % (
                    size_of(size), dotted(version)), size * MIB)
                self.goal("CPU / the other's, Python %s" % dotted(version), "at most", 1.05,
                          race.ratio("vmbackup", "the other", "cpu"))

    def summary(self):
        """The README's table, and how far the goals are met."""
        if self.exports:
            yield markdown("The README's table", [
                "export", "wall s", "CPU s/GiB", "peak RSS MB", "/ `curl -o`",
                "/ `curl -o`, then `sync`", "/ `curl \\| openssl sha256`, no file",
                "/ `curl \\| tee \\| sha256sum`"], self.exports)
        if self.goals:
            yield markdown("Goals", ["", "goal", "measured", "met"], self.goals)


PARTS = ("streams", "compressed", "sparse", "shelf", "restore", "previews", "tiny", "far",
         "parallel", "starts", "folders")


def size_of(size):
    """MiB in words."""
    return "%d GiB" % (size // 1024) if size >= 1024 else "%d MiB" % size


def multiply(backup, tree, vms, each):
    """Fills the folder `tree` as if so many VMs had so many backups, of the days up to an hour ago,
    each with the small files of one that was made: `backup`. Of the export there is a byte."""
    files = {path.relative_to(backup): path.read_bytes() for path in backup.rglob("*.*")
             if path.is_file() and path.suffix != ".xva"}
    moment = datetime.datetime.now() - datetime.timedelta(hours=1)
    for number in range(vms):
        vm = "vm%d" % number
        for day in range(each):
            then = moment - datetime.timedelta(days=day)
            folder = tree / vm / then.strftime("backup-%Y-%m-%d-(%H:%M:%S)")
            folder.mkdir(parents=True)
            for path, data in files.items():
                (folder / path).parent.mkdir(exist_ok=True)
                (folder / path).write_bytes(data.replace(b"vm0", vm.encode()))
            (folder / (vm + ".xva")).write_bytes(b"x")
            (folder / "SHA256SUMS").write_bytes(b"0" * 64)
            (folder / "success").write_text("created=%d\n" % then.timestamp())


def write_like_a_system(path, size):
    """A disk that compresses as a system's does: source text and random bytes by turns."""
    library = Path(sysconfig.get_paths()["stdlib"])
    text = b"".join(item.read_bytes() for item in sorted(library.glob("*.py")))
    noise = random.Random(1)  # noqa: S311
    with open(str(path), "wb") as file:
        for number in range(size // MIB):
            at = number * 4099 % (len(text) - MIB)
            block = noise.getrandbits(8 * MIB).to_bytes(MIB, "little")
            file.write(text[at : at + MIB] if number % 2 else block)


def machine():
    """What the figures depend on, in a line."""
    cpuinfo = Path("/proc/cpuinfo").read_text()
    model = next((line.split(":", 1)[1].strip() for line in cpuinfo.splitlines()
                  if line.startswith("model name")), platform.machine())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    curl = subprocess.run(["curl", "--version"], stdout=subprocess.PIPE).stdout.decode().split()[1]
    return "%d cores of %s, %.0f GiB, Linux %s, curl %s, all over loopback" % (
        os.cpu_count(), model, memory, platform.release().split("-")[0], curl)


def numbers(text):
    return [int(item) for item in text.split(",")]


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true",
                        help="small, few and once: to see whether it works")
    parser.add_argument("--rounds", type=int, help="runs of each command (5; quick: 1)")
    parser.add_argument("--sizes", type=numbers, metavar="MiB,...",
                        help="disks (256,2048,8192; quick: 16,32)")
    parser.add_argument("--vms", type=numbers, metavar="N,...",
                        help="pools for preview (10,100,1000,10000; quick: 10,100)")
    parser.add_argument("--far", type=int, metavar="N",
                        help="VMs at a host that is far away (200; quick: 3)")
    parser.add_argument("--folders", type=int, metavar="N",
                        help="VMs with 10 backups each, for list and check (1000; quick: 5)")
    parser.add_argument("--against", metavar="FILE",
                        help="compare with another vmbackup.py; alone unless --only says more")
    parser.add_argument("--only", metavar="PART,...", help="some of: %s" % ", ".join(PARTS))
    parser.add_argument("--python", metavar="FILE,...",
                        help="Pythons that have the packages (environments that are made for it)")
    parser.add_argument("--folder", default="/var/tmp",  # noqa: S108
                        help="where to write: a disk, with room for two of the largest (%(default)s)")  # noqa: E501
    parser.add_argument("--output", metavar="FILE", help="write the tables there")
    options = parser.parse_args()
    parts = ["against"] if options.against else []
    if options.only or not parts:
        parts += (options.only or ",".join(PARTS)).split(",")
    if set(parts) - set(PARTS) - {"against"}:
        parser.error("--only takes: %s" % ", ".join(PARTS))
    quick = options.quick
    options.rounds = options.rounds or (1 if quick else 5)
    options.sizes = options.sizes or ([16, 32] if quick else [256, 2048, 8192])
    options.vms = options.vms or ([10, 100] if quick else [10, 100, 1000, 10000])
    options.far = options.far or (3 if quick else 200)
    options.folders = options.folders or (5 if quick else 1000)
    options.against = options.against and os.path.abspath(options.against)

    if options.python:
        pythons = {probe(path).version: path for path in options.python.split(",")}
    else:
        found = interpreters()
        chosen = [max(found)] if quick else {min(found), max(found)}
        pythons = {version: prepare_tests(found[version]) for version in chosen}
    pythons = collections.OrderedDict(sorted(pythons.items()))
    sys.executable = pythons[max(pythons)]  # which starts the simulator: it has the packages
    folder = Path(tempfile.mkdtemp(prefix="vmbackup-benchmark-", dir=options.folder))
    output = open(options.output, "w", encoding="utf-8") if options.output else sys.stdout  # noqa: SIM115
    begin = time.monotonic()
    try:
        print("%s, `%s`, median of %d rounds\n\n%s; Python %s\n" % (
            datetime.date.today(), " ".join(["python3", "tests/tools/benchmark.py"] + sys.argv[1:]),
            options.rounds, machine(), ", ".join(map(dotted, pythons))), file=output, flush=True)
        benchmark = Benchmark(options, pythons, folder)
        benchmark.clean()
        for part in parts + ["summary"]:
            for text in getattr(benchmark, part)():
                print(text, file=output, flush=True)
        print("(all of this took %d s)" % (time.monotonic() - begin), file=output, flush=True)
    finally:
        shutil.rmtree(str(folder))
        if options.output:
            output.close()


if __name__ == "__main__":
    main()

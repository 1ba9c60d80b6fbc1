#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-3.0-or-later
"""Compares vmbackup.py with what one would do by hand: python3 tests/tools/benchmark.py

Prints Markdown tables. Every figure is the median of rounds in which the commands of a table ran
one after the other, and every ratio the median of the ratios within a round, so that a machine
that is busy for a while slows all of them. "vmbackup / this" below 1 means that vmbackup needs
less.

The simulator of the tests serves the bytes; it sends chunks that it holds ready, as fast as Python
writes to a socket. It compresses slower than any client reads, so compressed exports come from a
plain server of the same bytes, made before. Exports of curl are of the same halted VM, without a
snapshot. vmbackup's figures are of the whole program: start, login, snapshot, export, proof, fsync,
metadata, destroying the snapshot.
"""
import argparse
import collections
import contextlib
import datetime
import mmap
import os
import platform
import random
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

from tools.environment import ROOT, dotted, interpreters, prepare_tests  # noqa: E402

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

# The calls that a preview of many VMs cannot do without.
BARE_CALLS = """
import sys, XenAPI
session = XenAPI.Session(sys.argv[1], ignore_ssl=True)
session.login_with_password("root", "secret", "1.0", "benchmark")
session.xenapi.pool.get_all_records()
session.xenapi.VM.get_all_records_where('field "is_a_template"="false" and '
    'field "is_a_snapshot"="false" and field "is_control_domain"="false"')
session.xenapi.VBD.get_all_records()
session.xenapi.VDI.get_all_records()
session.xenapi.PBD.get_all_records()
session.xenapi.session.logout()
"""

BY_HAND = """
for vm in $1; do
    curl -q -k -s -f -u root:secret "$2/export?uuid=$vm" | tee "$3/$vm.xva" | sha256sum
done
"""


def measure(command, good=(0,)):
    """The Sample of one command, its children included; one that fails ends the benchmark."""
    launch = [sys.executable, "-I", "-S", "-c", LAUNCHER] + [str(word) for word in command]
    done = subprocess.run(launch, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=True)
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

    def clean(self):
        shutil.rmtree(str(self.backups), ignore_errors=True)
        self.backups.mkdir()
        with contextlib.suppress(FileNotFoundError):
            self.file.unlink()

    def vmbackup(self, version, url, *words, password="secret"):
        """A command line for all VMs at url."""
        return [self.pythons[version], SCRIPT, password, ".*", "host=" + url,
                "backup_dir=%s" % self.backups] + list(words)

    def start(self, *disks, **options):
        from simulator.client import Simulator
        from simulator.pool import Pool

        pool = Pool()
        for number, disk in enumerate(disks):
            pool.vm("vm%d" % number, disks=[disk])
        return Simulator.start(pool, **options)

    def downloads(self, race, url, target, unix=None, compress=""):
        """Adds what one would do by hand to a Race: curl, and what bounds it."""
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
        kept = self.folder / "kept.xva"
        measure(curl.split() + ["-o", kept, url + target])
        race.add("cp file to file", "cp", kept, self.file)
        basic = "Authorization: Basic cm9vdDpzZWNyZXQ="  # root:secret
        request = "GET %s HTTP/1.0\r\n%s\r\n\r\n" % (target, basic)
        race.add("socket reader to /dev/null", self.pythons[self.newest], "-I", "-S", "-c", READER,
                 host, port, request)

    def streams(self):
        """HTTPS and the unix socket, every interpreter, every size."""
        from simulator.pool import disk

        yield "### Streams\n"
        for size in self.options.sizes:
            with self.start(disk(size * MIB, seed=1)) as sim:
                target = "/export?uuid=" + sim.record("VM", "vm0")["uuid"]
                for transport in ("HTTPS", "unix socket"):
                    race = Race(self.options.rounds, self.clean)
                    unix = sim.socket if transport == "unix socket" else None
                    for version in reversed(list(self.pythons)):
                        label = "vmbackup" if version == self.newest else "vmbackup, Python %s"
                        label = label.replace("%s", dotted(version))
                        race.add(label, *self.vmbackup(
                            version, unix or sim.url, password="local" if unix else "secret"))
                    self.downloads(race, "http://localhost" if unix else sim.url, target, unix)
                    yield race.run().table(
                        "%s, disk of %d MiB, vmbackup under Python %s" % (
                            transport, size, dotted(self.newest)), size * MIB)
                    (self.folder / "kept.xva").unlink()

    def compressed(self):
        """gzip and zstd, from the plain server."""
        from simulator.pool import disk

        yield "### Compressed by the host (plain server of the same bytes)\n"
        size = self.options.sizes[min(1, len(self.options.sizes) - 1)] * MIB
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

    def previews(self):
        """preview against the bare calls."""
        from simulator.client import Simulator

        yield "### preview\n"
        rows = []
        for count in self.options.vms:
            with Simulator.start(arguments=["--vms", str(count)]) as sim:
                race = Race(self.options.rounds)
                race.add("vmbackup", *self.vmbackup(self.newest, sim.url, "preview",
                                                    "space_check=False"))
                race.add("bare", self.pythons[self.newest], "-c", BARE_CALLS, sim.url)
                race.run()
                sim.reset_calls()
                measure(self.vmbackup(self.newest, sim.url, "preview", "space_check=False"))
                rows.append(["%d VMs" % count] + [
                    "%.2f" % race.median(label, field)
                    for field in ("wall", "cpu") for label in ("vmbackup", "bare")] + [
                    "%.2f" % race.ratio("vmbackup", "bare", field) for field in ("wall", "cpu")] + [
                    "%.0f" % race.median("vmbackup", "rss"), str(len(sim.calls()))])
        yield markdown(
            "preview of all VMs, against login, five calls for their records and logout by XenAPI",
            ["pool", "wall s", "bare calls", "CPU s", "bare calls", "wall ratio", "CPU ratio",
             "peak RSS MB", "calls"], rows)

    def tiny(self):
        """The fixed cost of a backup."""
        from simulator.pool import disk

        yield "### Many tiny VMs\n"
        count = 10 if self.options.quick else 50
        with self.start(*[disk(MIB, seed=1)] * count) as sim:
            race = Race(self.options.rounds, self.clean)
            race.add("vmbackup", *self.vmbackup(self.newest, sim.url))
            race.add("vmbackup parallel=4", *self.vmbackup(self.newest, sim.url, "parallel=4"))
            uuids = " ".join(vm["uuid"] for vm in sim.records("VM").values()
                             if vm["name_label"].startswith("vm"))
            race.add("curl \\| tee \\| sha256sum, no snapshot, no metadata", "sh", "-c", BY_HAND,
                     "-", uuids, sim.url, self.backups)
            yield race.run().table("%d VMs with a disk of 1 MiB each, in all" % count)

    def parallel(self):
        """parallel=4 under a rate for each stream, and its memory at full speed."""
        from simulator.pool import disk

        yield "### parallel=4\n"
        size = self.options.sizes[0] * MIB
        with self.start(*[disk(size, seed=1)] * 4) as sim:
            for rate in (size // 8, None):
                if rate:
                    sim.fault("export_rate", bytes=rate)
                race = Race(self.options.rounds, self.clean)
                race.add("parallel=4", *self.vmbackup(self.newest, sim.url, "parallel=4"))
                race.add("parallel=1", *self.vmbackup(self.newest, sim.url))
                at = "%d MiB/s for each stream" % (rate // MIB) if rate else "full speed"
                yield race.run().table("4 VMs of %d MiB, %s" % (size // MIB, at), 4 * size)
                sim.clear_faults()

    def starts(self):
        """What Python and the two packages cost before anything is done."""
        yield "### Start\n"
        for version, python in self.pythons.items():
            race = Race(max(self.options.rounds, 9))
            race.add("vmbackup.py help", python, SCRIPT, "help")
            race.add("import requests, XenAPI", python, "-c", "import requests, XenAPI")
            race.add("python -c pass", python, "-c", "pass")
            yield race.run().table("Python %s" % dotted(version))


PARTS = ("streams", "compressed", "sparse", "previews", "tiny", "parallel", "starts")


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
                        help="small and few: two minutes on an idle machine")
    parser.add_argument("--rounds", type=int, help="runs of each command (5; quick: 3)")
    parser.add_argument("--sizes", type=numbers, metavar="MiB,...",
                        help="disks (256,2048,8192; quick: 128)")
    parser.add_argument("--vms", type=numbers, metavar="N,...",
                        help="pools for preview (10,100,1000,10000; quick: 10,300)")
    parser.add_argument("--only", metavar="PART,...", default=",".join(PARTS),
                        help="some of: %s" % ", ".join(PARTS))
    parser.add_argument("--folder", default="/var/tmp",  # noqa: S108
                        help="where to write: a disk, with room for two of the largest (%(default)s)")  # noqa: E501
    parser.add_argument("--output", metavar="FILE", help="write the tables there")
    options = parser.parse_args()
    parts = options.only.split(",")
    if set(parts) - set(PARTS):
        parser.error("--only takes: %s" % ", ".join(PARTS))
    quick = options.quick
    options.rounds = options.rounds or (3 if quick else 5)
    options.sizes = options.sizes or ([128] if quick else [256, 2048, 8192])
    options.vms = options.vms or ([10, 300] if quick else [10, 100, 1000, 10000])

    found = interpreters()
    chosen = [max(found)] if quick else sorted({min(found), max(found)})
    pythons = collections.OrderedDict((each, prepare_tests(found[each])) for each in chosen)
    sys.executable = pythons[max(found)]  # which the simulator is started with: it has the packages
    folder = Path(tempfile.mkdtemp(prefix="vmbackup-benchmark-", dir=options.folder))
    output = open(options.output, "w", encoding="utf-8") if options.output else sys.stdout  # noqa: SIM115
    begin = time.monotonic()
    try:
        print("%s, `%s`, median of %d rounds\n\n%s; Python %s\n" % (
            datetime.date.today(), " ".join(["python3", "tests/tools/benchmark.py"] + sys.argv[1:]),
            options.rounds, machine(), ", ".join(map(dotted, pythons))), file=output, flush=True)
        benchmark = Benchmark(options, pythons, folder)
        benchmark.clean()
        for part in parts:
            for text in getattr(benchmark, part)():
                print(text, file=output, flush=True)
        print("(all of this took %d s)" % (time.monotonic() - begin), file=output, flush=True)
    finally:
        shutil.rmtree(str(folder))
        if options.output:
            output.close()


if __name__ == "__main__":
    main()

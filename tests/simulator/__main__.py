# SPDX-License-Identifier: GPL-3.0-or-later
"""Run a simulated XenServer / XCP-ng pool.

    python3 tests/simulator --demo
    python3 tests/simulator --pool FILE.json
    python3 tests/simulator --database DUMP.xml

When it is ready, it prints one line of JSON and serves until SIGTERM or SIGINT:

    url, http, socket   of the master: https://127.0.0.1:PORT, http://..., path of its unix socket
    control             the control interface, see control.py and client.py
    fingerprint         SHA-256 of the master's certificate; "certificate" is the path of the PEM
    username, password
    hosts               for each member: name, address, port, url, http, socket, fingerprint,
                        certificate, master

The members listen on the loopback addresses 127.0.0.1, 127.0.0.2 ..., on the same port number as
far as it is free, each with a self-signed certificate of its own.
"""

import argparse
import concurrent.futures
import gc
import json
import os
import shutil
import signal
import sys
import tempfile
import threading

if not __package__:
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from simulator import certificates, control, pool, world  # noqa: E402
from simulator.server import Member  # noqa: E402
from simulator.simulator import Simulator  # noqa: E402


def _arguments():
    parser = argparse.ArgumentParser(
        prog="simulator", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--demo", action="store_true", help="a small pool (the default)")
    source.add_argument("--pool", metavar="FILE", help="a pool description, see pool.py")
    source.add_argument("--database", metavar="FILE", help="a dump of a pool's XAPI database")
    source.add_argument("--vms", metavar="N", type=int, help="a pool of N small VMs")
    parser.add_argument("--password", help="root's password (default: the description's, "
                                           "or \"secret\")")
    parser.add_argument("--port", type=int, default=0, help="HTTPS port of all members")
    parser.add_argument("--http-port", type=int, default=0, help="HTTP port of all members")
    parser.add_argument("--control-port", type=int, default=0, help="port of the control interface")
    parser.add_argument("--socket", metavar="PATH", help="the master's unix socket")
    parser.add_argument("--settings", metavar="JSON", type=json.loads, default={},
                        help="settings, see faults.py")
    parser.add_argument("--delay-ms", metavar="N", type=float, default=0.0,
                        help="every call takes N ms longer, as to a far host")
    parser.add_argument("--stdin-guard", action="store_true", help="end when standard input does")
    return parser.parse_args()


def _members(simulator, folder):
    """The members of the pool, each with an address and a certificate of its own."""
    db, hosts = simulator.db, simulator.world.hosts
    addresses = ["127.0.0.%d" % (index + 1) for index in range(len(hosts))]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        made = list(pool.map(
            lambda host, address: certificates.make(
                folder, db.get("host", host)["hostname"], address), hosts, addresses))
    for index, (host, address, paths) in enumerate(zip(hosts, addresses, made)):
        db.set("host", host, "address", address)
        yield Member(simulator, index, address, *paths)


def _listen(members, folder, port, http_port, socket_path):
    """Let all members listen: on the same ports, or else on some."""
    for member in members:
        path = os.path.join(folder, "xapi-%d" % member.index)
        if member.index == 0 and socket_path:
            path = socket_path
        try:
            member.listen(port, http_port, path)
        except OSError:
            if member.index == 0:
                raise
            member.listen(0, 0, path)
        port, http_port = port or member.port, http_port or member.http_port


def _describe(simulator, control_url):
    hosts = []
    for member, host in zip(simulator.members, simulator.world.hosts):
        hosts.append({
            "name": simulator.db.get("host", host)["name_label"], "address": member.address,
            "port": member.port, "url": member.url, "socket": member.socket_path,
            "http": "http://%s:%d" % (member.address, member.http_port),
            "fingerprint": certificates.fingerprint(member.certificate),
            "certificate": member.certificate, "master": member.index == simulator.world.master})
    master = hosts[simulator.world.master]
    ready = {key: master[key] for key in ("url", "http", "socket", "fingerprint", "certificate")}
    ready.update(control=control_url, username=simulator.world.username,
                 password=simulator.world.password, hosts=hosts)
    return ready


def _end_with_stdin(ended):
    while os.read(0, 4096):
        pass
    ended.set()


def main():
    """Build the pool, serve it, wait for the end."""
    options = _arguments()
    gc.disable()    # the records of a large pool are many, and stay
    builder, description = None, {}
    if options.database:
        made = world.from_dump(options.database)
    else:
        if options.pool:
            with open(options.pool, encoding="utf-8") as file:
                description = json.load(file)
        else:
            description = (pool.many(options.vms) if options.vms else pool.demo()).description
        builder = world.Builder(description)
        made = builder.build()
    if options.password is not None:
        made.password = options.password
    gc.enable()
    simulator = Simulator(made, dict(description.get("settings", {}), delay_ms=options.delay_ms,
                                    **options.settings))
    folder = tempfile.mkdtemp(prefix="xapi-simulator-")
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    try:
        simulator.members += _members(simulator, folder)
        simulator.change_faults(description.get("faults", ()))
        _listen(simulator.members, folder, options.port, options.http_port, options.socket)
        control_url = control.serve(simulator, builder, options.control_port)
        made.db.warm_up()
        print(json.dumps(_describe(simulator, control_url)), flush=True)
        if options.stdin_guard:
            threading.Thread(target=_end_with_stdin, args=(ended,), daemon=True).start()
        ended.wait()
    finally:
        for member in simulator.members:
            member.stop()
        if options.socket and os.path.exists(options.socket):
            os.unlink(options.socket)
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: GPL-3.0-or-later
"""A small server on loopback that stands between the program and a host."""
import contextlib
import socket
import threading


def address_of(sim):
    """(host, port) of a simulator's plain HTTP."""
    host, port = sim.http.split("//")[1].split(":")
    return host, int(port)


class Relay:
    """Gives each connection to `serve(client, number)`, in a thread of its own; a context manager.
    count: the connections so far."""

    def __init__(self):
        self.count = 0
        self.listener = socket.socket()
        self.listener.bind(("127.0.0.1", 0))
        self.listener.listen(50)
        self.url = "http://127.0.0.1:%d" % self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                client = self.listener.accept()[0]
                self.count += 1
                threading.Thread(target=self.serve, args=(client, self.count), daemon=True).start()

    def serve(self, client, number):
        raise NotImplementedError

    def pass_on(self, client, server):
        """Passes all on, both ways, to the end of what the server sends."""
        threading.Thread(target=self.copy, args=(client, server), daemon=True).start()
        self.copy(server, client)

    @staticmethod
    def copy(source, target):
        """Passes on what comes, to its end."""
        with contextlib.suppress(OSError):
            for data in iter(lambda: source.recv(65536), b""):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()

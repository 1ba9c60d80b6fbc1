# SPDX-License-Identifier: GPL-3.0-or-later
"""HTTP as xapi serves it: listeners of the members, connections, requests, error texts."""

import base64
import contextlib
import socket
import ssl
import struct
import threading
import time
import urllib.parse

from . import api, handlers, imports, xmlrpc
from .answer import BAD_REQUEST, TIMEOUT, TOO_LARGE, sleep_unless
from .api import DropConnection

HEAD_LIMIT = 1006
BODY_LIMIT = 300 * 1024
_CIPHERS = "ECDHE-RSA-AES256-GCM-SHA384:ECDHE-RSA-AES128-GCM-SHA256"
_RETRY = ("An unexpected error occurred; please wait a while and try again. If the problem "
          "persists, please contact your support representative.")


class _BadHead(Exception):
    """The head of a request is not accepted: 408 or 431."""


class Member:
    """A host of the pool: its address, certificate and listening sockets."""

    def __init__(self, simulator, index, address, certificate, key):
        self.simulator = simulator
        self.index = index
        self.address = address
        self.certificate = certificate
        self.port = self.http_port = None
        self.socket_path = None
        self._connections = set()
        self._lock = threading.Lock()
        self._listeners = []
        self._context = _tls_context(certificate, key)

    @property
    def url(self):
        """Where clients find it."""
        return "https://%s:%d" % (self.address, self.port)

    def listen(self, port, http_port, socket_path):
        """Start to serve; OSError when a port is taken."""
        tls = _listener((self.address, port))
        try:
            plain = _listener((self.address, http_port))
        except OSError:
            tls.close()
            raise
        unix = socket.socket(socket.AF_UNIX)
        unix.bind(socket_path)
        unix.listen(64)
        self.port, self.http_port = tls.getsockname()[1], plain.getsockname()[1]
        self.socket_path = socket_path
        for listener, kind in ((tls, "tls"), (plain, "http"), (unix, "unix")):
            self._listeners.append(listener)
            threading.Thread(target=self._accept, args=(listener, kind), daemon=True).start()

    def _accept(self, listener, kind):
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with self._lock:
                self._connections.add(connection)
            threading.Thread(target=self._serve, args=(connection, kind), daemon=True).start()

    def _serve(self, connection, kind):
        raw = connection
        try:
            if kind != "unix":
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if kind == "tls":
                connection.settimeout(30)
                connection = self._context.wrap_socket(connection, server_side=True)
                with self._lock:
                    self._connections.discard(raw)
                    self._connections.add(connection)
            connection.settimeout(None)
            Connection(self, connection, kind).serve()
        except (OSError, ValueError):
            pass    # the client is gone, or refused the certificate
        finally:
            with self._lock:
                self._connections -= {raw, connection}
            _close(connection)

    def connections(self):
        """How many connections are open."""
        with self._lock:
            return len(self._connections)

    def close_connections(self):
        """Break all connections, as when xapi is restarted."""
        with self._lock:
            connections = list(self._connections)
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def stop(self):
        """Listen no more."""
        for listener in self._listeners:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        self.close_connections()


def _listener(address):
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(256)
    except OSError:
        listener.close()
        raise
    return listener


def _tls_context(certificate, key):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.options |= ssl.OP_NO_TLSv1 | ssl.OP_NO_TLSv1_1 | getattr(ssl, "OP_NO_TLSv1_3", 0)
    context.set_ciphers(_CIPHERS)
    context.set_ecdh_curve("secp384r1")
    context.load_cert_chain(certificate, key)
    return context


def _close(connection):
    with contextlib.suppress(OSError, ValueError):
        if isinstance(connection, ssl.SSLSocket):
            connection.settimeout(1)
            connection.unwrap()
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()


class Request:
    """A request's line and headers."""

    def __init__(self, head):
        lines = head.decode("latin-1").split("\r\n")
        self.method, self.target, version = lines[0].split(" ")
        self.version = "1.0" if version == "HTTP/1.0" else "1.1"
        self.headers = {}
        for line in lines[1:]:
            name, _, value = line.partition(":")
            self.headers[name.strip().lower()] = value.strip()
        parts = urllib.parse.urlsplit(self.target)
        self.path = parts.path
        self.query = dict(urllib.parse.parse_qsl(parts.query, keep_blank_values=True))
        cookie = self.headers.get("cookie", "")
        self.cookies = {}
        for pair in cookie.split(";" if ";" in cookie else "&"):
            name, equals, value = pair.strip().partition("=")
            if equals:
                self.cookies[urllib.parse.unquote(name)] = urllib.parse.unquote(value)
        wish = self.headers.get("connection", "").lower()
        self.keep_alive = wish == "keep-alive" if self.version == "1.0" else wish != "close"

    def parameter(self, name, default=None):
        """A parameter that may be a cookie or stand in the query."""
        return self.cookies.get(name, self.query.get(name, default))

    def basic_credentials(self):
        """(user, password) of HTTP Basic authentication, or None."""
        kind, _, value = self.headers.get("authorization", "").partition(" ")
        if kind.lower() != "basic":
            return None
        try:
            user, _, password = base64.b64decode(value).decode("utf-8").partition(":")
        except ValueError:
            return None
        return user, password


class Connection:
    """One connection and the requests that come over it."""

    def __init__(self, member, connection, kind):
        self.member = member
        self.simulator = member.simulator
        self.socket = connection
        self.kind = kind
        self._buffer = b""

    def serve(self):
        """Answer requests until one side closes."""
        first = True
        while True:
            try:
                head = self._read_head(first)
            except _BadHead as error:
                self.error_page(None, *error.args)
                return
            if head is None:
                return
            first = False
            try:
                request = Request(head)
            except ValueError:
                self.error_page(None, *BAD_REQUEST)
                return
            try:
                if not self._answer(request):
                    return
            except DropConnection:
                return

    def _read_head(self, first):
        self.socket.settimeout(self.simulator.settings["head_timeout"] if first else None)
        limit = HEAD_LIMIT if self.kind != "unix" else 1 << 20
        try:
            while b"\r\n\r\n" not in self._buffer:
                if len(self._buffer) > limit:
                    break
                data = self.socket.recv(65536)
                if not data:
                    return None
                self._buffer += data
                self.socket.settimeout(self.simulator.settings["head_timeout"])
        except socket.timeout:
            raise _BadHead(*TIMEOUT) from None
        finally:
            self.socket.settimeout(None)
        head, _, rest = self._buffer.partition(b"\r\n\r\n")
        if len(head) + 4 > limit:
            raise _BadHead(*TOO_LARGE)
        self._buffer = rest
        return head

    def receive(self, view):
        """Fill a part of a writable view with what comes in; 0 at the end."""
        if self._buffer:
            count = min(len(view), len(self._buffer))
            view[:count] = self._buffer[:count]
            self._buffer = self._buffer[count:]
            return count
        return self.socket.recv_into(view)

    def _read_body(self, length):
        parts = [self._buffer[:length]]
        missing = length - len(parts[0])
        self._buffer = self._buffer[length:]
        while missing:
            data = self.socket.recv(min(missing, 1 << 18))
            if not data:
                raise DropConnection
            parts.append(data)
            missing -= len(data)
        return b"".join(parts)

    def _answer(self, request):
        """Answer one request; False closes the connection."""
        time.sleep(self.simulator.settings["delay_ms"] / 1000)
        if request.method == "POST":
            return self._answer_call(request)
        entry = self.simulator.log(
            kind="http", host=self.member.index, transport=self.kind,
            method="%s %s" % (request.method, request.path), args=dict(request.query),
            headers=dict(request.headers), outcome=None)
        handler = {"GET": handlers.Handler, "PUT": imports.Handler}.get(request.method)
        if handler is None:
            self.error_page(request, "501", "Method not implemented",
                            "<h1>HTTP 501 Method Not Implemented</h1><p>%s not supported.<br />"
                            "</p>" % request.method)
            return False
        self.simulator.act("method", method=entry["method"], moment="before",
                           host=self.member.index)
        handler(self, request, entry).run()
        self.simulator.act("method", method=entry["method"], moment="after",
                           host=self.member.index)
        return False

    def _answer_call(self, request):
        length = request.headers.get("content-length", "")
        if not length.isdigit() or int(length) > BODY_LIMIT:
            self.internal_error(request)
            return False
        body = self._read_body(int(length))
        try:
            name, parameters = xmlrpc.parse_call(body)
        except ValueError:
            self.internal_error(request)
            return False
        simulator, host = self.simulator, self.member.index
        entry = simulator.log(kind="rpc", host=host, transport=self.kind, method=name,
                              args=_summary(name, parameters), outcome=None)
        simulator.act("method", method=name, moment="before", host=host)
        if not self._call_faults(request, name, "before", entry):
            return False
        call = api.Call(simulator, host, unix=self.kind == "unix")
        answer = simulator.dispatcher.answer(call, name, parameters)
        entry["outcome"] = call.answered
        if not name.startswith("Async."):
            simulator.act("method", method=name, moment="after", host=host)
        if not self._call_faults(request, name, "after", entry):
            return False
        head = [
            "HTTP/%s 200 OK" % request.version,
            "content-length: %d" % len(answer),
            "connection: %s" % ("keep-alive" if request.keep_alive else "close"),
            "cache-control: no-cache, no-store",
            "content-type: text/xml",
            "Access-Control-Allow-Origin: *",
            "Access-Control-Allow-Headers: X-Requested-With"]
        self.send("\r\n".join(head).encode("ascii") + b"\r\n\r\n" + answer)
        return request.keep_alive

    def _call_faults(self, request, name, moment, entry):
        """Hang, drop or refuse a call; False ends the connection."""
        occasion = {"method": name, "moment": moment, "host": self.member.index}
        hang = self.simulator.faults.take("rpc_hang", **occasion)
        if hang:
            restarts = self.simulator.restarts
            sleep_unless(lambda: self.simulator.restarts != restarts
                         or not self.simulator.faults.is_set(hang), hang.get("seconds", 3600))
        if self.simulator.faults.take("rpc_drop", **occasion):
            entry["outcome"] = "dropped"
            return False
        refuse = self.simulator.faults.take("rpc_http", **occasion)
        if refuse:
            entry["outcome"] = "HTTP %s" % refuse.get("code", 503)
            self.error_page(request, str(refuse.get("code", 503)), "Simulated", "<h1>refused</h1>")
            return False
        return True

    # --- what goes out ----------------------------------------------------------------------------

    def send(self, data):
        """Send bytes."""
        self.socket.sendall(data)

    def head(self, *lines):
        """Send the head of a response."""
        self.send("\r\n".join(lines + ("", "")).encode("utf-8"))

    def error_page(self, request, code, reason, body, headers=()):
        """Send an error as xapi words it."""
        body = "<html><body>%s</body></html>" % body
        lines = ["HTTP/%s %s %s" % (request.version if request else "1.1", code, reason),
                 "content-length: %d" % len(body.encode("utf-8")), "content-type: text/html",
                 "connection: close", "cache-control: no-cache, no-store"]
        lines += ["%s: %s" % pair for pair in headers]
        self.send(("\r\n".join(lines) + "\r\n\r\n" + body).encode("utf-8"))

    def internal_error(self, request, error=None):
        """Send the HTTP 500 that follows an exception, wherever in the stream it comes."""
        extra = "<h1> Additional information </h1>%s" % error if error else ""
        self.error_page(request, "500", "Internal Error",
                        "<h1>HTTP 500 internal server error</h1>%s%s" % (_RETRY, extra))

    def reset(self):
        """End the connection with a TCP reset."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if isinstance(self.socket, ssl.SSLSocket):
            descriptor = self.socket.detach()
            socket.socket(fileno=descriptor).close()
        else:
            self.socket.close()


def _summary(name, parameters):
    """The parameters of a call for the record of calls: no password, nothing long."""
    if name == "session.login_with_password":
        return [parameters[0], "***"] + parameters[2:] if parameters else []
    return [value if not isinstance(value, str) or len(value) < 200 else value[:200] + "..."
            for value in parameters]

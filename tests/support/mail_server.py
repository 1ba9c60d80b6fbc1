# SPDX-License-Identifier: GPL-3.0-or-later
"""A real mail server (aiosmtpd) on a loopback port, in a thread of the test's process."""
import asyncio
import email.policy
import ssl
import threading

from aiosmtpd.smtp import SMTP, AuthResult
from simulator import certificates


class MailServer:
    """Keeps what it gets: `mails` (messages), `envelopes`, `tries` (deliveries tried).

    tls: the folder for a self-signed certificate; then STARTTLS is offered, and needed before a
    login; `certificate` is its path. login: the only (user, password) that it takes mail from.
    refuse: how many deliveries get a temporary failure. unknown: an address that it has not.
    """

    def __init__(self, tls=None, login=None, refuse=0, unknown=None):
        self.mails, self.envelopes, self.tries, self.encrypted = [], [], 0, []
        self._login, self._refuse, self._unknown, self._options = login, refuse, unknown, {}
        if tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self.certificate, key = certificates.make(str(tls), "mail", "127.0.0.1")
            context.load_cert_chain(self.certificate, key)
            self._options.update(tls_context=context, require_starttls=True)
        if login:
            self._options.update(authenticator=self._authenticate, auth_required=True,
                                 auth_require_tls=bool(tls))
        self._loop = asyncio.new_event_loop()
        self._loop.set_exception_handler(lambda *_: None)  # connections that a client gives up
        self._server = self._loop.run_until_complete(
            self._loop.create_server(self._make, "127.0.0.1", 0))
        self.port = self._server.sockets[0].getsockname()[1]
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def _make(self):
        return SMTP(self, hostname="mail", loop=self._loop, **self._options)

    def _authenticate(self, _server, _session, _envelope, _mechanism, data):
        given = (data.login.decode(), data.password.decode())
        return AuthResult(success=given == self._login, handled=False)

    async def handle_RCPT(self, _server, _session, envelope, address, _options):
        if address == self._unknown:
            return "550 no such user here"
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, _server, session, envelope):
        self.tries += 1
        if self.tries <= self._refuse:
            return "451 try again later"
        self.envelopes.append(envelope)
        self.encrypted.append(session.ssl is not None)
        self.mails.append(email.message_from_bytes(
            envelope.original_content, policy=email.policy.default))
        return "250 OK"

    def settings(self, **more):
        """The lines of a config file that send mail here; `more` settings replace or add."""
        lines = {"mail_to": "admin@example.org", "mail_from": "backup@example.org",
                 "smtp_server": "127.0.0.1", "smtp_port": self.port}
        lines.update(more)
        return ["%s=%s" % pair for pair in lines.items()]

    def stop(self):
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._server.close()
        self._loop.close()

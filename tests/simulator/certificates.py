# SPDX-License-Identifier: GPL-3.0-or-later
"""Self-signed certificates as a host makes its own: RSA-2048, SAN with its name and address."""

import datetime
import hashlib
import ipaddress
import os
import shutil
import ssl
import subprocess

_CONFIGURATION = """
[req]
distinguished_name = name
x509_extensions = extensions
prompt = no
[name]
CN = %(name)s
[extensions]
subjectAltName = DNS:%(name)s,IP:%(address)s
"""
_BARE = "subjectKeyIdentifier = none\nauthorityKeyIdentifier = none\n"


def make(folder, name, address):
    """Write a certificate and its key; returns the paths of both."""
    certificate = os.path.join(folder, "%s.pem" % address)
    key = os.path.join(folder, "%s.key" % address)
    if shutil.which("openssl"):
        _by_command(certificate, key, name, address)
    else:
        _by_library(certificate, key, name, address)
    return certificate, key


def fingerprint(certificate):
    """The SHA-256 of a certificate, as ``openssl x509 -fingerprint -sha256`` writes it."""
    with open(certificate) as file:
        digest = hashlib.sha256(ssl.PEM_cert_to_DER_cert(file.read())).hexdigest().upper()
    return ":".join(digest[k:k + 2] for k in range(0, len(digest), 2))


def _by_command(certificate, key, name, address):
    configuration = certificate + ".cnf"
    for bare in (_BARE, ""):    # openssl 1.1 adds no key identifiers, and does not know "none"
        with open(configuration, "w") as file:
            file.write(_CONFIGURATION % {"name": name, "address": address} + bare)
        done = subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-sha256",
             "-days", "3650", "-config", configuration, "-keyout", key, "-out", certificate],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        if done.returncode == 0:
            return
    raise RuntimeError("openssl: %s" % done.stderr.decode("utf-8", "replace"))


def _by_library(certificate, key, name, address):
    from cryptography import x509
    from cryptography.hazmat.backends import default_backend
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    private = rsa.generate_private_key(65537, 2048, default_backend())
    subject = x509.Name([x509.NameAttribute(x509.oid.NameOID.COMMON_NAME, name)])
    start = datetime.datetime(2026, 1, 1)
    built = x509.CertificateBuilder(
        issuer_name=subject, subject_name=subject, public_key=private.public_key(),
        serial_number=x509.random_serial_number(), not_valid_before=start,
        not_valid_after=start + datetime.timedelta(days=3650),
    ).add_extension(x509.SubjectAlternativeName(
        [x509.DNSName(name), x509.IPAddress(ipaddress.ip_address(address))]), critical=False,
    ).sign(private, hashes.SHA256(), default_backend())
    with open(certificate, "wb") as file:
        file.write(built.public_bytes(serialization.Encoding.PEM))
    with open(key, "wb") as file:
        file.write(private.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL,
            serialization.NoEncryption()))

#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-3.0-or-later
"""Builds vmbackup.pyz, vmbackup.py with all it needs: python3 tests/tools/build_pyz.py [OUTPUT]

Needs a Python 3.6 or newer and a package index, as tests/run.py does. The same sources make the
same file, byte for byte, on every Python and machine. That is why nothing in it is compressed: the
bytes that zlib makes differ from build to build of zlib.
"""
import argparse
import hashlib
import importlib.util
import io
import os
import stat
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.environment import ROOT, TOOLS, interpreters  # noqa: E402

REQUIREMENTS = TOOLS / "requirements-pyz.txt"
OUTPUT = ROOT / "dist" / "vmbackup.pyz"
SHEBANG = b"#!/usr/bin/env python3\n"
OLDEST = (1980, 1, 1, 0, 0, 0)  # the first moment that a zip file can tell

MAIN = b"""\
# SPDX-License-Identifier: GPL-3.0-or-later
import sys

sys.modules["chardet"] = None  # requests would take the machine's, and complain about a newer one
import vmbackup

sys.exit(vmbackup.main())
"""

# requests asks certifi for a CA file. In a zip, on Python 3.6, certifi has none to give, and
# requests would unpack its own to /tmp/cacert.pem, or trust what somebody else has put there.
CERTIFI = b'''\
# SPDX-License-Identifier: GPL-3.0-or-later
"""Stands in for the package certifi: the CA file is that of the system."""
import os

FILES = (
    "/etc/pki/tls/certs/ca-bundle.crt",  # dom0, Red Hat and its kin
    "/etc/ssl/certs/ca-certificates.crt",  # Debian, Ubuntu, Alpine, Arch
)


def where():
    """The path of the CA file; where there is none, requests says so and trusts nobody."""
    return next(filter(os.path.isfile, FILES), FILES[0])


def contents():
    """The text of the CA file."""
    with open(where(), encoding="ascii", errors="replace") as file:
        return file.read()
'''


def download(folder):
    """The wheels of the packages, from the package index that pip is set up for."""
    python = sys.executable
    if importlib.util.find_spec("pip") is None:
        found = interpreters()
        python = str(folder / "venv" / "bin" / "python")
        subprocess.run([found[max(found)].path, "-m", "venv", str(folder / "venv")], check=True)
    wheels = folder / "wheels"
    command = [python, "-m", "pip", "download", "--quiet", "--disable-pip-version-check",
               "--no-deps", "--only-binary=:all:", "--require-hashes", "-r", str(REQUIREMENTS),
               "--dest", str(wheels)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        sys.exit("%s%s\nfailed with exit status %d: nothing was built"
                 % (done.stdout.decode(errors="replace"), " ".join(command), done.returncode))
    return sorted(wheels.glob("*.whl"))


def contents(wheels):
    """{name: bytes} of all files to carry. Wheels go in whole, with their licences and versions."""
    files = {"__main__.py": MAIN, "certifi.py": CERTIFI}
    for name in ("vmbackup.py", "LICENSE"):
        files[name] = (ROOT / name).read_bytes()
    for wheel in wheels:
        with zipfile.ZipFile(str(wheel)) as archive:
            for name in archive.namelist():
                if name in files:
                    sys.exit(f"{wheel.name} has a file that is there already: {name}")
                if not name.endswith("/"):
                    files[name] = archive.read(name)
    return files


def pack(files):
    """The bytes of a zip file with a shebang, without a trace of when, where and by whom."""
    packed = io.BytesIO()
    packed.write(SHEBANG)
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(files):
            entry = zipfile.ZipInfo(name, OLDEST)
            entry.create_system = 3  # Unix
            entry.external_attr = (stat.S_IFREG | 0o644) << 16
            archive.writestr(entry, files[name])
    return packed.getvalue()


def write(output, data):
    """Puts the file in place, whole or not at all."""
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name("%s.%d.tmp" % (output.name, os.getpid()))
    try:
        temporary.write_bytes(data)
        temporary.chmod(0o755)
        temporary.replace(output)
    except OSError as error:
        sys.exit(str(error))
    finally:
        if temporary.exists():
            temporary.unlink()


def main():
    parser = argparse.ArgumentParser(description=__doc__, usage="build_pyz.py [OUTPUT]",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", metavar="OUTPUT", nargs="?", type=Path, default=OUTPUT,
                        help="the file to write (default: dist/vmbackup.pyz in this checkout)")
    output = parser.parse_args().output
    with tempfile.TemporaryDirectory(prefix="vmbackup-pyz-") as folder:
        data = pack(contents(download(Path(folder))))
    write(output, data)
    print(f"{output}: {len(data):,} bytes, SHA-256 {hashlib.sha256(data).hexdigest()}")


if __name__ == "__main__":
    main()

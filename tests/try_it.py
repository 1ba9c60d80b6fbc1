#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-3.0-or-later
"""Shows vmbackup.py at work, with no pool at hand: python3 tests/try_it.py

Starts the simulator of the tests with a small pool, previews a backup of it, makes the backup, and
shows what is on disk then. Every command line is shown as a user would type it. All of it happens
in a temporary folder and is removed at the end.
"""
import argparse
import contextlib
import io
import json
import os
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

from tools.environment import ROOT, TESTS, interpreters, prepare_tests

CONFIG = """\
# The pool: an address, and the certificate it must show (its SHA-256, from the host's console).
host={url}
tls_fingerprint={fingerprint}

# Where the backups go, and how many of each VM stay there.
backup_dir={folder}/backups
status_log={folder}/status.log
max_backups=2

# Every VM; see example.cfg for choosing some.
vm-export=
"""


def heading(text):
    line = f"\n━━━ {text} " + "━" * (76 - len(text))
    print(f"\033[1m{line}\033[0m" if sys.stdout.isatty() else line, end="\n\n")


def short(path):
    """A path as one types it in the checkout."""
    return os.path.relpath(str(path), str(ROOT)) if ROOT in Path(path).parents else str(path)


def show(*command, typed="", cwd=ROOT):
    """Runs a command and shows it, what is typed into it, its output and how it ended."""
    line = " ".join(shlex.quote(short(word)) for word in command)
    if cwd != ROOT:
        line = f"cd {shlex.quote(str(cwd))} && {line}"
    print(f"$ {line}")
    if typed:
        print("  (and the password on the next line, here by a pipe)")
    status = subprocess.run([str(word) for word in command], cwd=str(cwd),
                            input=(typed + "\n").encode()).returncode
    print(f"→ exit status {status}")
    return status


@contextlib.contextmanager
def simulator(python):
    """The simulator with its demo pool; what it says of itself when it is ready."""
    print(f"$ {short(python)} tests/simulator --demo &")
    process = subprocess.Popen([python, str(TESTS / "simulator"), "--demo", "--stdin-guard"],
                               cwd=str(ROOT), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        ready = process.stdout.readline()
        if not ready:
            sys.exit(f"The simulator ended with exit status {process.wait()}")
        yield json.loads(ready.decode())
    finally:
        process.terminate()
        process.communicate()


def tree(folder, indent=""):
    """Prints mode, size and name of all that is in a folder, the files first."""
    for path in sorted(folder.iterdir(), key=lambda path: (path.is_dir(), path.name)):
        status = path.lstat()
        name, size = (path.name + "/", "") if path.is_dir() else (path.name, f"{status.st_size:,}")
        print(f"  {stat.filemode(status.st_mode)} {size:>13}  {indent}{name}")
        if path.is_dir():
            tree(path, indent + "    ")


def demonstrate(python, folder, pool):
    """Does what a user does, in order; False as soon as something does not end well."""
    vmbackup = ROOT / "vmbackup.py"
    password, config, backups = folder / "password", folder / "try.cfg", folder / "backups"
    backups.mkdir()

    heading("A password file, so that the password is on no command line")
    if show(python, vmbackup, "-", f"create-password-file={password}", typed=pool["password"]):
        return False

    heading("The config file")
    config.write_text(CONFIG.format(folder=folder, **pool), encoding="utf-8")
    show("cat", config)

    heading("Preview: what would be backed up? Nothing is changed")
    if show(python, vmbackup, password, config, "preview"):
        return False

    heading("The backup")
    if show(python, vmbackup, password, config):
        return False

    heading(f"What is in {folder} now")
    tree(folder)

    heading("The status log, for monitoring")
    show("cat", folder / "status.log")

    heading("Any backup can be checked later, with nothing but this")
    backup = min(backups.glob("*/backup-*"))
    return show("sha256sum", "-c", "SHA256SUMS", cwd=backup) == 0


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", action="store_true", help="keep the folder with the backups")
    keep = parser.parse_args().keep
    # UTF-8 whatever the locale, and line by line: between its lines come those of the commands.
    sys.stdout = io.TextIOWrapper(sys.stdout.buffer, encoding="utf-8", errors="surrogateescape",
                                  line_buffering=True)
    found = interpreters()
    python = prepare_tests(found[max(found)])
    folder = Path(tempfile.mkdtemp(prefix="vmbackup-try-"))
    try:
        heading("A simulated pool")
        with simulator(python) as pool:
            print(f"It listens at {pool['url']}; its certificate is made anew each time.")
            good = demonstrate(python, folder, pool)
        heading("Done" if good else "Something went wrong, see above")
    finally:
        if not keep:
            shutil.rmtree(str(folder))
    print(f"{folder} was {'kept' if keep else 'removed'}; the simulator is stopped.")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())

# SPDX-License-Identifier: GPL-3.0-or-later
"""The virtual environments of tests/run.py and tests/try_it.py: .venv/<name>/ inside the checkout.

Standard library only, for any Python 3.6 or newer.
"""
import ast
import collections
import fcntl
import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"
TOOLS = TESTS / "tools"
LOWEST = (3, 6)

PROBE = """if True:
    import ensurepip, ssl, sys, venv
    print(sys.version_info[0], sys.version_info[1], sys.version_info[3])
    print(sys.executable)
    print(sys.version.replace("\\n", " "))
"""

Interpreter = collections.namedtuple("Interpreter", "version path banner")


def dotted(version):
    """(3, 6) as 3.6"""
    return "{}.{}".format(*version)


def probe(path):
    """The Interpreter at path; None where there is none that can make a virtual environment."""
    try:
        done = subprocess.run([str(path), "-c", PROBE], stdin=subprocess.DEVNULL, timeout=20,
                              stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    version, executable, banner = done.stdout.decode().splitlines()
    major, minor, level = version.split()
    if level != "final":
        return None
    return Interpreter((int(major), int(minor)), executable, banner)


def interpreters():
    """{(3, 6): Interpreter, ...}: one for each version on this machine, lowest first.

    Looked for: the Python that runs this, python3 and python3.X on PATH, and what pyenv installed;
    not the environments made here, which would be cleared to be made of themselves.
    """
    candidates = [Path(sys.executable)]
    for folder in os.get_exec_path():
        candidates += [path for path in sorted(Path(folder).glob("python3*"))
                       if re.match(r"python3(\.\d+)?$", path.name)]
    pyenv = Path(os.environ.get("PYENV_ROOT") or "~/.pyenv").expanduser()
    candidates += sorted(pyenv.glob("versions/*/bin/python"))
    made = (ROOT / ".venv").resolve()
    candidates = [path for path in candidates if made not in path.parent.resolve().parents]
    found = {}
    for interpreter in filter(None, map(probe, candidates)):
        if interpreter.version >= LOWEST:
            found.setdefault(interpreter.version, interpreter)
    if not found:
        sys.exit("No Python found that can make a virtual environment: it needs the modules venv,"
                 " ensurepip and ssl\n(on Debian and Ubuntu: apt install python3-venv).")
    return dict(sorted(found.items()))


def pyproject_list(key):
    """The list of strings that pyproject.toml has under key (no Python before 3.11 reads TOML)."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return ast.literal_eval(re.search(rf"^{key} = (\[.*?\])", text, re.M | re.S).group(1))


def environment(name, interpreter, packages, requirements):
    """The path of python in .venv/<name>/, made anew only when what it is made from has changed."""
    folder = ROOT / ".venv" / name
    python = folder / "bin" / "python"
    stamp = folder / "made-from.sha256"
    made_from = repr((interpreter, packages, requirements.read_text(encoding="utf-8")))
    digest = hashlib.sha256(made_from.encode()).hexdigest()
    folder.parent.mkdir(exist_ok=True)
    with open(str(folder) + ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if stamp.exists() and stamp.read_text() == digest:
            return str(python)
        print(f"Making .venv/{name} with Python {dotted(interpreter.version)}"
              f" from {requirements.relative_to(ROOT)} ...", flush=True)
        install = [python, "-m", "pip", "install", "--disable-pip-version-check"]
        commands = [[interpreter.path, "-m", "venv", "--clear", folder],
                    install + packages + ["-r", requirements]]
        if interpreter.version == (3, 6):
            commands.insert(1, install + ["pip==21.3.1"])  # its last; its own is too old for wheels
        for command in commands:
            command = [str(word) for word in command]
            done = subprocess.run(command, stdin=subprocess.DEVNULL,
                                  stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            if done.returncode:
                sys.stdout.buffer.write(done.stdout)
                sys.exit(f"{' '.join(command)}\nfailed with exit status {done.returncode}")
        stamp.write_text(digest)
    return str(python)


def prepare_tests(interpreter):
    """The environment that vmbackup.py, the simulator and the tests run in."""
    packages = pyproject_list("requires") + pyproject_list("dependencies")
    return environment(dotted(interpreter.version), interpreter, packages,
                       TOOLS / "requirements.txt")


def prepare_lint(interpreter):
    """The environment of the linters."""
    return environment("lint", interpreter, [], TOOLS / "requirements-lint.txt")

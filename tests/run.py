#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-3.0-or-later
"""Runs every check and test of the project: python3 tests/run.py

Needs nothing but a Python 3.6 or newer and a package index: it makes its virtual environments in
the folder .venv. The tests run on Python 3.6, where one is found, and on the newest Python found;
those that do not depend on the Python (pytest's mark `newest`) on the newest only.
"""
import argparse
import collections
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from tools import counter
from tools.environment import LOWEST, ROOT, TESTS, dotted, interpreters, prepare_lint, prepare_tests

GROUPS = ("lint", "types", "py36", "tests")
LINTERS = (3, 10)  # the lowest Python for which linters of today can be had
WORKERS = 4  # of pytest, on each Python: most tests wait for a vmbackup.py and a simulator
LIMIT = 1800  # seconds that one check may take before it is killed
EVERY = 15  # seconds between the lines that tell how far the tests are
VERMIN = ["-q", "--no-tips", "--violations", "-t=3.6-",
          # These came with 3.7 and are used behind hasattr.
          "--exclude", "ssl.TLSVersion", "--exclude", "ssl.SSLContext.minimum_version",
          "--exclude", "ssl.SSLContext.maximum_version"]
COMPILE = """
import sys
for name in sys.argv[1:]:
    with open(name, "rb") as source:
        compile(source.read(), name, "exec")
"""

Check = collections.namedtuple("Check", "name command")
Result = collections.namedtuple("Result", "outcome seconds output")


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="run.py [--only GROUP]... [--python X.Y]... [-- PYTEST-ARGUMENT ...]")
    parser.add_argument("--only", metavar="GROUP", choices=GROUPS, action="append",
                        help="only these checks: lint (ruff), types (mypy), py36 (vermin and a"
                             " compile by Python 3.6), tests (pytest); may be repeated")
    parser.add_argument("--python", metavar="X.Y", action="append",
                        help="run the tests on these versions instead; may be repeated")
    parser.add_argument("pytest", nargs="*", help="handed on to pytest, such as -- -k retention")
    return parser.parse_args()


def chosen(found, wanted):
    """The interpreters to run the tests on."""
    if not wanted:
        return [found[version] for version in sorted({LOWEST, max(found)} & set(found))]
    by_name = {dotted(version): interpreter for version, interpreter in found.items()}
    for name in wanted:
        if name not in by_name:
            sys.exit(f"No Python {name} here; found: {', '.join(by_name)}")
    return [by_name[name] for name in wanted]


def checks(groups, found, test_on, pytest_arguments):
    """All checks to run, the environments they need being made first, side by side."""
    sources = [ROOT / "vmbackup.py"] + sorted(TESTS.rglob("*.py"))
    sources = [str(path.relative_to(ROOT)) for path in sources]
    with ThreadPoolExecutor() as pool:
        pythons = pool.map(prepare_tests, test_on if "tests" in groups else [])
        lint = prepare_lint(found[max(found)]) if groups - {"tests"} else None
        pythons = list(pythons)
    if "lint" in groups:
        yield Check("ruff", [lint, "-m", "ruff", "check", "."])
    if "types" in groups:
        yield Check("mypy", [lint, "-m", "mypy"])
    if "py36" in groups:
        yield Check("vermin", [str(Path(lint).with_name("vermin"))] + VERMIN + sources)
        if LOWEST in found:
            yield Check("compile 3.6", [found[LOWEST].path, "-W", "error", "-c", COMPILE] + sources)
    for interpreter, python in zip(test_on, pythons):
        version = dotted(interpreter.version)
        newest = interpreter.version == max(one.version for one in test_on)
        yield Check("pytest " + version, [
            python, "-m", "pytest", "-n", str(WORKERS), "-o", "cache_dir=.pytest_cache/" + version,
        ] + ([] if newest else ["-m", "not newest"]) + pytest_arguments)


def say(text):
    """A line that tells how far all is; several threads print such."""
    sys.stdout.write(f"{time.strftime('%H:%M:%S')} {text}\n")
    sys.stdout.flush()


def run(check, folder):
    """Runs one check; its output goes to a file, so that no process left behind can hold it up."""
    counted = Path(folder, check.name)
    say(f"{check.name} begins")
    started = time.monotonic()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(check.command, cwd=str(ROOT), stdin=subprocess.DEVNULL,
                                   stdout=output, stderr=subprocess.STDOUT,
                                   env=dict(os.environ, **{counter.VARIABLE: str(counted)}))
        outcome = None
        while outcome is None:
            try:
                status = process.wait(EVERY)
                outcome = f"FAILED, exit status {status}" if status else "ok"
            except subprocess.TimeoutExpired:
                if time.monotonic() - started > LIMIT:
                    process.kill()
                    process.wait()
                    outcome = f"FAILED, killed after {LIMIT} s"
                elif "pytest" in check.name:
                    say(f"{check.name}: {counter.progress(str(counted))}")
        output.seek(0)
        result = Result(outcome, time.monotonic() - started, output.read())
    say(f"{check.name} ends: {outcome}, {result.seconds:.1f} s")
    return result


def main():
    options = arguments()
    groups = set(options.only or GROUPS)
    found = interpreters()
    test_on = chosen(found, options.python)
    print("Python found here: " + ", ".join(map(dotted, found)))
    if "tests" in groups:
        print("The tests run on: " + ", ".join(dotted(one.version) for one in test_on))
    if LOWEST not in found:
        print("There is no Python 3.6 here: nothing of this run shows that vmbackup.py works on it,"
              " beyond what vermin sees.")
    if max(found) < LINTERS:
        print(f"The linters need Python {dotted(LINTERS)} or newer: only the tests run here.")
        groups &= {"tests"}
    todo = list(checks(groups, found, test_on, options.pytest))
    if not todo:
        sys.exit("Nothing was run.")
    names = ", ".join(check.name for check in todo)
    print(f"Running: {names} (the output of each follows when it has ended)", flush=True)

    results = {}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(len(todo)) as pool:
        running = {pool.submit(run, check, folder): check for check in todo}
        for future in as_completed(running):
            check = running[future]
            results[check.name] = result = future.result()
            print(f"\n##### {check.name}", flush=True)
            sys.stdout.buffer.write(result.output)
            sys.stdout.flush()

    print("\nSummary")
    for check in todo:
        result = results[check.name]
        print(f"  {check.name:12} {result.outcome:24} {result.seconds:6.1f} s")
    return int(any(result.outcome != "ok" for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())

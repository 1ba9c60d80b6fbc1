# SPDX-License-Identifier: GPL-3.0-or-later
"""The benchmark runs and tells what it has to; how fast anything is, no test asks."""
import re
import shutil
import subprocess
import sys

import pytest

from tools import benchmark
from tools.environment import ROOT

ROWS = (
    "vmbackup", "curl -o", r"curl \| openssl sha256, no file", r"curl \| tee \| sha256sum",
    "curl -o, then sync", "HTTPS, 16 MiB", "HTTPS, 32 MiB", "unix socket, 32 MiB",
    "verify", "sha256sum -c", "extract", r"tar xOf \| cat",
    "restore", "curl -T", "sha256sum, then curl -T",
    "10 VMs", "100 VMs", "parallel=1", "parallel=4", "vmbackup.py help", "compile(vmbackup.py)",
    "list FOLDER", "list CONFIG-FILE json", "check FOLDER", "check CONFIG-FILE")


@pytest.mark.newest
@pytest.mark.timeout(600)
@pytest.mark.skipif(not all(map(shutil.which, ("curl", "openssl", "zstd"))),
                    reason="needs curl, openssl and zstd to compare with")
def test_a_quick_benchmark_has_all_its_rows_and_leaves_nothing_behind(tmp_path):
    output = tmp_path / "tables.md"
    here = tmp_path / "work"
    here.mkdir()
    done = subprocess.run(
        [sys.executable, benchmark.__file__, "--quick", "--python", sys.executable,
         "--folder", str(here), "--output", str(output),
         "--against", str(ROOT / "vmbackup.py"), "--only", ",".join(benchmark.PARTS)],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout.decode()
    text = output.read_text(encoding="utf-8")
    assert not [label for label in ROWS if not re.search(
        r"^\| %s \|( [0-9.]* \|)+$" % re.escape(label), text, re.M)], text
    goals = text[text.index("**Goals**"):]
    for what in ("openssl sha256`", "tee", "CPU s/GiB", "peak RSS MB", "sha256sum -c", "tar xOf",
                 "restore", "preview", "small VMs", "help", "list FOLDER", "CPU / the other's"):
        assert what in goals, goals
    assert list(here.iterdir()) == []

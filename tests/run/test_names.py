# SPDX-License-Identifier: GPL-3.0-or-later
"""Names that a file system, a shell, a log or a terminal could stumble over, all in one pool."""
import hashlib
import json
import os
import re

import pytest
from simulator.pool import Pool, disk, vif
from support.harness import LINE, vmbackup
from support.tally import Ledger, is_good
from support.world import cfg

NAMES = [
    "", ".", "..", "../../../etc/cron.d/x", "/", "/etc/passwd", "a/b", "a%2Fb", "a%252Fb", "%",
    "%%",
    ".hidden", "%2Ehidden", "-rf", "--help", "~", "*", "?", "$(reboot)", "`reboot`", "a;b&c|d>e",
    "quo'te", 'quo"te', "back\\slash", "end\\", "two\nlines", "cr\rlf\r\n", "tab\tbell\x07",
    "\x1b[31mred", "\x7f", "\x85next\u2028line", "\u202eexe.niam", "\U0001f600\u200d\U0001f525",
    "\u05e9\u05dc\u05d5\u05dd", "e\u0301", "\u00e9", "name", "NAME", "Name", "success",
    "SHA256SUMS",
    "unfinished.partial", "x.xva.partial", "METADATA_x", "backup-2026-01-01-(02:00:00)",
    " leading", "trailing ", "a=b", "a:3", "a,b", "#comment", ".web.lock", "lost+found",
    "n" * 300, "n" * 301, "\U0001f600" * 75, "%" * 100,
]


@pytest.fixture
def hostile(turn):
    """A site with a VM of each name, whose disk and network bear the same name."""
    pool = Pool()
    for number, name in enumerate(NAMES):
        pool.network(name, bridge="xapi%d" % number)
        pool.vm(name, description=name, vifs=[vif(name)],
                disks=[disk(8192, name, name, seed=number)])
    return turn(pool)


def through_xml(name):
    """A name as XML-RPC can carry it: XAPI leaves out what XML forbids."""
    name = name.replace("\r\n", "\n").replace("\r", "\n")
    return re.sub("[\x00-\x08\x0b\x0c\x0e-\x1f]", "", name)


def assert_harmless(text, start):
    """Every line is a whole line of the log, and nothing in it moves the cursor."""
    assert text.endswith("\n")
    for line in text.split("\n")[:-1]:
        assert start.match(line), line
        assert not re.search("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]", line), line


@pytest.mark.parametrize("kind, suffix, locale", [
    ("vm-export", "xva", "C"), ("vdi-export", "raw", "C.UTF-8")])
def test_every_name_gets_a_folder_of_its_own(hostile, tally, kind, suffix, locale):
    site = hostile
    ledger = Ledger(site)
    report = site.path / "report.json"
    site.configure(kind + "=.*", "report_json=%s" % report)
    result = site.run("host=" + site.sim.http, env={"LC_ALL": locale})
    assert result.status == 0, result
    assert_harmless(result.out, LINE)
    assert sum(" - ***Success*** " in line for line in result.lines) == len(NAMES)
    status = site.status_log.read_bytes().decode("utf-8")
    assert_harmless(status, re.compile(r"2\d{3}/\d\d/\d\d \d\d:\d\d:\d\d,v"))
    assert status.count("\n") == 2 * len(NAMES) + 2
    assert set(site.path.iterdir()) == {site.config, site.backups, site.status_log, report}
    told = json.loads(report.read_text(encoding="utf-8"))["vms"]
    exports = {os.path.join(vm["folder"], vm["file"]).encode("utf-8") for vm in told}
    assert len(exports) == len(NAMES) and all(map(os.path.isfile, exports))

    sources = {through_xml(vm["name_label"]): vm["uuid"] for vm in site.sim.records("VM").values()
               if vm["name_label"] in NAMES}
    found = {}
    for top in site.backups.iterdir():
        (backup,) = top.iterdir()
        assert is_good(backup), backup
        (export,) = backup.glob("*." + suffix)
        assert export.name == "%s.%s" % (top.name, suffix)
        vm, vdi = cfg(backup / "vm.cfg"), cfg(backup / "DISK-xvda" / "vdi.cfg")
        network = cfg(backup / "VIFs" / "vif-0.cfg")["network_name_label"]
        assert vm["name_label"] == vm["name_description"] == vdi["name_label"]
        assert network == (vm["name_label"] or "Pool-wide network associated with eth0")
        if suffix == "raw":
            digest = hashlib.sha256(export.read_bytes()).hexdigest()
            assert digest == site.sim.disk_sha256(vdi["orig_uuid"])
        found[vm["name_label"]] = vm["orig_uuid"]
    assert found == sources
    assert len(found) == len(NAMES)
    result = vmbackup("verify", site.backups, env={"LC_ALL": locale})
    assert result.status == 0, result
    assert_harmless(result.out, LINE)
    tally("a hostile name", len(NAMES), ledger)

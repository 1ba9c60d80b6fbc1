# SPDX-License-Identifier: GPL-3.0-or-later
"""The README: what it tells to type works as typed; its tables, samples and names are true.

Indented lines of the README are typed by the reader; fenced blocks are files or what is printed.
A sample of what is printed is compared line by line with what these tests got to see: figures,
uuids, addresses and folders may differ, a line … stands for lines that were left out.
"""
import datetime
import difflib
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from simulator.client import Simulator
from simulator.pool import MIB, Pool, disk, vif
from support.harness import SCRIPT, vmbackup
from support.world import WRONG
from tools.environment import ROOT

pytestmark = pytest.mark.newest
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
PROGRAM = "python3 vmbackup.py"
DATE = "backup-2026-11-23-(02:00:00)"  # of every backup in the README


def sections():
    """(heading, kind, lines) of each block of code: kind `typed`, or the word behind the fence."""
    heading, kind, lines = "", None, []
    for line in TEXT.splitlines() + [""]:
        if line.startswith("```"):
            if kind:
                yield heading, kind, lines
            kind, lines = line[3:] or None, []
        elif kind and kind != "typed":
            lines.append(line)
        elif line.startswith("    "):
            kind = "typed"
            lines.append(line[4:])
        else:
            if kind:
                yield heading, kind, lines
            kind, lines = None, []
            heading = line.lstrip("# ") if line.startswith("#") else heading


BLOCKS = list(sections())
TYPED = [(heading, lines) for heading, kind, lines in BLOCKS
         if kind == "typed" and heading != "Reference"]


def of(kind, heading):
    return [lines for found, what, lines in BLOCKS if (found, what) == (heading, kind)]


def statements(lines):
    """The commands of a block: a line each, and what follows a << up to its end."""
    rest = iter(lines)
    for line in rest:
        end = re.search(r"<<'(\w+)'$", line)
        if end:
            line = "\n".join([line] + list(itertools.takewhile(
                lambda text, end=end: text != end.group(1), rest)) + [end.group(1)])
        yield line


COMMANDS = [line for _, lines in TYPED for line in statements(lines)]


def rows(heading):
    """The cells of the table in a section, without its head."""
    text = re.split(r"^#+ %s$" % re.escape(heading), TEXT, maxsplit=1, flags=re.M)[1]
    text = re.split(r"^#", text, maxsplit=1, flags=re.M)[0]
    lines = [line for line in text.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def ticked(cell):
    return re.findall(r"`([^`]*)`", cell)


# --- what it says of the program ---

def test_the_table_of_settings_is_that_of_the_program():
    """Each with its default, in the order of `config`, which shows them as #name=default."""
    told = []
    for names, default, _ in rows("Settings"):
        names, defaults = ticked(names), [item.strip(" `") for item in default.split(",")]
        told += zip(names, defaults * len(names) if len(defaults) == 1 else defaults)
    told = [(name, "" if default in ("none", "the system's") else default)
            for name, default in told if name not in ("vm-export", "vdi-export", "exclude")]
    settings = vmbackup("config").out.partition("#### which VMs ####")[0]
    assert sorted(told) == sorted(re.findall(r"^#(\w+)=(.*)$", settings, re.M))


def test_the_commands_are_those_of_the_usage():
    usage = re.sub(r"\[\.\.\.\]", "", vmbackup("help").out.partition("\n\n")[0])
    known = set(re.findall(r"vmbackup.py ((?:<password> )?[\w-]+)", " ".join(usage.split())))
    for line in of("typed", "Reference")[0]:
        assert line.startswith("vmbackup.py ")
        words = line.split()
        first = " ".join(words[1:3] if words[1] == "<password>" else words[1:2])
        assert first.split("=")[0].rstrip(">") in {
            name.split("=")[0] for name in known} or "config-file|vm-selector" in first, line
    for name in ("verify", "list", "check", "extract", "restore"):
        assert any(" %s <" % name in line for line in of("typed", "Reference")[0]), name


def test_every_exit_status_is_told():
    help_text = " ".join(vmbackup("help").out.split())
    for status in [row[0] for row in rows("Exit status")]:
        assert re.search("[ ,:]%s " % re.escape(status), help_text.rpartition("Exit status")[2])
    assert "".join(row[0] for row in rows("Exit status")) == "01234128+n"


def test_what_it_names_in_the_checkout_is_there():
    for path in set(re.findall(r"tests/[\w/.]+\w", TEXT)):
        assert (ROOT / path).exists(), path
    assert of("typed", "Try it, without a XenServer at hand") == [["python3 tests/try_it.py"]]
    assert of("typed", "For developers")[0] == ["python3 tests/run.py"]


def test_its_links_lead_to_its_headings():
    headings = {re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-")
                for line in TEXT.splitlines() if line.startswith("#")}
    assert set(re.findall(r"\]\(#([^)]*)\)", TEXT)) <= headings


def test_the_example_of_retention_is_what_the_rules_keep():
    import vmbackup as program

    today = datetime.datetime(2026, 11, 25, 2)
    folders = [program.Folder(
        str(day), (today - datetime.timedelta(day)).timestamp(), "success", export="a.xva", size=1,
        date=(today - datetime.timedelta(day)).date()) for day in range(400)]
    kept = program.kept(folders, program.Policy(4, 7, 4, 6, 0))
    assert "With 4, 7, 4, 6 and 0, nightly, on 25 November 2026 these 14" in " ".join(TEXT.split())
    dates = sorted((today - datetime.timedelta(int(name))).date() for name in kept)[::-1]
    assert ["%d.%d." % (date.day, date.month) for date in dates] == [
        "25.11.", "24.11.", "23.11.", "22.11.", "21.11.", "20.11.", "19.11.", "15.11.", "8.11.",
        "31.10.", "30.9.", "31.8.", "31.7.", "30.6."]


# --- what it tells to type ---

@pytest.mark.parametrize("command", COMMANDS, ids=range(len(COMMANDS)))
def test_a_shell_understands_each_command(command):
    subprocess.run(["sh", "-n", "-c", command], check=True)


def test_nothing_tells_to_leave_out_the_check_of_a_certificate():
    assert not re.search(r"curl\b.*\s(-\w*k|--insecure)", TEXT)


def test_what_ssh_hands_on_is_understood_by_the_shell_there_too():
    """A pattern that only the shell here saw quoted would become names of files there."""
    found = [line for line in COMMANDS if line.startswith("ssh ")]
    assert len(found) == 2
    for line in found:
        words = shlex.split(line)
        there = words[words.index("root@xen1.example.org") + 1 :]
        assert len(there) == 1 or not re.search(r"[*?()$]", line)
        assert shlex.split(" ".join(there))[0] in ("mkdir", "python3")
    assert shlex.split(shlex.split(found[1])[-1])[2:4] == ["local", ".*"]
    copies = [line for line in COMMANDS if line.startswith("scp ")]
    assert all(copies[0].endswith(":%s/" % line.split()[-1])  # into a folder that was made before
               for line in found[:1])


def test_every_word_that_is_given_to_the_program_is_one_of_its():
    known = set(re.findall(r"^#(\w+)=", vmbackup("config").out, re.M))
    known |= {"only", "as", "sr", "to", "disk", "backup", "preserve", "warn", "crit",
              "create-password-file", "vm-export", "vdi-export"}
    commands = [command for _, kind, lines in BLOCKS for command in lines
                if re.search(r"vmbackup(\.py)? ", command) and kind in ("typed", "text", "ini")]
    assert len(commands) > 30
    for command in commands:
        for name in re.findall(r"(?<= )([\w-]+)=", command.partition("vmbackup.py")[2]):
            assert name in known or "list-" in command, command


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd is not here")
def test_systemd_takes_the_units(tmp_path):
    for _, kind, lines in BLOCKS:
        if kind == "ini":
            name = re.match(r"# /etc/systemd/system/(\S+)$", lines[0]).group(1)
            text = "\n".join(lines).replace("/opt/vmbackup/bin/vmbackup", "/bin/true")
            for unit in (name, name.replace("@", "@pool1")):
                (tmp_path / unit).write_text(text + "\n")
    assert len(list(tmp_path.iterdir())) == 6
    done = subprocess.run(
        ["systemd-analyze", "verify", "vmbackup@pool1.timer", "vmbackup@pool1.service",
         "vmbackup-failed@pool1.service"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env=dict(os.environ, SYSTEMD_UNIT_PATH="%s:" % tmp_path))
    told = [line for line in done.stdout.decode().splitlines() if "vmbackup" in line]
    assert (done.returncode, told) == (0, [])


def test_the_lines_for_cron_are_such_lines():
    """Five fields, a user, a command without a percent sign, which would be a line break there."""
    found = [line for _, kind, lines in BLOCKS for line in lines
             if kind == "text" and re.match(r"[\d*]+ [\d*]+ \* \* ", line)]
    assert len(found) == 5
    for line in found:
        fields = re.match(r"(\d+) (\d+) \* \* [\d*] (root )?(.*)$", line)
        assert int(fields.group(1)) < 60
        assert int(fields.group(2)) < 24
        assert "%" not in line
        subprocess.run(["sh", "-n", "-c", fields.group(4)], check=True)


@pytest.mark.skipif(not shutil.which("logrotate"), reason="logrotate is not here")
def test_logrotate_takes_its_file(tmp_path):
    (lines,) = [lines for _, _, lines in BLOCKS if lines[0].endswith(".log {")]
    path = tmp_path / "vmbackup"
    path.write_text("\n".join(lines).replace("/var/log", str(tmp_path)) + "\n")
    path.chmod(0o644)
    done = subprocess.run(["logrotate", "-d", str(path)], stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT)
    assert done.returncode == 0
    assert b"error" not in done.stdout


# --- the way through it, from the first backup to the day when the host is gone ---

class Reader:
    """Who types what the README says, with addresses and folders of these tests."""

    def __init__(self, folder, sim):
        self.folder, self.sim, self.printed, self.fingerprint = folder, sim, [], WRONG
        (folder / "images").mkdir()
        python = "%s %s" % (shlex.quote(sys.executable), shlex.quote(str(SCRIPT)))
        self.names = [(PROGRAM, python), ("/mnt/backup/vms", str(folder / "vms")),
                      ("/root/vmbackup.pass", str(folder / "vmbackup.pass")),
                      ("to=/var/tmp", "to=" + str(folder / "images"))]

    def type(self, command):
        """Runs a command; returns (exit status, lines)."""
        for told, here in self.names:
            command = command.replace(told, here)
        command = command.replace("xen1.example.org", self.sim.url.partition("//")[2])
        command = command.replace("tls_fingerprint=FINGERPRINT", "tls_fingerprint=" +
                                  self.fingerprint)
        for folder in sorted(self.folder.glob("vms/web/backup-*"))[:1]:
            command = command.replace(DATE, folder.name)
        environment = {"PATH": os.environ["PATH"], "HOME": str(self.folder), "TZ": "UTC"}
        done = subprocess.run(["sh", "-euc", command], cwd=str(self.folder), env=environment,
                              input=(self.sim.password + "\n").encode(), stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, timeout=100)
        lines = done.stdout.decode("utf-8").splitlines()
        assert "Traceback" not in done.stdout.decode("utf-8"), lines
        self.printed += lines
        return done.returncode, lines

    def succeed(self, command, status=0):
        code, lines = self.type(command)
        assert code == status, (command, code, lines)
        return lines

    def plain(self, line):
        """A line without what differs from run to run."""
        line = line.replace(str(self.folder / "vms"), "/mnt/backup/vms")
        line = line.replace(str(self.folder / "images"), "/var/tmp")
        line = re.sub(r"(127\.0\.0\.\d+|xen1\.example\.org)(:\d+)?", "HOST", line)
        line = re.sub(r"\b[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\b", "UUID", line)
        line = re.sub(r"\b[0-9A-Fa-f]{2}(:[0-9A-Fa-f]{2}){31}\b|\b[0-9a-f]{64}\b", "SHA", line)
        line = re.sub(r"\b(KiB|MiB|GiB|TiB|bytes?)\b", "UNIT", line)
        line = re.sub(r"\b(\d+ (d|h|min|s)( |\b))+", "TIME ", line)
        line = re.sub(r"longest ago \S+", "longest ago VM", line)  # within the same second any
        return re.sub(r"\s+", " ", re.sub(r"\d+(\.\d+)?", "0", line)).strip()


def the_pool():
    pool = Pool("pool1")
    pool.network("office", bridge="xenbr7")
    for number, name in enumerate(("web", "PROD-db", "PROD-mail", "PROD-test1", "dc1")):
        disks = [disk(20 * MIB, "system", seed=number, bootable=True, device="xvda")]
        disks += [disk(40 * MIB, "data", seed=10 + number, device="xvdb", sparse=list(range(3, 39)))
                  ] if name == "PROD-db" else []
        pool.vm(name, power_state="Running", disks=disks, vifs=[vif("office")])
    return pool


def typed_and_read(folder):
    """The Reader who typed the commands of the README, in its order."""
    with Simulator.start(the_pool()) as sim:
        reader = Reader(folder, sim)
        first_backup(reader)
        notice(reader)
        restore(reader)
    empty = Pool("new")
    empty.network("office", bridge="xenbr7")
    with Simulator.start(empty) as sim:
        reader.sim = sim
        config = folder / "weekend.cfg"
        text = re.sub(r"host=.*", "host=" + sim.url, config.read_text())
        config.write_text(re.sub(r"tls_fingerprint=.*", "tls_fingerprint=" + sim.fingerprint, text))
        host_is_gone(reader)
    return reader


def first_backup(reader):
    blocks = of("typed", "The first backup")
    setup, look = list(statements(blocks[0]))[:-1], blocks[0][-1]
    for command in setup:
        reader.succeed(command)
    assert oct((reader.folder / "vmbackup.pass").stat().st_mode & 0o777) == "0o600"
    # At a loopback address no certificate is asked for, unless one is named.
    (line,) = [line for line in reader.succeed(look + " tls_fingerprint=" + WRONG, 3)
               if "is not trusted" in line]
    reader.fingerprint = re.search(r"add tls_fingerprint=(\S+)", line).group(1)
    before = len(reader.sim.records("VM"))
    for command in blocks[1]:
        reader.succeed(command)
    assert not list((reader.folder / "vms").iterdir())
    for block in blocks[2:]:
        for command in statements(block):
            reader.succeed(command)
    assert len(reader.sim.records("VM")) == before
    assert sorted(path.name for path in (reader.folder / "vms").iterdir()) == [
        "PROD-db", "PROD-mail", "web"]
    assert len(list((reader.folder / "vms" / "web").glob("backup-*/success"))) == 2


def notice(reader):
    (commands,) = of("typed", "How to notice that backups stopped")
    for command in commands:
        (line,) = reader.succeed(command)
        assert line.startswith("VMBACKUP OK - ")
    config = reader.folder / "weekend.cfg"
    (line,) = [line for _, _, lines in BLOCKS for line in lines if line.startswith("0 8 * * *")]
    command = line.partition("root ")[2].replace("python3 /opt/vmbackup/vmbackup.py", PROGRAM)
    command = command.replace("/mnt/backup/nightly.cfg", "weekend.cfg")
    assert reader.succeed(command) == []
    text = config.read_text()
    config.write_text(text + "vm-export=lost\n")
    lines = reader.succeed(command)  # cron mails this
    assert lines[0].startswith("VMBACKUP CRITICAL - 1 of 4 VMs: lost (never)"), lines
    config.write_text(text)


def restore(reader):
    before = reader.sim.records("VM")
    for command in of("typed", "Restore")[0]:
        reader.succeed(command)
    after = reader.sim.records("VM")
    new = {vm["name_label"]: vm for ref, vm in after.items() if ref not in before}
    assert sorted(new) == ["web-old", "web-test"]
    assert {vm["power_state"] for vm in new.values()} == {"Halted"}
    assert {ref: vm["uuid"] for ref, vm in before.items()} == {
        ref: vm["uuid"] for ref, vm in after.items() if ref in before}
    (image,) = (reader.folder / "images").iterdir()
    assert image.name == "web-xvda.raw"
    assert image.stat().st_size == 20 * MIB


def host_is_gone(reader):
    for block in of("typed", "The host is gone"):
        for command in statements(block):
            if command.startswith("grep"):
                lines = reader.succeed(command)
                assert [line.split() for line in lines] == [["4", "network_name_label=office"]]
            elif not command.startswith(("xe ", "openssl ")):
                reader.succeed(command)
    (vm,) = [vm for vm in reader.sim.records("VM").values() if vm["name_label"] == "web"]
    assert vm["power_state"] == "Halted"


SAMPLES = [line for heading, kind, lines in BLOCKS if kind == "text" for line in lines
           if heading in ("The first backup", "How to notice that backups stopped", "Restore")
           and not re.match(r"[\d*]+ [\d*]+ \* \* |MAILTO=|nagios |command\[|…", line)]


def test_from_the_first_backup_to_the_restore_on_a_new_host_as_it_is_told(tmp_path):
    reader = typed_and_read(tmp_path)
    printed = {reader.plain(line): line for line in reader.printed}
    assert len(SAMPLES) > 20
    missing = [(line, difflib.get_close_matches(reader.plain(line), printed, 1, 0.4))
               for line in SAMPLES if reader.plain(line) not in printed]
    assert not missing


def test_the_alert_rules_use_what_the_program_writes(tmp_path, turn):
    here = turn(the_pool())
    metrics = tmp_path / "vmbackup.prom"
    here.configure("vm-export=web", "metrics_file=%s" % metrics)
    assert here.run().status == 0
    written = set(re.findall(r"^(vmbackup_\w+)\{", metrics.read_text(), re.M))
    (rules,) = [lines for _, kind, lines in BLOCKS if kind == "yaml"]
    assert set(re.findall(r"vmbackup_\w+", "\n".join(rules))) <= written
    section = re.split(r"^### Metrics$", TEXT, maxsplit=1, flags=re.M)[1].partition("\n#")[0]
    assert set(re.findall(r"`(vmbackup_\w+)`", section)) == written
    assert sum("- alert: " in line for line in rules) == 3


def test_report_json_has_the_fields_that_are_told(tmp_path, turn):
    here = turn(the_pool())
    report = tmp_path / "report.json"
    here.configure("vm-export=web", "report_json=%s" % report)
    assert here.run().status == 0
    section = re.split(r"^### report_json$", TEXT, maxsplit=1, flags=re.M)[1].partition("\n#")[0]
    fields = json.loads(report.read_text())
    written = set(fields) | set(fields["counts"]) | set(fields["vms"][0])
    assert set(ticked(section)) - {"METADATA"} == written

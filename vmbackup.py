#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-3.0-or-later
"""vmbackup - backups of XenServer / XCP-ng virtual machines that are proved whole.

For each chosen VM: snapshot -> stream the export into backup_dir/VM/date-time -> prove it
whole -> write metadata, checksums and the marker `success` -> destroy the snapshot -> prune.

What it promises:
  * A folder is a backup only if it bears the marker, and the marker is made last, by one atomic
    rename, after the export was checked, flushed to disk and renamed.
  * The marker is made only if HTTP said 200, the stream ended, XAPI's task succeeded and the
    archive is complete to its last byte (every disk of the snapshot in it and filled, every chunk's
    hash right, nothing after the end). HTTP and end of stream alone prove nothing: export.ml
    answers 200 first.
  * One VM's failure never stops the others, and the exit status tells the worst that happened.
  * The password appears in no output, file, mail or argument of a child.

What it can destroy, and where:
  * on disk: marked backups that no rule of retention keeps and this program's own unfinished
    folders, never the newest whole backup, nothing with a foreign file in it (remove_folder);
    pool database dumps beyond max_backups (Run._dump); unfinished images of extract (Images)
  * on the pool: snapshots proved to be this program's (Snapshot._attempt; on hosts before 21.4.0
    their disks that are left out, too: Snapshot._make_ready), and what a restore of this program
    made and did not finish, known by its import_task (clear)

What it does not promise: that the guest's applications were quiet (snapshots are crash
consistent), that an XVA fits an older XAPI, or anything about time: see the README.

The rooms, each built on those above it; begin with `the backup of one VM`:
  errors and texts              what went wrong, in words; sizes, times, tables
  settings                      a config file and words become Settings
  password and hosts            what the first argument and host= stand for
  selection                     which VMs the rules choose: pure
  names, folders and retention  scan(); kept(): pure; remove_folder() destroys
  proofs                        prove_xva, prove_vhd, prove_raw, prove_dump; gunzip, unzstd
  the watchman                  signals and stops, progress, the rate
  the XAPI client               Endpoint: TLS; Xapi: a session and its calls
  streams                       Stream: a GET or PUT with a task of its own
  from stream to disk           fan_out(): write, hash and prove at once
  snapshot, target, the plan    plan_vm(): pure; Snapshot destroys; Target: the new folder
  RESTORE.txt                   the note in each backup
  the backup of one VM          back_up_vm(): the page that shows the order; the metadata
  choice and preview            what a run would do
  the run                       Run, which it hands to the two rooms above
  restore                       the way back; clear() destroys what one left
  list and check                what lies on disk, and whether it is late
  verify and extract            proofs of what lies on disk; images of its disks
  reports                       log, status log, report_json, metrics, mail
  the command line              help, commands, main()

Derived in behaviour from NAUbackup/VmBackup 3.25 of Northern Arizona University.
"""

import array
import base64
import collections
import contextlib
import datetime
import errno
import fcntl
import functools
import hashlib
import io
import itertools
import json
import mmap
import os
import queue
import re
import resource
import shlex
import shutil
import signal
import socket
import stat
import struct
import sys
import termios
import threading
import time
import traceback
import types
import unicodedata
import urllib.parse
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, NamedTuple

__version__ = "4.0.0"

MIB = 1 << 20
NULL = "OpaqueRef:NULL"
OUR_KEY = "vmbackup"  # in other_config of every snapshot made here
MARKERS = ("success", "success_restore", "success_compress", "success_compressing")
UNFINISHED = "unfinished.partial"  # becomes the marker by rename, so a folder bears one or other
DEFAULT_PATTERN = "backup-%Y-%m-%d-(%H:%M:%S)"


# ============================== errors and texts ==============================


class BackupError(Exception):
    """Something the user can act on; the text is one line with cause and remedy."""

    exit_code = 2
    final = False  # True: another try would end the same


class Refused(BackupError):
    """What trying again cannot change: a name, a lock, no space here."""

    final = True


class ConfigError(Refused):
    """Usage, configuration or login: nothing was started. Several lines = several mistakes."""

    exit_code = 3


class LockedError(Refused):
    """Another run holds the lock."""

    exit_code = 4


class ArchiveError(BackupError):
    """The bytes are not a whole export."""


class Interrupted(BaseException):
    """A signal asked the program to stop. No Exception: whoever catches those lets it through."""

    def __init__(self, signum):
        super().__init__("stopped by signal %d" % signum)
        self.exit_code = 128 + signum


# What XAPI's error codes mean to whoever reads the log, and what to do (datamodel_errors.ml).
ADVICE = {
    "HANDLE_INVALID": "the object is gone: deleted, or the host's toolstack was restarted",
    "HOST_IS_SLAVE": "this host is not the pool master: set host= to the master",
    "HOST_STILL_BOOTING": "the host is starting or has lost its master: try again when it is up",
    "INTERNAL_ERROR": "XAPI failed inside: look at /var/log/xensource.log on the host",
    "LICENCE_RESTRICTION": "the pool's licence does not allow this",
    "MESSAGE_METHOD_UNKNOWN": "this XAPI is too old for the call",
    "NO_HOSTS_AVAILABLE": "no live host sees all storage of this VM: an unplugged storage"
    " repository, or an ISO left in the drive? (xe vm-cd-eject)",
    "NOT_SUPPORTED_DURING_UPGRADE": "a rolling pool upgrade is under way: run again after it",
    "OPERATION_BLOCKED": "an administrator blocked this operation (blocked_operations of the VM)",
    "OTHER_OPERATION_IN_PROGRESS": "something else is working on this VM: see xe task-list",
    "RBAC_PERMISSION_DENIED": "the user lacks the role for this; root or pool-admin has it",
    "SESSION_AUTHENTICATION_FAILED": "wrong user name or password",
    "SESSION_INVALID": "the session ended: the host's toolstack was restarted",
    "SR_BACKEND_FAILURE_": "the storage repository refused: look at /var/log/SMlog on the host",
    "SR_BACKEND_FAILURE_44": "the storage repository has no space left for a snapshot or a disk",
    "SR_BACKEND_FAILURE_109": "the chain of snapshots is too long: delete snapshots of this VM and"
    " let the storage repository coalesce",
    "SR_OPERATION_NOT_SUPPORTED": "this storage repository cannot take snapshots",
    "VDI_IO_ERROR": "the host could not read or write the disk: check its storage and space",
    "VDI_IS_SHARABLE": "shared disks cannot be snapshotted",
    "VDI_ON_BOOT_MODE_INCOMPATIBLE_WITH_OPERATION": "the disk is set to reset on boot",
    "VDI_TOO_LARGE": "the disk is too large for the format (vhd ends at 2040 GiB): use raw",
    "VM_HAS_VUSBS": "a VM with USB devices passed through cannot be snapshotted",
}
FINAL = ("OPERATION_BLOCKED", "VDI_IS_SHARABLE", "VDI_ON_BOOT_MODE_INCOMPATIBLE_WITH_OPERATION",
         "VM_HAS_VUSBS", "SR_OPERATION_NOT_SUPPORTED", "VDI_TOO_LARGE", "LICENCE_RESTRICTION",
         "RBAC_PERMISSION_DENIED")


class XapiError(BackupError):
    """A failure that XAPI reported: `code` and `params` as in its ErrorDescription."""

    def __init__(self, details, doing=""):
        # A task that was cancelled tells nothing (taskHelper.ml).
        details = [str(item) for item in details] or ["TASK_CANCELLED"]
        # From v24.34 on rbac_raise hides another handler's failure in its third element.
        hidden = re.match(r"([A-Z][A-Z0-9_]+): \[", details[2]) if len(details) > 2 else None
        self.code = details[0]
        if self.code == "RBAC_PERMISSION_DENIED" and hidden:
            self.code = hidden.group(1)
        self.params = details[1:]
        self.final = self.code in FINAL
        text = without_refs(" ".join(filter(None, [self.code] + self.params)))
        advice = ADVICE.get(self.code) or ADVICE.get(self.code.rstrip("0123456789"))
        text += " (%s)" % advice if advice else ""
        super().__init__("%s: %s" % (doing, text) if doing else text)


class ConnectionLost(XapiError):
    """A call or stream broke: whether the host carried it out is not known. reason: the error, or a
    text of our own."""

    def __init__(self, reason):
        super().__init__(["CONNECTION_LOST"])
        if not isinstance(reason, str):
            reason = describe(reason).replace("ERROR - ", "")
            reason = "the connection to the host broke: %s" % without_refs(reason)
        self.args = (reason,)


def without_refs(text):
    """A text without the references of objects: a session's is worth a password."""
    return re.sub(r"(OpaqueRef(:|%3A))[\w-]+", r"\1...", text)


def describe(error):
    """One line about any exception; an OSError without Python's brackets around the number."""
    if isinstance(error, OSError) and error.strerror:
        return "%s: %s" % (error.filename, error.strerror) if error.filename else error.strerror
    return str(error) or type(error).__name__


def reason_of(error):
    """The same for what ends a VM's backup or a run; a programming error names its place here."""
    if isinstance(error, (BackupError, OSError, Interrupted)):
        return describe(error)
    here = [at.lineno for at in traceback.extract_tb(error.__traceback__)
            if at.filename == __file__]
    return "internal error, please report it: %s at line %s of vmbackup.py: %s" % (
        type(error).__name__, here[-1] if here else "?", describe(error))


def debug(log):
    """Logs where the present error came from, if the environment has VMBACKUP_DEBUG=1."""
    if os.environ.get("VMBACKUP_DEBUG") == "1":
        for line in traceback.format_exc().splitlines():
            log("DEBUG %s" % without_refs(line))


def from_argv(arg):
    """An argument as Unicode text: Python 3.6 decodes argv as ASCII where cron sets no locale."""
    return os.fsencode(arg).decode("utf-8", "surrogateescape")


def native(text):
    """Text as the file name that Python's file functions take, UTF-8 on disk in every locale."""
    return os.fsdecode(text.encode("utf-8", "surrogateescape"))


def utf8(text):
    """UTF-8 bytes of any text, lone surrogates included (they come from broken file names)."""
    return text.encode("utf-8", "surrogatepass")


def printable(text):
    """Text on one line that a terminal shows as it is: controls, bidi and surrogates escaped."""
    with contextlib.suppress(UnicodeEncodeError):
        # A native file name in an ASCII locale holds its UTF-8 bytes as surrogates.
        text = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return re.sub("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]",
                  lambda match: match.group().encode("unicode_escape").decode("ascii"), text)


def size_text(size):
    """1610612736 -> '1.5 GiB'."""
    if size < 1024:
        return plural(size, "byte")
    units = ["KiB", "MiB", "GiB", "TiB"]
    while size >= 1023.5 and units:
        size, unit = size / 1024.0, units.pop(0)
    return "%.*f %s" % (1 if size < 100 else 0, size, unit)


def time_text(seconds):
    """The two largest units of a time: '45 s', '5 min 10 s', '18 h 46 min', '3 d 2 h'."""
    seconds = int(max(seconds, 0))
    for unit, name, part, below in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"),
                                    (60, "min", 1, "s")):
        if seconds >= unit:
            rest = seconds % unit // part
            return "%d %s%s" % (seconds // unit, name, " %d %s" % (rest, below) if rest else "")
    return "%d s" % seconds


def rate_text(bytes_per_second):
    """'31 MB/s', and for slow ones '0.4 MB/s'."""
    rate = bytes_per_second / 1e6
    return "%.*f MB/s" % (0 if rate >= 10 else 1, rate)


def plural(count, noun):
    """'1 disk', '2 disks'."""
    return "%d %s%s" % (count, noun, "" if count == 1 else "s")


def table(rows, width=100, right=()):
    """Lines of a table. rows: tuples of texts, the heads first; right: numbers of the columns that
    stand to the right. A row's last cell takes what is left of `width`, in a row with fewer cells
    the other columns too, and is cut with an ellipsis there; a long first column (a VM's name)
    makes the table wider rather than losing a letter."""
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in rows if len(row) > column + 1)
              for column in range(len(rows[0]) - 1)]
    lines = []
    for row in rows:
        cells = [cell.rjust(size) if number in right else cell.ljust(size)
                 for number, (cell, size) in enumerate(zip(row[:-1], widths))]
        left = max(width - sum(len(cell) + 2 for cell in cells), 12)
        last = row[-1] if len(row[-1]) <= left else row[-1][: left - 1] + "\u2026"
        lines.append("  ".join(cells + [last]).rstrip())
    return lines


def status_word(exit_status):
    """What the status log, mail and report_json call a run that ended so."""
    return {0: "SUCCESS", 1: "WARNING"}.get(exit_status, "ERROR")


def short_host_name():
    return socket.gethostname().split(".")[0]


# ============================== settings ==============================

Setting = collections.namedtuple("Setting", "name default parse about")
Rule = collections.namedtuple("Rule", "key text name keep simple")  # a line that selects VMs
Address = collections.namedtuple("Address", "scheme host port")  # scheme unix: host = socket path
Policy = collections.namedtuple("Policy", "last daily weekly monthly yearly")  # how many to keep


def open_file(name, dir_fd=None):
    """A descriptor to read a regular file; with dir_fd no link is followed. Raises OSError, too
    (never a wait) for what is no regular file."""
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if dir_fd is None else os.O_NOFOLLOW)
    fd = os.open(name, flags, dir_fd=dir_fd)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.ENXIO, "no regular file", name)
    return fd


def read_start(name, dir_fd=None, size=4096):
    """At most `size` bytes of a file, opened by open_file."""
    with open(open_file(name, dir_fd), "rb") as file:
        return file.read(size)


def read_small(name, dir_fd=None, limit=MIB):
    """The bytes of a file. Raises OSError, too if it is larger than `limit`."""
    data = read_start(name, dir_fd, limit + 1)
    if len(data) > limit:
        raise OSError(errno.EFBIG, "larger than %s" % size_text(limit), name)
    return data


def _choice(*same, **values):
    values.update({value.lower(): value for value in same})
    return lambda text: values[text.lower()]


def _like(pattern, convert):
    def parse(text):
        if not re.match(pattern, text):
            raise ValueError
        return convert(text)

    return parse


def _number(low, high):
    def parse(text):
        if not re.match(r"[0-9]{1,18}\Z", text) or not low <= int(text) <= high:
            raise ValueError
        return int(text)

    return parse


def _several(parse):
    return lambda text: [parse(item.strip()) for item in text.split(",") if item.strip()]


def _pattern(text):
    for short, long in (("%F", "%Y-%m-%d"), ("%T", "%H:%M:%S"), ("%R", "%H:%M")):
        text = text.replace(short, long)  # strftime knows them, strptime does not
    moment = datetime.datetime(2031, 11, 23, 22, 58, 59)
    name = moment.strftime(text)
    told = parse_time(name, text)
    if "/" in name or name.startswith(".") or not told or told.date() != moment.date():
        raise ValueError
    return text


def parse_time(name, pattern):
    """The datetime that a folder name in `pattern` tells, or None for any other name."""
    try:
        moment = datetime.datetime.strptime(name, pattern)
    except (ValueError, re.error, IndexError, KeyError):
        return None
    sane = 1969 <= moment.year < 9999  # what each zone can tell; 1969 begins 1970 in the west
    return moment if sane and moment.strftime(pattern) == name else None


def _host_and_port(text):
    """(host, port or None) of `host`, `host:port`, `[v6]:port` or a bare v6 address."""
    text = "[%s]" % text if text.count(":") > 1 and "[" not in text else text
    match = re.match(r"(\[[\w:.%-]+\]|[\w.-]+)(:([0-9]{1,5}))?/?\Z", text)
    if not match or not 0 < int(match.group(3) or 1) < 65536:
        raise ValueError
    host = match.group(1).strip("[]").lower()
    host.encode("idna")  # or getaddrinfo would raise: an empty or too long label
    return host, int(match.group(3) or 0) or None


def parse_host(text):
    """Address of `host`, `host:port`, `[v6]:port`, a URL, or the path of XAPI's unix socket; else
    ValueError, for http:// to an address that is not loopback, too."""
    if text.startswith("/"):
        return Address("unix", native(text), 0)
    match = re.match("(?:(https?)://)?(.*)", text, re.IGNORECASE)
    scheme, (host, port) = (match.group(1) or "https").lower(), _host_and_port(match.group(2))
    if scheme == "http" and not is_loopback(host):
        raise ValueError
    return Address(scheme, host, port or (443 if scheme == "https" else 80))


def is_loopback(host):
    """True for localhost, 127.0.0.0/8 and ::1: traffic that does not leave this machine."""
    return host in ("localhost", "::1") or bool(re.match(r"127(\.\d{1,3}){3}\Z", host))


_flag = _choice(true=True, false=False)
_count = _number(0, 10**9)
SETTINGS = [Setting(*row) for row in (
    ("backup_dir", "/snapshots/BACKUPS", native, "folder for the backups; it must exist"),
    ("status_log", "/snapshots/NAUbackup/status.log", native, "for monitors; empty: none"),
    ("max_backups", "4", _number(1, 10**18), "how many backups to keep of each VM: 1 or more"),
    ("keep_daily", "0", _count, "keep the newest of each of the last N days, too: 0 or more"),
    ("keep_weekly", "0", _count, "as keep_daily, for ISO weeks: 0 or more"),
    ("keep_monthly", "0", _count, "as keep_daily, for months: 0 or more"),
    ("keep_yearly", "0", _count, "as keep_daily, for years: 0 or more"),
    ("vdi_export_format", "raw", _choice("raw", "vhd"), "form of a vdi-export: raw or vhd"),
    ("pool_db_backup", "0", _number(0, 1), "take a pool database backup: 0 (no) or 1 (yes)"),
    ("compress", "False", _choice("False", "True", "gzip", "zstd", none="False"),
     "compression by the host: False (or none), True or gzip, zstd"),
    ("pre_clean", "False", _flag, "True: delete the oldest backup before the new is made; False"),
    ("ignore_extra_keys", "False", _flag, "True: pass over unknown keys of the config file; False"),
    ("host", "localhost", _several(parse_host), "name, address, host:port, [v6]:port, https://...,"
     " http:// to a loopback address, with `local` a socket's path; several by commas"),
    ("username", "root", str, "user to log in as"),
    ("tls_ca", "", native, "PEM file of the CA that signed the host's certificate"),
    ("tls_fingerprint", "", _several(
        _like(r"(:?[0-9A-Fa-f]){64}\Z", lambda text: text.replace(":", "").lower())),
     "SHA-256 of the host's certificate: 64 hex digits, colons allowed; several by commas"),
    ("tls_verify", "True", _flag, "True; False: the host's certificate is not checked"),
    ("parallel", "1", _number(1, 1000), "how many VMs are exported at a time: 1 or more"),
    ("rate_limit", "0", _count, "MB/s for all exports together, or a restore; 0: no limit"),
    ("retries", "0", _count, "how often a failed VM is tried again after all others: 0 or more"),
    ("space_check", "True", _flag, "True: no snapshot where the export will not fit; False"),
    ("require_mount", "False", _flag, "True: no run where backup_dir is on the disk of /; False"),
    ("backup_dir_pattern", DEFAULT_PATTERN, _pattern,
     "a backup's folder: strftime, at least year, month and day, no slash"),
    ("mail_to", "", _several(str), "receivers, by commas; mail_from and smtp_server go with it"),
    ("mail_from", "", str, "sender of the mail"),
    ("smtp_server", "", _host_and_port, "mail server: a name, an address, or host:port"),
    ("smtp_port", "25", _number(1, 65535), "its port: 1 to 65535 (465: TLS from the first byte)"),
    ("smtp_starttls", "False", _flag, "encrypt the mail's transport with STARTTLS: True or False"),
    ("smtp_user", "", str, "login at the mail server"),
    ("smtp_password_file", "", native, "its password, in a file made by create-password-file"),
    ("smtp_ca", "", native, "PEM file of the CA that signed the mail server's certificate"),
    ("mail_when", "always", _choice("always", "problems", "never"), "always, problems or never"),
    ("report_json", "", native, "report of the run as JSON, replaced at the end of every run"),
    ("metrics_file", "", _like(r".*\.prom\Z", native), "file *.prom for node_exporter"),
)]
KNOWN = {setting.name: setting for setting in SETTINGS}
RULE_KEYS = ("vm-export", "vdi-export", "exclude")
KEYS = tuple(KNOWN) + RULE_KEYS


class Settings(types.SimpleNamespace):
    """All settings as attributes, `rules` (the VM selectors in order), `only` (those of only=),
    `warnings` that count as the run's, and `notes` that do not."""

    def __init__(self):
        super().__init__(rules=[], only=[], warnings=[], notes=[], config_file=None)
        for item in SETTINGS:
            setattr(self, item.name, item.parse(item.default) if item.default else None)

    def policy(self, keep=None):
        """The Policy of a VM; keep: its selector's own `:N`."""
        return Policy(keep or self.max_backups, self.keep_daily, self.keep_weekly,
                      self.keep_monthly, self.keep_yearly)


def read_config(data, source):
    """[(key, value, where)] of a config file's bytes; value None: a line without '='."""
    if b"\0" in data:
        raise ConfigError("ERROR - %s is not a config file: binary" % source)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError("ERROR - %s is not UTF-8 text (byte %d): convert it, for example with"
                          " iconv -f latin1 -t utf-8" % (source, error.start)) from None
    pairs = []
    for number, line in enumerate(re.split("\r\n|\n|\r", text), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        key, separator, value = line.partition("=")
        value = value.strip()
        if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'":
            value = value[1:-1]
        where = "%s line %d" % (source, number)
        pairs.append((key.strip().lower(), value if separator else None, where))
    return pairs


def load_config(path):
    """read_config of the file. Raises ConfigError, with no word of the file's where none of its
    lines begins with a setting's name: it may be a password file."""
    try:
        data = read_small(path)
    except OSError as error:
        raise ConfigError("ERROR - cannot read %s" % describe(error)) from None
    pairs = read_config(data, path)
    if pairs and not any(key in KEYS for key, _, _ in pairs):
        raise ConfigError("ERROR - %s is no config file: none of its lines begins with the name of"
                          " a setting (for a VM of that name: vm-export=NAME)" % path)
    return pairs


def make_rule(key, value):
    """The Rule of one selector's value; `:N` is read only from its end (not exclude's, only's)."""
    name, keep = value, None
    match = re.match(r"(.*):([+-]?[0-9]+)\Z", value, re.DOTALL)
    if match and key in ("vm-export", "vdi-export"):
        name, keep = match.group(1).rstrip(), int(match.group(2)[:4000])  # Python has a limit
        if keep < 1:
            raise ConfigError("ERROR - max_backups must be 1 or more: %s=%s" % (key, value))
    # Simple: letters and digits of any script, ' ', '-', '_'. An empty vm-export= means all VMs.
    simple = all(char in " -_" or unicodedata.category(char)[0] in "LMN" for char in name)
    return Rule(key, "%s=%s" % (key, value), name, keep, simple and bool(name))


def make_settings(config, words):
    """Settings from `config` (read_config's pairs) and then `words` [(key, value, where)]. Raises
    ConfigError with a line for each mistake: unknown name, value not allowed."""
    settings, mistakes, seen = Settings(), [], set()
    ignore = str(dict(pair[:2] for pair in config + words).get("ignore_extra_keys"))
    for number, (key, value, where) in enumerate(config + words):
        in_file = number < len(config)
        try:
            if in_file and ignore.lower() == "true" and key not in KEYS:
                settings.notes.append("ignoring config key: %s" % key)
            elif key in RULE_KEYS and value is not None:
                if value or key == "vm-export":
                    settings.rules.append(make_rule(key, value))
                else:
                    settings.warnings.append("***WARNING - empty %s= is passed over" % key)
            elif key == "only" and value and not in_file:
                settings.only.append(make_rule(key, value))
            else:
                parsed = _parse_setting(key, value, where)
                if key == "smtp_server" and parsed:
                    parsed, settings.smtp_port = parsed[0], parsed[1] or settings.smtp_port
                setattr(settings, key, parsed)
                if key in seen and in_file:
                    settings.warnings.append("***WARNING - %s: %s is given twice, the last one"
                                             " counts" % (where, key))
                seen.add(key)
        except ConfigError as error:
            mistakes.append(str(error))
    absent = [key for key in ("mail_to", "mail_from", "smtp_server") if not getattr(settings, key)]
    if len(absent) in (1, 2) and not mistakes:
        mistakes.append("ERROR - for a mail %s must be set, too" % " and ".join(absent))
    safe = settings.smtp_starttls or settings.smtp_port == 465
    safe = safe or is_loopback(settings.smtp_server or "")
    if settings.smtp_user and not (safe and settings.smtp_password_file):
        mistakes.append("ERROR - smtp_user needs smtp_password_file, and smtp_starttls=True or"
                        " smtp_port=465, lest its password goes in clear")
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    return settings


def similar(word, names):
    """The one of `names` that is spelled most like `word`, whatever the case, or ''."""
    import difflib

    plain = {unicodedata.normalize("NFC", name).casefold(): name for name in names}
    word = unicodedata.normalize("NFC", word).casefold()
    return "".join(plain[name] for name in difflib.get_close_matches(word, plain, 1, 0.66))


def allowed(word, names):
    """The end of a message about a word that is none of `names`: the one spelled alike, or all."""
    near = similar(word, names)
    return "did you mean %s?" % near if near else "allowed are " + ", ".join(names)


def meant(value):
    """What a value that fits nothing probably means, as the end of a message; or ''."""
    if " #" in value:
        return " (a comment stands on a line of its own, not behind a value)"
    if re.match(r"[\"'].*[\"'](:[0-9]+)?\Z", value):
        return " (leave the quotes out, or put them around all of the value, its :N too)"
    if re.search("[,;]", value):
        return " (one name or expression a line, or joined by |: web|db)"
    if re.match(r"[\w .*?-]+\Z", value) and re.search(r"(^|[^.])\*", value):
        wild = value.replace(".", "\\.").replace("?", ".").replace("*", ".*")
        return " (a shell pattern? Here any characters are .* and this is written %s)" % wild
    return ""


def _parse_setting(key, value, where):
    if value is None:
        raise ConfigError("ERROR - %s: no '=' in %s" % (where, key[:80]))
    if key not in KNOWN:
        raise ConfigError("ERROR - %s: unknown setting %s, %s" % (where, key, allowed(key, KEYS)))
    setting = KNOWN[key]
    if not value and (not setting.default or key == "status_log"):
        return None
    with contextlib.suppress(ValueError, KeyError):
        parsed = setting.parse(value)
        if parsed not in ("", []):
            return parsed
    raise ConfigError("ERROR - %s: %s=%s is not allowed; %s%s" % (
        where, key, value, setting.about, meant(value) if " #" in value else ""))


# ============================== password and hosts ==============================
#
# No message here shows the first argument: it may be the password, or by mistake something else's.


def read_line(stream):
    """The first line of standard input, as bytes; asked for, and not shown, where that is a
    terminal. (The module getpass would decode it by the locale: in dom0's Python 3.6 often ASCII.)
    """
    if not stream.isatty():
        return stream.buffer.readline(MIB)
    fd = stream.fileno()
    before = termios.tcgetattr(fd)
    hidden = before[:3] + [before[3] & ~termios.ECHO] + before[4:]
    termios.tcsetattr(fd, termios.TCSAFLUSH, hidden)  # it drops what was typed: first this
    try:
        print("Password: ", end="", file=sys.stderr, flush=True)
        return stream.buffer.readline(MIB)
    finally:
        termios.tcsetattr(fd, termios.TCSAFLUSH, before)
        print(file=sys.stderr, flush=True)


def read_password_file(path, plain=False):
    """The password in a file made by create-password-file, or by `base64`, without one line break
    at its end; plain: or else the file's text. Raises ConfigError."""
    try:
        data = read_small(path).strip()
    except OSError as error:
        raise ConfigError("ERROR - the password file cannot be read: %s" % error.strerror) from None
    try:
        text = base64.b64decode(b"".join(data.split()) or b"-", validate=True).decode("utf-8")
        return re.sub(r"\r?\n\Z", "", text)
    except ValueError:  # an empty file is none either
        if plain and data:
            return data.decode("utf-8", "replace")
        raise ConfigError("ERROR - the file is no password file: create-password-file makes one, in"
                          " place of no other file (also of a password that is a file's name)"
                          ) from None


def read_password(word, literal=False):
    """The password that the first argument stands for. literal: whatever file has that name."""
    if word == "-":
        line = read_line(sys.stdin) if sys.stdin else b""
        if not line:
            raise ConfigError("ERROR - no password was given on standard input")
        word = line.decode("utf-8", "surrogateescape").rstrip("\r\n")
    elif os.path.isfile(native(word)) and not literal:
        return read_password_file(native(word))
    elif word.startswith(("/", "./", "~/")) and not literal:
        raise ConfigError("ERROR - there is no such password file (a password that begins so goes"
                          " into one by create-password-file, or through -)")
    try:
        word.encode("utf-8")
    except UnicodeEncodeError:
        raise ConfigError("ERROR - the password is not UTF-8 text") from None
    return word


def credentials(settings, word):
    """(user name, password) of the first argument; the socket asks for neither."""
    return ("root", "") if word == "local" else (settings.username, read_password(word))


# ============================== selection ==============================

# One VM to back up. `refs` has one entry if all is well, none if no VM bears the name.
Choice = collections.namedtuple("Choice", "kind name refs keep")
Selection = collections.namedtuple(
    "Selection", "choices excluded left unknown_excludes unmatched notes")


def select(rules, names, only=()):
    """Which VMs the rules choose: a Selection, in the order of a run. names: {name: [ref, ...]} of
    all candidates; only: Rules that narrow what was chosen. Pure. Raises ConfigError."""
    every, choices = sorted(names), []
    found = _match(rules, every)
    owners = {name: rule for rule, hits in found if rule.key == "exclude" for name in hits}
    excluded = list(owners)
    for kind in ("vdi-export", "vm-export"):
        simple = {rule.name: rule for rule in rules if rule.key == kind and rule.simple}
        regex = {name: rule for rule, hits in found if rule.key == kind and not rule.simple
                 for name in hits}
        for name, rule in {**simple, **regex, **simple}.items():  # simple ones come first, and win
            if name not in owners:
                owners[name] = rule
                choices.append(Choice(kind, name, names.get(name, []), rule.keep))
    taken = {choice.name for choice in choices}
    left = [name for name in every if name not in taken]
    wanted = _match(only, sorted(taken))
    if only:
        kept = {name for _, hits in wanted for name in hits}
        choices = [choice for choice in choices if choice.name in kept]
        if not choices:
            raise ConfigError("ERROR - none of the VMs that are chosen matches %s" % " or ".join(
                rule.text + _hint(rule, taken) for rule in only))
    lost = [rule for rule, hits in found + wanted if not hits]
    return Selection(
        choices, excluded, left, [rule.name for rule in lost if rule.key == "exclude"],
        [rule.text + _hint(rule, every) for rule in lost
         if rule.key == "only" or (rule.key != "exclude" and not rule.simple)],
        _notes(found, owners, every))


def _match(rules, names):
    """[(Rule, the names that it matches)]; a name that is exactly its value is always meant, too.
    Raises ConfigError with a line for each that neither compiles nor is a name."""
    found, mistakes, there = [], [], set(names)
    for rule in rules:
        hits = [rule.name] if rule.name in there else []
        try:
            if not rule.simple:
                match = re.compile(rule.name).match
                hits = [name for name in names if name == rule.name or match(name)]
        except (re.error, ValueError, OverflowError, RecursionError):
            if not hits:
                mistakes.append("***ERROR - invalid regex: %s%s" % (rule.text, meant(rule.name)))
        found.append((rule, hits))
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    return found


def _notes(found, owners, every):
    """Lines about rules that do something else than was perhaps meant."""
    notes, decided = [], {id(rule) for rule in owners.values()}
    for rule, hits in found:
        text, hint = "NOTE - %s: " % rule.text, "" if hits else _hint(rule, every)
        if hint and (rule.simple or rule.key == "exclude"):
            notes.append(text + "no VM bears this name" + hint)
        elif hits and id(rule) not in decided and rule.key != "exclude":
            by = dict.fromkeys(owners[name].text for name in hits)
            notes.append("%sall its VMs were taken by %s" % (text, ", ".join(by)))
        if rule.name in hits and not rule.simple:
            others = [name for name in hits if name != rule.name]
            notes.append("%sthe VM of just this name is meant; it is no simple name and may match"
                         " others too%s" % (text, ": " * bool(others) + ", ".join(others[:5])))
    return notes


def _hint(rule, names):
    """What a rule that matches nothing probably means, in brackets, or ''."""
    near = similar(rule.name, names)
    return meant(rule.name) or (' (perhaps "%s" is meant)' % near if near else "")


# ============================== names, folders and retention ==============================
#
# remove_folder is the one place that deletes backups on disk. kept() alone says which stay.


class Folder(NamedTuple):
    """What scan found of a folder in a VM's folder."""

    name: str
    created: Any = None  # seconds since 1970; None: no known pattern fits the name: nobody's
    marker: Any = None  # the name of a regular file; without one it is no backup
    unfinished: bool = False  # no marker, and empty or with something *.partial
    pinned: bool = False
    export: Any = None  # its file name
    size: int = 0  # of the export; 0: none
    uuid: str = ""  # orig_uuid of vm.cfg
    date: Any = None  # the day that the name tells, or else `created`: local
    error: str = ""  # why it cannot be read
    foreign: Any = None  # the first name that is not ours (judge looks closer)
    label: str = ""  # name_label of vm.cfg
    made: Any = None  # when, by its run's clock: `created` is the order, which only ever rises


EXPORT = re.compile(r"(?!\._)(.*)\.(xva|xva\.gz|xva\.zst|raw|vhd)\Z", re.DOTALL)
OWN_FILES = re.compile(
    r"(vm-metadata\.xml|vm\.cfg|RESTORE\.txt|SHA256SUMS|keep|"
    r"success|success_(restore|compress|compressing)|unfinished\.partial|"
    r"DISK-[^/]*/(vbd|vdi)\.cfg|VIFs/vif-[^/]*\.cfg)\Z", re.DOTALL)
OWN_FOLDERS = re.compile(r"(DISK-[^/]*|VIFs)\Z", re.DOTALL)
# What file servers and desktops strew about, as a path below a backup's folder; that of a folder
# ends in "/". Not recycle bins nor snapshots (#recycle, @Recycle, .snapshot): these are users'.
STREWN = re.compile(
    r"(.*/)?(\.DS_Store\Z|\.apdisk\Z|\.localized\Z|\._[^/]+\Z|(?i:thumbs\.db\Z|ehthumbs\.db\Z|"
    r"ehthumbs_vista\.db\Z|desktop\.ini\Z)|\.nfs[^/]+\Z|\.__?smb[^/]+\Z|"
    r"\.smbdelete[^/]+\Z|\.fuse_hidden[^/]+\Z|(@eaDir|@SynoEAStream|@SynoResource|\.@__thumb|"
    r"\.AppleDouble|\.AppleDB|\.AppleDesktop)/)", re.DOTALL)
NO_FOLDER = (errno.ENOTDIR, errno.ELOOP)  # which of them a link is depends on the kernel
ABSENT = (errno.ENOENT, errno.ENXIO) + NO_FOLDER  # gone, or of another kind
FIRST_DISKS = ["DISK-%s/vdi.cfg" % label for label in ("xvda", "hda", "sda", "0")]
AHEAD = 3600  # seconds by which clocks may differ
DEEPEST = 8  # folders below each other in a backup's folder; @eaDir has three
PERIODS = {"daily": "%Y-%m-%d", "weekly": "%G-%V", "monthly": "%Y-%m", "yearly": "%Y"}


@functools.lru_cache(maxsize=None)
def folder_name(name):
    """The file name for a VM's name: at most 200 bytes, never '', '.', '..' or hidden, another for
    each name. What is longer is cut and ended with ~ and 8 hex digits of the name's SHA-256."""
    escaped = re.sub("[\x00-\x1f\x7f-\x9f/%\ud800-\udfff]|^[.]",
                     lambda match: "".join("%%%02X" % byte for byte in utf8(match.group())), name)
    data = escaped.encode("utf-8")
    # A name that looks like a cut one is hashed too, or it could meet the longer one's folder.
    if len(data) > 200 or (len(data) > 190 and re.search(r"~[0-9a-f]{8}\Z", escaped)):
        kept = re.sub("%.?\\Z", "", data[:191].decode("utf-8", "ignore"))
        return "%s~%s" % (kept, hashlib.sha256(utf8(name)).hexdigest()[:8])
    return escaped or "%"


def vm_name(folder):
    """The VM's name that a folder's name on disk tells: folder_name undone (a cut one stays)."""
    text = "" if folder == "%" else from_argv(folder)
    try:
        return urllib.parse.unquote_to_bytes(utf8(text)).decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:  # 3.25 wrote a % as it is
        return text


def open_folder(name, dir_fd=None):
    """A descriptor of a folder. Only where the user named it (dir_fd None) may it be a link."""
    link = 0 if dir_fd is None else os.O_NOFOLLOW
    return os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | link, dir_fd=dir_fd)


@contextlib.contextmanager
def opened(name, dir_fd=None):
    fd = open_folder(name, dir_fd)
    try:
        yield fd
    finally:
        os.close(fd)


def read_cfg(name, dir_fd):
    """{key: value} of a .cfg file of a backup, line breaks and backslashes in their own form."""
    pairs = {}
    for line in read_small(name, dir_fd).decode("utf-8", "replace").split("\n"):
        key, _, value = line.partition("=")
        pairs[key] = value if "\\" not in value else re.sub(
            r"\\([nr\\])", lambda match: {"n": "\n", "r": "\r"}.get(match.group(1), "\\"), value)
    return pairs


def look_into(fd):
    """(name of its export, {path: SHA-256} of SHA256SUMS, whether its marker is this program's) of
    a backup's folder. 3.25 wrote no sums."""
    inside = [name for name in os.listdir(fd) if not STREWN.match(name)]
    marker, text = read_marker(fd)
    exports, sums = [name for name in inside if EXPORT.match(name)], {}
    if not marker:
        raise ArchiveError("no marker in the folder: it is no backup")
    if UNFINISHED in inside:
        raise ArchiveError("%s stands beside the marker: a copy made during a run?" % UNFINISHED)
    if len(exports) != 1:
        raise ArchiveError("%d exports in the folder, one belongs there" % len(exports))
    listed = read_small("SHA256SUMS", fd) if "SHA256SUMS" in inside else b""
    for line in filter(None, listed.decode("utf-8", "surrogateescape").split("\n")):
        match = re.match(r"(\\?)([0-9a-f]{64}) [ *]([^\0]+)\Z", line)
        if not match:
            raise ArchiveError("SHA256SUMS is damaged")
        path = native(match.group(3).replace("\\\\" if match.group(1) else "\\", "\\"))
        if path in sums or {"", ".", ".."}.intersection(path.split("/")):
            raise ArchiveError("SHA256SUMS lists %s twice or outside the folder" % path)
        sums[path] = match.group(2)
    for path in list(sums):  # a file server may list names in another Unicode form
        if nfc(path) == nfc(exports[0]):
            sums[exports[0]] = sums.pop(path)
    if "SHA256SUMS" in inside and exports[0] not in sums:
        raise ArchiveError("SHA256SUMS does not list %s" % exports[0])
    return exports[0], sums, text.startswith(b"created=")


def scan(vm_fd, patterns, vm=None):
    """The Folders in a VM's folder, unknown ones included. patterns: of their names, for strptime;
    None: any that our marker dates will do. vm: the name of the VM's folder on disk, which exports
    have to bear (None: any). Raises OSError if the VM's folder itself cannot be read."""
    found = []
    for name in os.listdir(vm_fd):
        text, item = from_argv(name), Folder(name)
        moments = (parse_time(text, pattern) for pattern in patterns or [DEFAULT_PATTERN])
        for moment in filter(None, moments):
            then = moment.timestamp()
            item = Folder(name, then, date=moment.date(), made=then)
            break
        ours = patterns is None or item.created is not None
        try:
            with opened(name, vm_fd) as fd:
                seen = _look(fd, item, vm) if ours else item
                found.append(seen if seen.created is not None else item)
        except OSError as error:
            if error.errno not in ABSENT:
                found.append(item._replace(error=describe(error) if ours else ""))
    return found


def _look(fd, item, vm):
    """The Folder `item`, of which the name alone is known, with what is in it."""
    inside, cfg, size = os.listdir(fd), {}, 0
    marker, text = read_marker(fd)
    told = re.match(rb"created=([0-9]{1,11})\n(?:made=([0-9]{1,11})\n)?", text)
    if told:  # in UTC: right through changes of the clock and of the zone
        made = float(told.group(2) or told.group(1))
        day = datetime.date.fromtimestamp(made)
        item = item._replace(  # a second one of a day may bear the next day's name
            created=float(told.group(1)), made=made, date=min(item.date or day, day))
    export = min((name for name in inside if EXPORT.match(name) and _may_lie(name, vm)),
                 default=None)
    with contextlib.suppress(OSError):
        there = os.stat(export or ".", dir_fd=fd, follow_symlinks=False)
        size = there.st_size if stat.S_ISREG(there.st_mode) else 0
    with contextlib.suppress(OSError):
        cfg = read_cfg("vm.cfg", fd)
    rest = [name for name in inside if not STREWN.match(name) and not STREWN.match(name + "/")]
    foreign = [name for name in rest if not OWN_FOLDERS.match(name) and not _may_lie(name, vm)]
    begun = not rest or any(name.endswith(".partial") for name in rest)
    return item._replace(
        marker=marker, unfinished=begun and not marker and "keep" not in inside,
        pinned="keep" in inside, export=export, size=size, uuid=cfg.get("orig_uuid", ""),
        foreign=min(foreign, default=None), label=cfg.get("name_label", ""))


def read_marker(fd):
    """(name of a folder's marker or None, what it says). OSError for one that cannot be read: such
    a folder is not known to be unfinished."""
    for name in MARKERS:
        try:
            return name, read_start(name, fd)
        except OSError as error:
            if error.errno not in ABSENT:
                raise
    return None, b""


# --- retention: pure ---


def backups(folders):
    """The folders that are backups: with a marker and a known date, oldest first."""
    good = [item for item in folders if item.marker and item.created is not None]
    return sorted(good, key=lambda item: (item.created, item.name))


def whole(folder):
    """Whether a Folder is a backup that has an export: no more than a look can tell."""
    return bool(folder.marker and folder.created is not None and folder.size)


def kept(folders, policy, newest=None, uuid="", pre_clean=False):
    """{name: [reason, ...]} of the backups that stay, oldest first. Each rule looks at all of them
    for itself. newest: name of the backup just made, the newest whatever the clock says. uuid: that
    of the present VM ("": of the newest backup that tells one). pre_clean: one more is about to be
    made, so the last are one fewer."""
    order = [item for item in backups(folders) if not item.pinned]
    order = sorted(order, key=lambda item: item.name == newest)[::-1]
    why = {item.name: ["pinned"] if item.pinned else [] for item in backups(folders)}
    last = max(policy.last - bool(pre_clean), 1)
    for item in order[:last]:
        why[item.name].append("last %d" % last)
    for rule, period in PERIODS.items():
        found = collections.defaultdict(list)
        for item in order:
            found[item.date.strftime(period)].append(item)
        for items in list(found.values())[: getattr(policy, rule)]:
            item = next(filter(whole, items), items[0])  # the newest may have lost its export
            why[item.name].append(rule)
    present, owners = uuid or next((item.uuid for item in order if item.uuid), ""), {}
    for item in filter(whole, order):
        owners.setdefault(item.uuid or present, item)
    for number, (owner, item) in enumerate(list(owners.items())[: max(policy.last, 1)]):
        why[item.name] += ["newest whole"] if owner == present or not number else []
        why[item.name] += ["another VM's"] if owner != present else []
    return {name: reasons for name, reasons in why.items() if reasons}


def expired(folders, policy, newest=None, uuid="", pre_clean=False):
    """Names of the backups that nothing keeps, oldest first."""
    stay = kept(folders, policy, newest, uuid, pre_clean)
    return [item.name for item in backups(folders) if item.name not in stay]


# --- deletion ---


def _may_lie(path, vm):
    """Whether a file of this path may lie in a backup's folder. An export bears the name of the
    VM's folder: anything else.raw may be what a user unpacked."""
    export = EXPORT.match(path[:-8] if path.endswith(".partial") else path)
    if export and not STREWN.match(path):  # .AppleDouble/NAME.xva
        return vm is None or nfc(vm) == nfc(export.group(1))
    return bool(OWN_FILES.match(path) or STREWN.match(path))


def nfc(name):
    return unicodedata.normalize("NFC", from_argv(name))  # a file server may give back another


def judge(fd, vm, above=""):
    """[(name, the same list of what is in it: None for a file)] of a backup's folder. Raises
    BackupError if it must not be deleted: pinned, or not all is ours, as links, devices, other file
    systems and deep nests never are; OSError. vm: name of the VM's folder on disk."""
    found, device = [], os.fstat(fd).st_dev
    for name in sorted(os.listdir(fd)):
        path, there, inner = above + name, os.stat(name, dir_fd=fd, follow_symlinks=False), None
        folder = stat.S_ISDIR(there.st_mode)
        ours = stat.S_ISREG(there.st_mode) and _may_lie(path, vm)
        if folder and there.st_dev == device and path.count("/") < DEEPEST:
            ours = OWN_FOLDERS.match(path) or STREWN.match(path + "/")
        if not ours:
            raise BackupError("it holds %s, which is not ours" % path)
        if path == "keep":
            raise BackupError("its file `keep` pins it")
        if folder:
            with opened(name, fd) as inside:
                inner = judge(inside, vm, path + "/")
        found.append((name, inner))
    return found


def remove_folder(vm_fd, name, vm):
    """Deletes a backup's folder in the VM's folder `vm_fd` (called `vm` on disk): only what was
    judged. Raises BackupError, with nothing changed, if it is a link, pinned, or anything foreign
    is in it."""
    try:
        with opened(name, vm_fd) as fd:
            _empty(fd, judge(fd, vm))
    except OSError as error:
        if error.errno not in NO_FOLDER:
            raise
        raise BackupError("%s is a symbolic link or no folder: left alone" % name) from None
    except BackupError as error:
        raise BackupError("%s is left alone: %s" % (name, error)) from None
    os.rmdir(name, dir_fd=vm_fd)


def _empty(fd, tree):
    """Deletes what judge() found. The marker becomes UNFINISHED first, which goes last: a deletion
    that is cut short leaves what the next run knows as unfinished, never as a backup. The export
    goes first of the rest; where that fails, the marker comes back and nothing is lost."""
    markers = [marker for marker in MARKERS if (marker, None) in tree]
    for marker in reversed(markers):
        os.rename(marker, UNFINISHED, src_dir_fd=fd, dst_dir_fd=fd)
    with contextlib.suppress(OSError):  # some file systems flush no folders
        os.fsync(fd)
    try:
        _delete(fd, sorted(tree + [(UNFINISHED, None)], key=lambda item: (
            item[0] == UNFINISHED, item[0].endswith(".partial"), not EXPORT.match(item[0]))))
    except OSError:
        if markers and any(map(EXPORT.match, os.listdir(fd))):
            os.rename(UNFINISHED, markers[0], src_dir_fd=fd, dst_dir_fd=fd)
        raise


def _delete(fd, tree):
    for name, inner in tree:
        if inner is None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name, dir_fd=fd)
        else:
            with opened(name, fd) as inside:
                _delete(inside, inner)
            os.rmdir(name, dir_fd=fd)


# ============================== proofs ==============================
# A proof reads an export's pieces (memoryviews, each valid until the next is asked for) to the end
# and returns what it proved, in phrases; one that begins with NOT names what it could not. Bytes
# that cannot be a whole export raise ArchiveError. No network here, and no file of a backup.

ROUNDING = 2 * MIB  # by so much may a disk come larger than its virtual_size: the host rounds up
METADATA_LIMIT = 256 * MIB  # bytes of an ova.xml
DUMP_LIMIT = 4096 * MIB  # bytes of a dump of the pool's database
SMALL = "; XAPI cannot import a disk of 1 MiB or less that stands before others: enlarge the disk"


class Reader:
    """Takes pieces apart into just so many bytes. at: bytes taken; where: the place, in words."""

    def __init__(self, pieces, where):
        self._pieces, self._left = filter(len, pieces), b""
        self.where, self.at = where, 0

    def some(self, most):
        """A view of the next bytes, at most so many, valid until the next; at the end b""."""
        self._left = self._left or next(self._pieces, b"")
        view, self._left = self._left[:most], self._left[most:]
        self.at += len(view)
        return view

    def stream(self, size):
        """The next `size` bytes as views."""
        end = self.at + size
        while self.at < end:
            view = self.some(end - self.at)
            if not view:
                raise ArchiveError("it is cut off at %s (byte %d)" % (self.where, self.at))
            yield view

    def take(self, size):
        data = bytearray()
        for view in self.stream(size):
            data += view
        return data

    def skip(self, size):
        for _ in self.stream(size):
            pass

    def end(self, most=0):
        """Reads on to the end of the pieces: at most so many bytes more, all of them zeros."""
        last = self.at + most
        for view in iter(lambda: self.some(MIB), b""):
            if self.at > last or bytes(view).strip(b"\0"):
                raise ArchiveError("data after the end, or more than %s of zeros" % size_text(most))


# --- XVA ---


def find_xxh64():
    """What makes XXH64 hashes, with update and hexdigest as hashlib's: the package xxhash or the
    system's libxxhash; None where there is neither."""
    with contextlib.suppress(ImportError):
        from xxhash import xxh64

        return xxh64
    with contextlib.suppress(ImportError, OSError, AttributeError):
        import ctypes

        function = ctypes.CDLL("libxxhash.so.0").XXH64
        function.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_ulonglong
        function.restype = ctypes.c_ulonglong

        class Xxh64(bytearray):  # of a chunk's size: hashed at once
            update = bytearray.extend

            def hexdigest(self):
                data = (ctypes.c_char * len(self)).from_buffer(self)
                return "%016x" % function(data, len(self), 0)

        return Xxh64
    return None


# A disk in an ova.xml: virtual_size in bytes, label as label_disks() makes it, the VDI's name.
OvaDisk = collections.namedtuple("OvaDisk", "size label name")


def label_disks(vbds):
    """[(label, VBD record)] of those that are no CDs, by userdevice."""
    found = {}
    for vbd in sorted(vbds, key=lambda vbd: vbd["userdevice"].zfill(4)):
        if vbd["type"] != "CD":
            label = vbd.get("device") or vbd["userdevice"]
            label += "-" + vbd["userdevice"] if label in found else ""  # a device may be stale
            found[label] = vbd
    return found.items()


def parse_ova(data, uuids=()):
    """(version, {class: {id: record}}, {id: OvaDisk} of the disks that the export has to hold) of
    an ova.xml: one XML-RPC value, with a prolog or without. Raises ArchiveError, too if it lacks a
    VDI of `uuids`: one that was destroyed since the snapshot leaves no other trace in an export
    (export.ml)."""
    import xmlrpc.client

    if b"<!DOCTYPE" in data or b"<!ENTITY" in data:
        raise ArchiveError("ova.xml is not XAPI's")
    data = b"<params><param>%s</param></params>" % re.sub(rb"^\s*<\?xml[^>]*>", b"", data)
    found, disks = collections.defaultdict(dict), {}
    try:
        value: Any = xmlrpc.client.loads(data)[0][0]
        version = value.get("version")
        for item in value["objects"]:
            found[item["class"]][item["id"]] = item["snapshot"]
        labels = [("suspend", vm.get("suspend_VDI")) for vm in found["VM"].values()]
        labels += [(label, vbd["VDI"]) for label, vbd in label_disks(found["VBD"].values())]
        for label, ref in labels:
            vdi = found["VDI"].get(ref, {})
            sr = found["SR"].get(vdi.get("SR"), {})
            if vdi and ref not in disks and sr.get("content_type") != "iso":
                disks[ref] = OvaDisk(int(vdi["virtual_size"]), label, vdi.get("name_label"))
        absent = set(uuids) - {vdi.get("uuid") for vdi in found["VDI"].values()}
        if not all(0 <= disk.size < 1 << 62 for disk in disks.values()):
            raise ValueError("no disk has such a size")
    except Exception as error:  # hostile bytes make the unmarshaller raise nearly anything
        raise ArchiveError("ova.xml cannot be read: %s" % describe(error)) from None
    if absent:
        raise ArchiveError("a disk of the snapshot is not in it: VDI %s" % min(absent))
    return version, found, disks


def read_member(reader, block):
    """(name, size) of a tar header, that of a plain file."""
    field, length, told, kind = struct.unpack("100s24x12s12x8sc355x", block)
    try:
        mine = sum(block) - sum(told) + 8 * ord(" ")
        name, size = field.split(b"\0")[0].decode("utf-8"), int(length.strip(b"\0 "), 8)
        if int(told.strip(b"\0 "), 8) != mine or size < 0:
            raise ValueError
    except ValueError:
        raise ArchiveError("no tar header behind " + reader.where) from None
    if kind not in b"0\0":
        raise ArchiveError("unexpected kind of member: %r" % name)
    reader.where = name
    return name, size


def take_ova(reader):
    """The bytes of ova.xml, an export's first member."""
    name, size = read_member(reader, reader.take(512))
    if name != "ova.xml" or not 0 < size <= METADATA_LIMIT:
        raise ArchiveError("the archive does not begin with ova.xml")
    data = reader.take(size)
    reader.skip(-size % 512)
    return data


def read_header(reader):
    """(disk's id, number, name, bytes) of the next chunk; (None, 0, "", 0) at the end."""
    block = reader.take(512)
    if not block.strip(b"\0"):
        if reader.take(512).strip(b"\0"):
            raise ArchiveError("one zero block only before more data")
        return None, 0, "", 0
    name, size = read_member(reader, block)
    match = re.match(r"([^/]+)/([0-9]{8,18})\Z", name)
    if not match or size > 64 * MIB:
        raise ArchiveError("unexpected member %r" % name)
    return match.group(1), int(match.group(2)), name, size


def read_chunk(reader, name, size, makers, sink, at):
    """Reads a chunk's bytes, which sink(offset, view) gets (None: nobody) from the offset `at` on,
    and the member with its hash, which follows. makers: {the member's suffix: what makes its hash,
    or None}; in an archive all have the same, so the others go. Returns whether the hash proved the
    chunk."""
    hashes = {kind: make() for kind, make in makers.items() if make}
    for view in reader.stream(size):
        for each in hashes.values():
            each.update(view)
        if sink:
            sink(at, view)
        at += len(view)
    reader.skip(-size % 512)
    member, length = read_member(reader, reader.take(512))
    kind = member[len(name):]
    if name + kind != member or kind not in makers or not 0 < length <= 64:
        raise ArchiveError("the hash of chunk %s is missing" % name)
    told = reader.take(512)[:length].decode("ascii", "replace").lower()
    if kind in hashes and hashes[kind].hexdigest() != told:
        raise ArchiveError("chunk %s does not match its hash" % name)
    for other in set(makers) - {kind}:
        del makers[other]
    return kind in hashes


def prove_xva(pieces, uuids=(), sink=None):
    """Proves an XVA whole: tar headers, ova.xml, chunks in order, each with its hash, every disk
    filled to its virtual_size, two zero blocks, then at most 1 MiB of zeros. uuids: the VDIs that
    have to be in it. sink(id, offset, view) gets the chunks' bytes, before their hashes are seen,
    but first sink("ova.xml", 0, bytes).

    Format and arithmetic follow xen-api's export.ml and stream_vdi.ml (recv_all_vdi): chunk
    numbers rise but may skip (zeros, in units of the archive's first chunk), and a zero-length
    chunk is a keep-alive. From 26.16 on chunk 0 of a VHD of up to 1 MiB comes twice, which only
    the last disk of an archive survives: recv_all_vdi reads no further than that is filled.
    """
    reader = Reader(pieces, "the very beginning")
    data = take_ova(reader)
    disks = parse_ova(data, uuids)[2]
    if sink:
        sink("ova.xml", 0, data)
    makers = {".xxhash": find_xxh64(), ".checksum": hashlib.sha1}  # SHA-1 till 2019
    disk, want, offset, last, unit, twice, done = "", 0, 0, -1, None, False, []
    proved = collections.Counter()  # chunks, by whether their hash did it
    while True:
        ref, number, name, size = read_header(reader)
        if ref != disk:
            if offset != want:
                raise ArchiveError("disk %s ends at %d of %d bytes%s" % (
                    disk, offset, want, SMALL if unit < MIB and done[1:] else ""))
            if ref is None:
                break
            if ref not in disks or ref in done or number:
                raise ArchiveError("unexpected member %r" % name)
            if twice:
                raise ArchiveError("disk %s has its only chunk twice%s" % (disk, SMALL))
            disk, want, offset, last = ref, disks[ref].size, 0, -1
            done.append(ref)
        again = number == last == 0 and size == offset == want and not twice
        if not again:
            unit = size if unit is None else unit
            offset += unit * (number - last - 1) + size
            if number <= last or offset > want:
                raise ArchiveError("chunk %s is out of order" % name)
        twice, last = twice or again, number
        proved[read_chunk(reader, name, size, makers, sink and functools.partial(sink, ref),
                          offset - size)] += 1
    missing = [ref for ref, item in disks.items() if item.size and ref not in done]
    if missing:
        raise ArchiveError("disk %s is missing" % missing[0])
    reader.end(MIB)
    told = "NOT %d chunk hashes (install libxxhash or python3-xxhash)" % proved[False]
    return ["archive (%d disks, %d chunks)" % (len(disks), sum(proved.values())),
            told if proved[False] else "chunk hashes"]


# --- single disks, and the pool's database ---


def prove_raw(pieces, size):
    """Proves a raw disk whole: `size` bytes, then at most ROUNDING zeros. size None: unknown."""
    if size is None:
        for _ in pieces:
            pass
        return ["NOT its size (nothing here tells it)"]
    reader = Reader(pieces, "the disk's %d bytes" % size)
    reader.skip(size)
    reader.end(ROUNDING)
    return ["size (%d bytes)" % size]


def prove_vhd(pieces, size=None):
    """Proves a dynamic VHD whole: both footers, the header, the blocks of the table one behind the
    other, no more than the disk has, nothing after the last footer (Microsoft's VHD specification;
    XAPI leaves no gaps, others align). size: the disk's virtual_size in bytes; None: unknown."""
    def intact(data, cookie, at):
        told = data[at : at + 4]
        mine = ~(sum(data) - sum(told)) & 0xFFFFFFFF
        return data.startswith(cookie) and told == struct.pack(">I", mine)

    reader = Reader(pieces, "the VHD's beginning")
    footer = reader.take(512)
    if not intact(footer, b"conectix", 64):
        raise ArchiveError("no VHD footer in front")
    at, told, kind = struct.unpack(">Q24xQ4xI", footer[16:64])
    if kind != 3 or not 512 <= at <= MIB:
        raise ArchiveError("not a whole dynamic VHD")
    if size is not None and not size <= told <= size + ROUNDING:
        raise ArchiveError("the VHD is for %d bytes, the disk has %d" % (told, size))
    reader.skip(at - 512)
    header = reader.take(1024)
    table, entries, block = struct.unpack(">Q4xII", header[16:36])
    needed = -(-told // max(block, 512))  # entries
    if not (intact(header, b"cxsparse", 36) and 512 <= block <= ROUNDING
            and needed <= entries <= 4 * MIB and 0 <= table - reader.at <= MIB):
        raise ArchiveError("the VHD's header is damaged")
    reader.skip(table - reader.at)
    numbers = array.array("I", reader.take(entries * 4))
    numbers.byteswap()
    good = numbers[needed:].count(0xFFFFFFFF) == entries - needed  # none behind the disk's end
    blocks = sorted(number for number in numbers[:needed] if number != 0xFFFFFFFF)
    end, gap = table + -(-entries * 4 // 512) * 512, MIB
    for number in blocks:
        good = good and end <= number * 512 <= end + gap
        end, gap = number * 512 + -(-block // 4096 // 512) * 512 + block, 4096
    if not good:
        raise ArchiveError("the VHD's table is damaged")
    reader.where = "the VHD's blocks"
    reader.skip(end - reader.at)
    if reader.take(512) != footer:
        raise ArchiveError("no footer at byte %d, where the VHD's table has its end" % end)
    reader.end()
    return ["VHD (footers, header, %d blocks)" % len(blocks)]


def dump_tables(pieces):
    """Names of the tables of a dump of the pool's database, and "schema 5.711" as its manifest has
    it. Raises ArchiveError if it is no XML to its </database>, a single row lacks fields that all
    others of its table have, or it has no VM (every host is one): during a rolling upgrade xapi
    sends one without tables (pool_db_backup.ml)."""
    from xml.parsers import expat

    schema, seen, rows = {}, 0, None
    tables = collections.defaultdict(collections.Counter)  # of each one's rows, by their fields
    parser = expat.ParserCreate("utf-8")

    def begin(name, attributes, *doctype):
        nonlocal rows
        if doctype or len(tables) + len(schema) > 9999:
            raise ArchiveError("the dump is not XAPI's")
        if name == "table":
            rows = tables[attributes.get("name")]
        elif name == "row" and rows is not None:
            rows[frozenset(attributes)] += 1
        elif name == "pair":
            schema[attributes.get("key")] = attributes.get("value")

    parser.StartElementHandler = parser.StartDoctypeDeclHandler = begin
    try:
        for piece in pieces:
            seen += len(piece)
            parser.Parse(piece, False)
            if seen > DUMP_LIMIT or seen - parser.CurrentByteIndex > METADATA_LIMIT:
                raise ArchiveError("the dump has no end")
        parser.Parse(b"", True)
    except expat.ExpatError as error:
        raise ArchiveError("the dump is damaged or lacks </database>: %s" % error) from None
    if not tables.get("VM"):
        raise ArchiveError("the dump lists no VM: is a rolling pool upgrade under way?")
    for table, counts in tables.items():  # the cut made one row of two
        usual = max(counts, key=counts.get, default=frozenset())
        if counts[usual] > 1 and any(counts[odd] == 1 and odd < usual for odd in counts):
            raise ArchiveError("the dump is damaged in table %s" % table)
    version = "schema %s.%s" % (schema.get("schema_major_vsn"), schema.get("schema_minor_vsn"))
    return {version}.union(tables)


def prove_dump(pieces, tables=()):
    """Proves a dump as far as it can be: no row's absence shows. tables: those of the last kept
    dump, by dump_tables(); unless the schema is another one, none of them may be gone."""
    found = dump_tables(pieces)
    lost = sorted(set(tables) - found)
    if lost and not any(name.startswith("schema ") for name in lost):
        raise ArchiveError("the dump lacks what the last one has: table %s" % ", ".join(lost))
    return ["XML to </database>", "%d tables (not: every row)" % (len(found) - 1)]


# --- compressed archives, and the choice by name ---


def gunzip(pieces):
    """The pieces of what a gzip stream holds; it has to end where the pieces do."""
    gzip = zlib.decompressobj(31)
    try:
        for piece in pieces:
            while len(piece):
                if gzip.eof:
                    raise ArchiveError("data after the end of the gzip stream")
                yield memoryview(gzip.decompress(piece, MIB))
                piece = memoryview(gzip.unused_data if gzip.eof else gzip.unconsumed_tail)
        yield memoryview(gzip.flush())  # zlib may hold back output with no input left
    except zlib.error as error:
        raise ArchiveError("the gzip stream is damaged: %s" % error) from None
    if not gzip.eof:
        raise ArchiveError("the gzip stream is cut off")


def unzstd(pieces):
    """The same for zstd, through the command `zstd`, which XAPI itself needs in dom0. A thread of
    its own reads the pieces; it and the child are gone when this generator is."""
    import subprocess

    zstd, buffer, pipe = shutil.which("zstd"), memoryview(bytearray(MIB)), subprocess.PIPE
    if not zstd:
        raise BackupError("nothing here can decompress it: install the command zstd")

    def feed():
        with contextlib.suppress(BrokenPipeError), child.stdin:  # its exit status tells why
            child.stdin.writelines(pieces)

    child: Any
    with subprocess.Popen(  # a new session: Ctrl-C is for us, the child ends when its input does
            [zstd, "-dcq"], stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL,
            start_new_session=True) as child, ThreadPoolExecutor(1) as thread:
        try:
            feeder = thread.submit(feed)
            for count in iter(lambda: child.stdout.readinto(buffer), 0):
                yield buffer[:count]
            feeder.result()  # raises what the pieces did
            if child.wait():
                raise ArchiveError("the zstd stream is cut off, damaged or followed by something")
        finally:
            child.kill()


def prover(file_name, size=None, uuids=(), sink=None):
    """The proof for an export by its file name: a function of its pieces. size: virtual_size in
    bytes of a single disk; uuids, sink: as for prove_xva()."""
    def prove(pieces):
        if file_name.endswith(".raw"):
            return prove_raw(pieces, size)
        if file_name.endswith(".vhd"):
            return prove_vhd(pieces, size)
        if file_name.endswith(".xva"):
            return prove_xva(pieces, uuids, sink)
        kind, unpack = ("gzip", gunzip) if file_name.endswith(".gz") else ("zstd", unzstd)
        with contextlib.closing(unpack(pieces)) as inner:
            return [kind] + prove_xva(inner, uuids, sink)

    return prove


# ============================== the watchman ==============================
# The main thread is the watchman, workers do the work. It makes no call, for that could hold it:
# it waits for the workers, looks every LOOK seconds whether a stop was asked
# for, and then shuts down the sockets that hold them.

LOOK = 0.2  # seconds
STOP_GRACE = 5  # seconds a call may still take at a stop: the host may just have made a session
CLEANUP_GRACE = 20  # seconds for each call that is begun after it, to clean up
STOP_ENDS = 55  # seconds after which a stop ends the program, whatever hangs
ONE_SIGNAL = 0.2  # seconds within which a signal and its echo are one: timeout(1) sends it twice
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1,
           signal.SIGUSR2, signal.SIGALRM, signal.SIGXCPU)


class Activity:
    """What is being done to one VM or file, for whoever shows it: done and expected are bytes,
    fraction is the progress that the host tells; times are monotonic."""

    def __init__(self, label):
        self.label, self.doing, self.expected = label, "", 0
        self.touch = lambda: None  # tells other machines, each minute, that it is under way
        self.begin()

    def begin(self):
        """From now on the bytes of another transfer are counted."""
        self.done, self.fraction = 0, 0.0
        self.started = self.touched = time.monotonic()

    def note(self, count):
        self.done += count
        self.touched = time.monotonic()


class Watch:
    """What all threads share about stopping, progress and the rate (bytes/s, 0: no limit). A stop
    tears nothing apart: code looks at it where it can undo what it has done."""

    def __init__(self):
        self.signum, self.rate, self.activities = None, 0, []
        self.streams, self.calls = set(), {}  # open Streams; Transports, and since when each waits
        self._stopped, self._raises, self._due, self._turn = 0.0, False, 0.0, threading.Lock()

    def install(self):
        """Takes the signals, and lets no core file and no TLS key log tell the password."""
        os.environ.pop("SSLKEYLOGFILE", None)
        with contextlib.suppress(ValueError, OSError):  # the hard limit is 0 already
            # 1, since the kernel heeds no other where it hands cores to a program: core(5).
            resource.setrlimit(resource.RLIMIT_CORE, (1, 1))
        for signum in SIGNALS:
            if signum != signal.SIGHUP or signal.getsignal(signum) != signal.SIG_IGN:  # by nohup
                signal.signal(signum, self._handler)

    def _handler(self, signum, _frame):
        now = time.monotonic()
        if self.signum is None:
            self._stopped, self.signum = now, signum
            signal.alarm(STOP_ENDS)
            if self._raises:
                raise Interrupted(signum)
        elif now - self._stopped > ONE_SIGNAL:
            os._exit(128 + self.signum)

    def check(self):
        """Raises Interrupted once a stop was asked for."""
        if self.signum:
            raise Interrupted(self.signum)

    def time_left(self):
        """Seconds until a stop ends the program."""
        return self._stopped + STOP_ENDS - time.monotonic() if self.signum else float("inf")

    def sleep(self, seconds):
        """Waits; returns early once a stop was asked for. Signal-safe, unlike threading.Event."""
        end = time.monotonic() + seconds
        while not self.signum and time.monotonic() < end:
            time.sleep(max(0, min(0.1, end - time.monotonic())))

    def throttle(self, count):
        """Waits until `count` bytes more are within the rate, which all streams share."""
        if self.rate:
            with self._turn:
                # A little may be made up for, since each sleep lasts a little too long.
                due = self._due = max(self._due, time.monotonic() - 0.05) + count / self.rate
            self.sleep(due - time.monotonic())

    def do(self, function, *args):
        """What function(*args) returns or raises, in a worker. For the main thread."""
        with ThreadPoolExecutor(1) as worker:
            future = worker.submit(function, *args)
            while wait([future], timeout=LOOK).not_done:
                if self.signum:
                    self._end_waits()
            return future.result()

    def _end_waits(self):
        for stream in self.streams.copy():
            stream.abort()
        for transport, begun in self.calls.copy().items():
            grace = CLEANUP_GRACE if begun > self._stopped else STOP_GRACE
            if time.monotonic() > max(begun, self._stopped) + grace:
                transport.shut()

    def pure(self, function, *args):
        """The same in the main thread, where the signal's handler ends it: a regular expression
        that runs in a worker keeps all other threads waiting."""
        self._raises = True
        try:
            self.check()
            return function(*args)
        finally:
            self._raises = False

    @contextlib.contextmanager
    def activity(self, label):
        """An Activity, shown while the block lasts."""
        activity = Activity(label)
        self.activities.append(activity)
        try:
            yield activity
        finally:
            self.activities.remove(activity)

    @contextlib.contextmanager
    def attend(self, show):
        """While the block lasts, a helper thread lets the open streams ask how their
        tasks do, and calls show(list of Activities), once a second."""
        ended = threading.Event()

        def tend():
            while not ended.wait(1):
                asks = [stream.ask for stream in self.streams.copy()]
                for look in [functools.partial(show, self.activities[:])] + asks:
                    with contextlib.suppress(Exception):  # an oddity must not end the watching
                        look()

        with ThreadPoolExecutor(1) as helper:
            helper.submit(tend)
            try:
                yield
            finally:
                ended.set()


# ============================== the XAPI client ==============================

CONNECT_TIMEOUT = 30  # seconds, for all that a helper asks, too
KEEPALIVE = ((socket.TCP_NODELAY, 1), (socket.TCP_KEEPIDLE, 60), (socket.TCP_KEEPINTVL, 15),
             (socket.TCP_KEEPCNT, 8))
CALL_TIMEOUT = 600  # seconds: VM.destroy and others queue on the host while it is busy
SNAPSHOT_TIMEOUT = 3600  # seconds that a snapshot may take
IDLE = 5  # seconds after which a connection is not used again: the host may have closed it
USER_AGENT = "vmbackup/" + __version__


class Endpoint:
    """Where one host is reached and how it proves who it is.

    pins: SHA-256 fingerprints of the certificates to accept; ca: PEM file to verify with, None
    for the system's; verify False: no check. A loopback address needs no proof unless one is asked,
    or a host led here that had to prove itself (`led`).
    """

    def __init__(self, address, pins=None, ca=None, verify=True, led=False):
        self.address, self.pins, self.ca, self.verify = address, pins, ca, verify
        self.checked = verify and bool(pins or ca or led or not is_loopback(address.host))

    def __str__(self):
        scheme, host, port = self.address
        if scheme == "unix":
            return host
        host = "[%s]" % host if ":" in host else host
        return host if port == {"https": 443, "http": 80}[scheme] else "%s:%d" % (host, port)

    def lead(self, told):
        """The Endpoint where this host leads to as master or by a redirect; it has to prove itself
        in the same way. Clear text leads to clear text within this machine alone."""
        mine, address = self.address, Address("", "", 0)
        with contextlib.suppress(ValueError):
            address = parse_host(told)
        if "://" not in told and address.port == 443 and (
                mine.scheme == "https" or mine.scheme == "http" and is_loopback(address.host)):
            address = mine._replace(host=address.host)  # a bare name: reached as this one is
        if address.scheme != "https" and (mine.scheme, address.scheme) != ("http", "http"):
            raise BackupError("the host leads to %r, which could not prove itself: refused" % told)
        return Endpoint(address, self.pins, self.ca, self.verify, self.checked)

    def open_socket(self, timeout, owner):
        """A connected socket, TLS done and the certificate checked: nothing was sent before that.

        It is owner.sock as soon as it is one, for whoever has to shut or close it. A dead peer is
        noticed by TCP keepalive within about three minutes, whatever `timeout` (seconds per read or
        write, None for ever).
        """
        scheme, host, port = self.address
        if scheme == "unix":
            sock = owner.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            sock.settimeout(CONNECT_TIMEOUT)
            sock.connect(host)
        else:
            sock = owner.sock = socket.create_connection((host, port), CONNECT_TIMEOUT)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in KEEPALIVE:
                sock.setsockopt(socket.IPPROTO_TCP, option, value)
        if scheme == "https":
            sock = self._tls(sock, owner)
        sock.settimeout(timeout)
        return sock

    def _tls(self, sock, owner):
        """The TLS socket on it. Where the certificate is not trusted, raises BackupError: which
        fingerprint the host shows, how to compare it, what to set."""
        import ssl

        context, trusted = self._context(), True
        name = self.address.host if context.check_hostname else None
        tls = owner.sock = context.wrap_socket(sock, server_hostname=name,
                                               do_handshake_on_connect=False)
        try:
            tls.do_handshake()
        except (ssl.SSLError, ssl.CertificateError) as error:
            # In Python 3.6 CertificateError is a wrong name only, and no SSLError.
            if isinstance(error, ssl.SSLError) and error.reason != "CERTIFICATE_VERIFY_FAILED":
                raise
            trusted = False
            tls.close()
            tls = Endpoint(self.address, verify=False).open_socket(CONNECT_TIMEOUT, owner)
        shown = hashlib.sha256(tls.getpeercert(True)).hexdigest()
        if self.checked and self.pins:
            trusted = shown in self.pins
        if trusted:
            return tls
        shown = ":".join(re.findall("..", shown)).upper()
        raise BackupError(
            "the certificate of %s is not trusted: its SHA-256 fingerprint is %s - compare it on"
            " the host's console with: openssl x509 -noout -fingerprint -sha256 -in"
            " /etc/xensource/xapi-ssl.pem - and if it is the same, add tls_fingerprint=%s"
            % (self, shown, shown))

    def _context(self):
        import ssl

        if self.checked and not self.pins:
            context = ssl.create_default_context(cafile=self.ca)
            # XenServer's own certificates have no key identifiers, which newer Pythons ask for.
            context.verify_flags &= ~getattr(ssl, "VERIFY_X509_STRICT", 0)
        else:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            if ssl.OPENSSL_VERSION_INFO >= (1, 1):
                # XenServer 7 has RSA key exchange only and short keys, which the defaults refuse.
                context.set_ciphers("DEFAULT:@SECLEVEL=1")
        if hasattr(ssl, "TLSVersion"):
            context.minimum_version = ssl.TLSVersion.TLSv1_2
        else:
            context.options |= ssl.OP_NO_TLSv1 | ssl.OP_NO_TLSv1_1
        return context


def endpoints(settings, local):
    """The Endpoints of host=, which prove themselves as the settings tls_* say; local: the password
    is that word. Raises ConfigError where the two do not go together."""
    addresses = settings.host
    if local and addresses == KNOWN["host"].parse("localhost"):
        addresses = [Address("unix", "/var/lib/xcp/xapi", 0)]
    if any(local != (address.scheme == "unix") for address in addresses):
        raise ConfigError("ERROR - the password `local` and a socket path in host= go together")
    proof = settings.tls_fingerprint, settings.tls_ca, settings.tls_verify
    return [Endpoint(address, *proof) for address in addresses]


def shut(sock):
    """Ends what any thread reads, writes or connects there; closed after it, TCP is reset. With a
    mere end the host, its window full, would go on sending for up to a minute, and keep the VM."""
    with contextlib.suppress(OSError, TypeError):  # closed, or None: not opened yet
        reset = struct.pack("ii", 1, 0)
        socket.socket.setsockopt(sock, socket.SOL_SOCKET, socket.SO_LINGER, reset)
        socket.socket.shutdown(sock, socket.SHUT_RDWR)  # SSLSocket's would go on in clear text


def make_transport(endpoint, timeout, watch):
    """XML-RPC over what the endpoint opens. It never sends a call twice by itself: the stock
    transport does when a connection drops, and VM.snapshot must not happen twice. A connection
    that was idle is made anew. (Made here: what only some runs need is not loaded by all.)"""
    import http.client
    import xmlrpc.client

    class Connection(http.client.HTTPConnection):
        def connect(self):
            endpoint.open_socket(timeout, self)

    class Transport(xmlrpc.client.Transport):
        user_agent = USER_AGENT
        accept_gzip_encoding = False

        def __init__(self):
            super().__init__()
            self.connection, self.used = Connection("xapi"), 0.0

        def make_connection(self, host):
            if time.monotonic() - self.used > IDLE:
                self.close()
            return self.connection

        def close(self):
            self.connection.close()

        def shut(self):
            shut(self.connection.sock)  # a stop ends the call

        def request(self, host, handler, request_body, verbose=False):
            watch.calls[self] = time.monotonic()
            try:
                return self.single_request(host, handler, request_body, verbose)
            finally:
                self.used = time.monotonic()
                del watch.calls[self]

    return Transport()


UNDONE = ("SESSION_INVALID", "HOST_IS_SLAVE", "HOST_STILL_BOOTING")  # refused before it was begun


class Record(dict):
    """An object of the pool. What it lacks, and another answer, is told as the host's fault."""

    def __init__(self, answer):
        if not isinstance(answer, dict):
            raise BackupError("the host's answer is none of XAPI's: %.60r" % (answer,))
        super().__init__(answer)

    def __missing__(self, key):
        raise BackupError("the host tells no %s of an object: is its XAPI supported?" % key)


class Xapi:
    """A logged-in session at the pool master, for one thread; ask() is for others.

    hosts: Endpoints tried in order. credentials: (user, password). log: function(text).
    """

    def __init__(self, hosts, credentials, log, watch):
        self._hosts, self._credentials, self._log, self.watch = hosts, credentials, log, watch
        self.endpoint: Any = None
        self.handle: Any = None  # the session's reference; it changes with a new login
        self._transport: Any = None
        self._lost = None  # a session that a broken connection left behind: the host counts it

    def connect(self):
        """Logs in at the first host that answers, or at the master that it names.

        Raises ConfigError if the password is wrong, no host answers or none is trusted. A stop
        ends the first login; a session that was lost is made anew all the same, to clean up.
        """
        reasons = []
        for endpoint in self._hosts:
            try:
                self._login(endpoint)
            except ConfigError:
                raise
            except Exception as error:
                if self.endpoint is None:
                    self.watch.check()
                text = describe(error)  # a host may repeat what it was sent
                reasons.append("%s: %s" % (
                    endpoint, text.replace(self._credentials[1] or "\0", "...")))
                continue
            if self._lost:
                with contextlib.suppress(BackupError):
                    self.ask("session.logout", handle=self._lost)
                self._lost = None
            return
        raise ConfigError("ERROR - no login: %s" % "; ".join(reasons))

    def _login(self, endpoint, hops=3):
        transport = make_transport(endpoint, CALL_TIMEOUT, self.watch)
        try:
            self.handle = self._answer(transport, "session.login_with_password",
                                       *self._credentials, "1.0", "vmbackup")
            self._transport, self.endpoint = transport, endpoint
        except XapiError as error:
            if error.code == "HOST_IS_SLAVE" and error.params and hops:
                master = endpoint.lead(error.params[0])
                self._log("%s is not the pool master, going on to %s" % (endpoint, error.params[0]))
                self._login(master, hops - 1)
            elif error.code == "SESSION_AUTHENTICATION_FAILED":
                raise ConfigError("ERROR - login failed at %s: wrong user name or password for %s"
                                  " (a password file has to exist to be read)"
                                  % (endpoint, self._credentials[0])) from None
            else:
                raise

    def _answer(self, transport, method, *args):
        """What the host answers. XenAPI's own way to call is not taken: it logs in by itself."""
        import XenAPI

        answer = getattr(XenAPI.Session("http://xapi", transport), method)(*args)
        if answer["Status"] == "Success":
            return answer["Value"]
        raise XapiError(answer["ErrorDescription"], method)

    def _send(self, transport, *call):
        try:
            return self._answer(transport, *call)
        except BackupError:  # what the host answered, or a certificate that is not trusted
            raise
        except Exception as error:  # of sockets, TLS, HTTP, XML; and of an answer that is none
            raise ConnectionLost(error) from error

    def call(self, method, *args):
        """The value of an XAPI call. Raises XapiError; ConnectionLost if the outcome is unknown.

        After a new login is sent again, once, what the host refused before it was begun, and what
        only reads.
        """
        try:
            if self.handle:
                return self._send(self._transport, method, self.handle, *args)
        except XapiError as error:
            reads = isinstance(error, ConnectionLost) and ".get_" in method
            if error.code not in UNDONE and (self.watch.signum or not reads):
                raise
            self._log("lost the host, logging in again")
            self._lost, self.handle = self.handle, None
            self._transport.close()
        try:
            self.connect()
        except ConfigError as error:
            raise ConnectionLost(error) from None
        return self._send(self._transport, method, self.handle, *args)

    def ask(self, method, *args, handle=None):
        """The same for another thread than the owner's: on a connection of its own, never a login,
        and with a short timeout. handle: another session's than this one's."""
        transport = make_transport(self.endpoint, CONNECT_TIMEOUT, self.watch)
        with contextlib.closing(transport):
            return self._send(transport, method, handle or self.handle, *args)

    def all(self, kind):
        """{ref: record} of all objects of a class."""
        answer = Record(self.call(kind + ".get_all_records"))
        return {ref: Record(record) for ref, record in answer.items()}

    def records(self, kind, refs):
        """{ref: record} of the refs that exist."""
        found = {}
        for ref in dict.fromkeys(refs):
            if ref != NULL:
                try:
                    found[ref] = Record(self.call(kind + ".get_record", ref))
                except XapiError as error:
                    if error.code != "HANDLE_INVALID":
                        raise
        return found

    def pool(self):
        """The pool's record."""
        for pool in self.all("pool").values():
            return pool
        raise BackupError("the host tells of no pool")

    def wait_for(self, task, patience, doing, heed=True):
        """The record of a task once it has ended, None if it is gone.

        Raises XapiError after `patience` seconds, and at a stop Interrupted, or unless that is to
        be heeded XapiError when time runs out.
        """
        end, pause = time.monotonic() + patience, 0.02
        while True:
            if heed:
                self.watch.check()
            record = self.records("task", [task]).get(task)
            if record is None or record["status"] not in ("pending", "cancelling"):
                return record
            if time.monotonic() > end or self.watch.time_left() < CLEANUP_GRACE:
                raise XapiError(["TASK_TIMEOUT"], "%s did not end within %d s" % (doing, patience))
            time.sleep(pause)
            pause = min(pause * 1.5, 1)

    def run_task(self, method, *args):
        """Runs Async.method to its end and returns the ref that is its result.

        At a stop the task is cancelled; if it ended well all the same its result is returned, so
        that the caller can undo it. Gives up after SNAPSHOT_TIMEOUT.
        """
        task = self.call("Async." + method, *args)
        try:
            try:
                record = self.wait_for(task, SNAPSHOT_TIMEOUT, method)
            except Interrupted:
                with contextlib.suppress(XapiError):
                    self.call("task.cancel", task)
                record = self.wait_for(task, CLEANUP_GRACE, method, False)
        finally:
            with contextlib.suppress(XapiError):
                self.call("task.destroy", task)
        if record is None:
            raise XapiError(["HANDLE_INVALID", "task"], method)
        if record["status"] != "success":
            self.watch.check()
            raise XapiError(record["error_info"], method)
        return re.sub(r"</?value>", "", record["result"]).strip()  # Async wraps it in XML

    def at(self, told):
        """The Endpoint of the pool member that is told by this address or URL: its certificate is
        the one that the pool vouches for (host.get_server_certificate), over this connection, which
        is trusted already."""
        import ssl

        other, pins = self.endpoint.lead(told), []
        if other.checked:
            with contextlib.suppress(XapiError, ValueError):
                for ref, host in self.all("host").items():
                    if parse_host(host["address"]).host == other.address.host:
                        pem = self.call("host.get_server_certificate", ref)
                        der = ssl.PEM_cert_to_DER_cert(pem.strip() + "\n")
                        pins.append(hashlib.sha256(der).hexdigest())
        return Endpoint(other.address, pins) if pins else other

    def master(self):
        """The Endpoint of the pool master: this one, but for the socket of a slave, where calls
        are forwarded and streams are not."""
        pool = self.pool()  # it logs in where that was not done yet
        if self.endpoint.address.scheme != "unix" or (
                self.call("session.get_this_host", self.handle) == pool["master"]):
            return self.endpoint
        return self.at(self.call("host.get_address", pool["master"]))

    def close(self):
        """Logs out; never raises."""
        if self.handle:
            with contextlib.suppress(BackupError):
                self.ask("session.logout")
            self._transport.close()
            self.handle = None


# ============================== streams ==============================

SILENCE = 30  # seconds after which the host is asked how a stream's task does
DEAD_AFTER = 180  # seconds without a byte and without an answer: the host is gone
STALLED = 3600  # seconds in which neither a byte nor the task's progress moved: given up
TASK_ENDS = 60  # seconds that a task may stay pending once its stream has ended
IMPORT_ENDS = 600  # seconds that a host may take to clear away a broken import
FAILURE_ENDS = 3  # seconds until a task must have told why its stream failed


def make_adapter(stream):
    """requests' adapter for one request over the socket that the stream's endpoint opens; called
    without a requests.Session, so nothing of the environment (proxies, netrc, CA bundles) and no
    redirect has a say. No other part of urllib3's pools is in use."""
    import http.client

    import requests
    import urllib3

    class Connection(urllib3.connection.HTTPConnection):
        response_class: Any = stream.response

        def connect(self):
            try:
                self.sock = stream.endpoint.open_socket(None, stream)
            except OSError as error:  # of which urllib3 passes over some
                raise http.client.NotConnected(error) from None

    class Pool(urllib3.HTTPConnectionPool):
        ConnectionCls = Connection

    class Adapter(requests.adapters.HTTPAdapter):
        def get_connection_with_tls_context(self, *_args, **_options):
            return Pool("xapi")

        get_connection = get_connection_with_tls_context  # its name before requests 2.32

    return Adapter()


def innermost(error):
    """What requests and urllib3 have wrapped, in texts that quote the whole URL."""
    inner = error
    while isinstance(inner, Exception):
        error, inner = inner, getattr(inner, "reason", None) or (inner.args and inner.args[-1])
    return error


class Stream:
    """One GET or PUT at XAPI with a task of its own, as a context manager.

    GET: `readinto(view)` until it returns 0, then `verdict()`. PUT (put=True): the task is there
    before anything is sent, for whoever notes it; `open(length)`, `send(pieces)`, `verdict()`. Left
    without a verdict, the task is cancelled; a PUT then waits until the host has cleared away what
    it began.

    query: without session_id and task_id; until open() it may be completed. endpoint: another than
    the session's. at_work: whether the host is at work on the task: from its answer on. result: the
    refs of what an import made, once verdict() was True.
    """

    def __init__(self, xapi, path, query, activity, endpoint=None, put=False):
        self.xapi, self.watch, self.activity = xapi, xapi.watch, activity
        self._path, self._query, self._put = path, query, put
        self._given = self.endpoint = endpoint
        self.task = self.sock = self._answer = self._body = None
        self.at_work, self.result = False, []
        self._reason = None  # why it was given up
        self._name = "the %s's task" % ("import" if put else "export")
        self._asked = self._answered = time.monotonic()

    def __enter__(self):
        self.watch.check()
        try:
            self._make_task()
            self.activity.begin()
            self.watch.streams.add(self)
            if not self._put:
                self.open()
            return self
        except BaseException:
            self.__exit__()
            raise

    def _make_task(self):
        self.task = self.xapi.call("task.create", "vmbackup: " + self.activity.label, "")
        self.endpoint = self.endpoint or self.xapi.endpoint

    def open(self, length=0):
        """Sends the request's head, follows redirects to pool members, and waits for the answer's.
        Logs in anew once after 401 (a PUT's task is noted elsewhere). length: of a PUT's body.

        Raises XapiError with the task's own reason where the host gives one.
        """
        hops, renewed = 5, self._put
        while not self.at_work:
            try:
                status, location = self._request(length)
            except ConnectionLost as error:
                raise self.failure() or error from None
            if status in (301, 302, 307, 308) and location:
                self._disconnect()
                hops -= 1
                if not hops:
                    raise BackupError("the hosts send each other the request in a circle")
                self.endpoint = self.xapi.at("/".join(location.split("?")[0].split("/")[:3]))
            elif status == 401 and not renewed:
                self._disconnect()
                renewed, self.endpoint = True, self._given
                with contextlib.suppress(XapiError):
                    self.xapi.call("task.destroy", self.task)  # it logs in if the session is gone
                self._make_task()
            elif status != 200:
                raise self._refusal(status)
            self.at_work = status == 200

    def _request(self, length):
        """(status, Location) of one attempt, however long the host takes. A PUT's body does not go
        out with it: XAPI answers before it reads (import.ml), and a redirect costs nothing so."""
        import requests

        self.watch.check()
        query = dict(self._query, session_id=self.xapi.handle, task_id=self.task)
        url = "http://xapi%s?%s" % (self._path, urllib.parse.urlencode(query))
        headers = {"Accept-Encoding": "identity", "User-Agent": USER_AGENT}
        request = requests.Request("PUT" if self._put else "GET", url, headers).prepare()
        if self._put:
            request.headers["Content-Length"] = str(length)
        try:
            self._answer = answer = make_adapter(self).send(request, stream=True)
        except BackupError:  # of the certificate
            raise
        except Exception as error:  # requests' and urllib3's
            raise self._lost(error) from error
        self.activity.note(0)
        return answer.status_code, answer.headers.get("Location", "")

    def response(self, *args, **options):
        """urllib3's response_class: keeps http.client's own response, whose readinto fills the
        buffer without a copy."""
        import http.client

        self._body = http.client.HTTPResponse(*args, **options)
        return self._body

    def _refusal(self, status):
        """The XapiError of an answer that is not 200: the task's, or what the page tells."""
        view = memoryview(bytearray(16384))
        with contextlib.suppress(OSError, BackupError):
            self.sock.settimeout(CONNECT_TIMEOUT)
            self.readinto(view)
        told = re.search(r"</h1>\s*([A-Z][A-Z0-9_]{3,})(?:: \[ ?(.*?) ?\])?",
                         bytes(view).decode("utf-8", "replace"), re.S)
        details = [told.group(1)] + (told.group(2) or "").split("; ") if told else []
        return self.failure() or XapiError(details or ["HTTP_%d" % status],
                                           "the host answered %d" % status)

    def _lost(self, error):
        """What ended the connection; Interrupted if it was a stop."""
        self.watch.check()
        return ConnectionLost(self._reason or innermost(error))

    def readinto(self, view):
        """The number of bytes that came, 0 at the end. Raises ConnectionLost, Interrupted."""
        try:
            count = self._body.readinto(view)
        except Exception as error:  # of sockets, TLS, HTTP
            raise self._lost(error) from error
        if self._reason or self.watch.signum:  # the end may be that of a socket that was shut
            raise self._lost(None)
        self.activity.note(count)
        self.watch.throttle(count)
        return count

    def send(self, pieces):
        """Uploads an iterator of pieces; raises what they raise. However the connection ends, the
        task has the only say: the host reads no more than it wants."""
        for piece in pieces:
            self.watch.check()
            self.watch.throttle(len(piece))
            try:
                self.sock.sendall(piece)
            except OSError:
                self.watch.check()
                if self._reason:
                    raise ConnectionLost(self._reason) from None
                return
            self.activity.note(len(piece))

    def ask(self):
        """Asks the host every SILENCE seconds how the task does, and gives the stream up if nobody
        is there or nothing moves; called once a second by the helper thread."""
        now = time.monotonic()
        if self.watch.signum or now - self._asked < SILENCE:
            return
        self._asked = now
        try:
            fraction = float(self.xapi.ask("task.get_record", self.task)["progress"])
            if fraction != self.activity.fraction:
                self.activity.fraction = fraction
                self.activity.note(0)
            self._answered = now
        except ConnectionLost:
            if now - max(self.activity.touched, self._answered) > DEAD_AFTER:
                self.abort("the host sent nothing and did not answer for %d s" % DEAD_AFTER)
        except XapiError:
            self._answered = now  # the task is gone, the host is not
        if now - self.activity.touched > STALLED:
            self.abort("for %s neither a byte came nor the task moved on" % time_text(STALLED))

    def abort(self, reason=None):
        """Ends whatever the stream is at, in whatever thread."""
        self._reason = self._reason or reason
        shut(self.sock)

    def _end(self, patience, heed=True):
        """The task's record once it has ended, None if it is gone; see wait_for."""
        record = self.xapi.wait_for(self.task, patience, self._name, heed)
        self.at_work = False
        return record

    def failure(self):
        """The XapiError of a task that failed, or None if it is not known to have (within 3 s: the
        task of an early failure may stay pending for ever, see xapi_http.ml)."""
        with contextlib.suppress(XapiError):
            record = None if self._reason else self._end(FAILURE_ENDS)
            if record and record["status"] != "success":
                return XapiError(record["error_info"])
        return None

    def verdict(self):
        """Whether the task ended well: True, or False if it is gone (unknown). Raises XapiError
        if it failed, was cancelled or does not end in time."""
        record = self._end(STALLED if self._put else TASK_ENDS)
        if record is None:
            return False
        if record["status"] != "success":
            raise XapiError(record["error_info"], self._name + " failed")
        self.result = re.findall(r"OpaqueRef:[\w-]+", record["result"])
        return True

    def _disconnect(self):
        for each in (self._answer, self._body, self.sock):
            if each is not None:
                each.close()

    def __exit__(self, *_error):
        self.watch.streams.discard(self)
        if self.at_work:
            shut(self.sock)
        self._disconnect()
        if self.at_work:
            with contextlib.suppress(BackupError):
                self.xapi.call("task.cancel", self.task)
        if self.at_work and self._put:
            with contextlib.suppress(BackupError):
                self._end(IMPORT_ENDS, False)
        if self.task:
            with contextlib.suppress(BackupError):
                self.xapi.call("task.destroy", self.task)


# ============================== from stream to disk ==============================

BUFFER = MIB
BUFFERS = 3
SYNC_EVERY = 64 * MIB


def ring(readinto):
    """The pieces that readinto(view) gives, to its end: views of BUFFERS reused buffers (an mmap
    goes back to the system after use), so each is valid until BUFFERS - 1 more were asked for."""
    buffers = [memoryview(mmap.mmap(-1, BUFFER)) for _ in range(BUFFERS)]
    for buffer in itertools.cycle(buffers):
        count = readinto(buffer)
        if not count:
            return
        yield buffer[:count]


def fan_out(pieces, *consumers, abort=None):
    """Gives all pieces of a ring to each consumer(pieces), each in a thread of its own, while the
    next piece is read: network, hash, proof and disk overlap (all release the GIL). The last one
    is told of the end when the others have ended well: it may hold back what they vouch for.
    Returns the list of their results. The first error ends all and is raised when no thread is
    left; a consumer's calls abort(), for the next piece may be long in coming."""
    errors = []
    # One piece is being read and one with the consumer: so many may wait.
    lanes = [queue.Queue(BUFFERS - 2) for _ in consumers]

    def lane(consumer, waiting):
        def given():
            yield from iter(waiting.get, None)
            if errors:  # then this is not the end of the export
                raise errors[0]

        source = given()
        try:
            return consumer(source)
        except BaseException as error:
            errors.append(error)
            if abort:
                abort()
        finally:
            with contextlib.suppress(BaseException):
                for _ in source:  # or the reader would wait for room
                    pass

    with ThreadPoolExecutor(len(consumers)) as threads:
        jobs = [threads.submit(lane, *each) for each in zip(consumers, lanes)]
        try:
            for piece in pieces:
                for waiting in lanes:
                    waiting.put(piece)
                if errors:
                    break
        except BaseException as error:
            at = 0 if isinstance(error, Interrupted) else len(errors)  # a stop counts most
            errors.insert(at, error)
        finally:
            for waiting in lanes[:-1]:
                waiting.put(None)
            wait(jobs[:-1])
            lanes[-1].put(None)
    if errors:
        raise errors[0]
    return [job.result() for job in jobs]


def new_file(name, dir_fd, data=b""):
    """The descriptor of a new file of mode 0600; `data` is in it and flushed to disk. OSError if
    anything has that name."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(native(name), flags, 0o600, dir_fd=dir_fd)
    try:
        if data:
            with open(fd, "wb", closefd=False) as file:
                file.write(data)
            os.fsync(fd)
    except BaseException:
        os.close(fd)
        raise
    return fd


def write_all(name, dir_fd, pieces):
    """Writes a new file, flushed to disk, and returns the number of its bytes.

    Every 64 MiB a helper thread flushes what was written and drops it from the page cache, so that
    at most two such windows are dirty: dom0's memory is small, and the last flush has little left
    to do. Measured: 1.6 s/GiB against 2.1 without, the same CPU; smaller windows gain nothing, and
    O_DIRECT would wait for a file server at every write."""
    written = synced = 0
    fd = new_file(name, dir_fd)

    def flush(start, end):
        os.fdatasync(fd)
        os.posix_fadvise(fd, start, end - start, os.POSIX_FADV_DONTNEED)

    try:
        with ThreadPoolExecutor(1) as helper:
            flushed = helper.submit(flush, 0, 0)
            for view in pieces:
                while len(view):
                    count = os.write(fd, view)
                    view = view[count:]
                    written += count
                if written - synced >= SYNC_EVERY:
                    flushed.result()
                    flushed, synced = helper.submit(flush, synced, written), written
            flushed.result()
        flush(0, written)
    finally:
        os.close(fd)
    return written


def hash_all(pieces):
    """Their SHA-256 in hex."""
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def sync(fd):
    """fsync, where there is one: not of folders on CIFS, nor of /dev/null."""
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise


# What came of an export: bytes, SHA-256 in hex, phrases of what was proved, whether the task's
# success is known (else it is gone), seconds from the first byte to the last flush.
Saved = collections.namedtuple("Saved", "size digest checks task_known seconds")


def save(stream, name, dir_fd, prove):
    """Streams a Stream (entered here) into a new file in the folder dir_fd, proved whole by
    prove(pieces) and the task, and flushed to disk; returns Saved. Raises BackupError or OSError:
    then the file is no export."""
    with stream:
        begin = time.monotonic()
        try:
            size, digest, checks = fan_out(
                ring(stream.readinto), functools.partial(write_all, name, dir_fd), hash_all, prove,
                abort=stream.abort)
        except (ArchiveError, ConnectionLost) as error:
            told = stream.failure()
            raise BackupError("the export is not whole: %s%s" % (
                error, "; the host says: %s" % told if told else "")) from None
        seconds = time.monotonic() - begin
        known = stream.verdict()
    return Saved(size, digest, ["sha256"] + ["task"] * known + checks, known, seconds)


# ============================== snapshot, target, the plan ==============================
#
# A Plan says what will be done with one VM: pure, so preview prints it and the run carries it out.
# Snapshot touches the pool alone, Target the disk alone. In a backup nothing but Snapshot destroys
# something on the pool; on disk it is remove_folder.

# A disk of a VM: label (device or userdevice) and its records. left_out: marked [NOBAK].
Disk = collections.namedtuple("Disk", "label vbd ref vdi left_out")
# expected: bytes. kept: {name: reasons}. doomed: names, oldest first. refusal: None, or (word of
# the status log, error).
Plan = collections.namedtuple(
    "Plan", "choice ref vm disks srs file policy expected kept doomed notes refusal")

DETACH_PAUSES = (0.2, 0.5, 1, 2, 4, 8, 8, 8)  # seconds between the attempts to destroy a snapshot
RECOVERY = 240  # seconds that cleaning up waits for a host whose toolstack restarts
RECOVERY_AT_STOP = 20  # the same once a stop was asked for
TOUCH_EVERY = 60  # seconds after which a running backup touches its unfinished.partial
ABANDONED_AFTER = 900  # seconds since the last touch after which another machine's is abandoned
TOKEN = re.compile(r"([^,\s/]+),([^,\s/]+),([0-9]+),([0-9]+),[0-9a-f]{32}")
NAME_REFUSED = (errno.EINVAL, errno.EPROTO)  # how file servers refuse a name with a colon
BUSY = ("VDI_IN_USE", "OTHER_OPERATION_IN_PROGRESS")
UNKNOWN = ("CONNECTION_LOST", "TASK_TIMEOUT", "HANDLE_INVALID", "SESSION_INVALID")
GONE_FOR_NOW = ("CONNECTION_LOST", "SESSION_INVALID", "HOST_STILL_BOOTING")
# Refusals that only a snapshot meets: a halted VM can be exported as it is all the same.
ONLY_SNAPSHOTS = ("SR_BACKEND_FAILURE_44", "SR_BACKEND_FAILURE_109", "SR_OPERATION_NOT_SUPPORTED",
                  "VDI_IS_SHARABLE", "VDI_ON_BOOT_MODE_INCOMPATIBLE_WITH_OPERATION", "VM_HAS_VUSBS",
                  "OPERATION_NOT_ALLOWED")


class Outcome:
    """What became of one VM (or the pool database): for log, status log, mail and report."""

    def __init__(self, kind, name, log):
        self.kind, self.name, self._log = kind, name, log
        self.uuid = self.folder = self.file = self.sha256 = self.error = None
        self.status = "ERROR"  # upstream's word for the step that is under way
        self.bytes, self.seconds, self.transfer_seconds, self.attempts = 0, 0.0, 0.0, 0
        self.locked = self.final = self.skipped = False
        self.checks, self.warnings, self.notes, self.pruned = [], [], [], []

    @property
    def result(self):
        if self.skipped:
            return "SKIPPED"
        return "ERROR" if self.error else "WARNING" if self.warnings else "SUCCESS"

    def say(self, text):
        self._log("%s: %s" % (self.name, text))

    def note(self, text):
        self.notes.append(text)
        self.say("NOTE - %s" % text)

    def warn(self, text):
        self.warnings.append(text)
        self.say("WARNING %s" % text)


# --- the plan ---


def list_disks(vbds, vdis):
    """The Disks among VBD records (CDs and empty drives are none), by userdevice."""
    return [Disk(label, vbd, vbd["VDI"], vdis[vbd["VDI"]],
                 "[NOBAK]" in vdis[vbd["VDI"]]["name_label"])
            for label, vbd in label_disks(vbds) if vbd["VDI"] in vdis]


def first_disk(disks):
    """The disk that vdi-export takes: xvda, hda or sda, else userdevice 0 (a VM that never ran)."""
    found = [disk for device in ("xvda", "hda", "sda")
             for disk in disks if disk.vbd.get("device") == device]
    return next(iter(found + [disk for disk in disks if disk.vbd["userdevice"] == "0"]), None)


def plan_vm(settings, choice, vm, disks, srs, folders, free, refused):
    """The Plan for one VM. Pure.

    vm, disks: its record and Disks. srs: {ref: record} of the storage repositories. folders: the
    Folders in its folder. free: bytes that it may take, None if that is not to be checked.
    refused: the error of a folder name that backup_dir refuses, or None.
    """
    whole, refusal, notes = choice.kind == "vm-export", None, []
    suffix = {"False": "xva", "zstd": "xva.zst"}.get(settings.compress, "xva.gz")
    file = "%s.%s" % (folder_name(choice.name), suffix if whole else settings.vdi_export_format)
    policy = settings.policy(choice.keep)
    taken = disks if whole else [disk for disk in [first_disk(disks)] if disk]
    exported = [disk for disk in taken if not disk.left_out]
    last = [item.size for item in backups(folders) if item.export == native(file) and item.size]
    expected = expected_size(exported, file, last)
    new = Folder("the new one", float("inf"), "success", export=file, size=1, uuid=vm["uuid"],
                 date=datetime.date.today())
    stay = kept(folders + [new], policy, new.name, vm["uuid"])
    doomed = [item.name for item in backups(folders) if item.name not in stay]
    notes += ["%s holds the newest backup of another VM of this name: delete it by hand once it is"
              " not needed" % name for name, why in stay.items() if why == ["another VM's"]]
    told = _no_snapshot(whole, vm, exported, srs)
    if not whole and not exported:
        refusal = "ERROR xvda-uuid not found", Refused(
            "its first disk is marked [NOBAK]" if taken else
            "the VM has no first disk (xvda, hda, sda or userdevice 0)")
    elif refused:
        refusal = "ERROR", refused
    elif told and exports_as_it_is(choice, vm, disks, told):
        notes.append("halted, and cannot be snapshotted (%s): exported as it is" % told.code)
    elif told:
        refusal = "SNAPSHOT-FAIL" if whole else "VDI-SNAPSHOT-FAIL", told
    if settings.pre_clean and free is not None:
        early = expired(folders, policy, uuid=vm["uuid"], pre_clean=True)
        free += sum(item.size for item in folders if item.name in early)
    if not refusal and free is not None and expected > free:
        refusal = "ERROR space", Refused(
            "not enough space in %s: %s to expect, %s free (make room there, set pre_clean=True to"
            " delete the oldest backup first, or space_check=False to try all the same)"
            % (settings.backup_dir, size_text(expected), size_text(max(free, 0))))
    return Plan(choice, choice.refs[0], vm, disks, srs, file, policy, expected, stay, doomed, notes,
                refusal)


def left_out_texts(disks):
    return ["disk %s (%s) is left out" % (disk.label, disk.vdi["name_label"])
            for disk in disks if disk.left_out]


def expected_size(disks, file, last):
    """Bytes that a backup will probably need: a raw disk's virtual size, else the size of the last
    backup of the same form (of those in `last`), else what the disks occupy on their storage."""
    raw = file.endswith(".raw")
    if last and not raw:
        return last[-1]
    sizes = [(int(disk.vdi["virtual_size"]), int(disk.vdi.get("physical_utilisation", 0)))
             for disk in disks]
    return sum(size if raw or used <= 0 else min(size, used) for size, used in sizes)


def _no_snapshot(whole, vm, disks, srs):
    """The XapiError with which the host will refuse the snapshot, as far as records tell; else
    None. For a vdi-export only what concerns the disk counts (xapi_vm_lifecycle.ml)."""
    def forbids(record, operation):
        allowed = record.get("allowed_operations")
        return allowed and operation not in allowed and not record.get("current_operations")

    blocked = vm.get("blocked_operations", {}).get("snapshot")
    if whole and blocked is not None:
        return XapiError(["OPERATION_BLOCKED", blocked], "VM.snapshot")
    for disk in disks:
        who = "disk %s (%s)" % (disk.label, disk.vdi["name_label"])
        if disk.vdi.get("sharable"):
            return XapiError(["VDI_IS_SHARABLE", who])
        if disk.vdi.get("on_boot") == "reset":
            return XapiError(["VDI_ON_BOOT_MODE_INCOMPATIBLE_WITH_OPERATION", who])
        if forbids(srs.get(disk.vdi["SR"], {}), "vdi_snapshot"):
            return XapiError(["SR_OPERATION_NOT_SUPPORTED", who])
    if whole and vm.get("VUSBs"):
        return XapiError(["VM_HAS_VUSBS"])
    if whole and forbids(vm, "snapshot"):
        return XapiError(["OPERATION_NOT_ALLOWED", "the host allows no snapshot of this VM"])
    return None


def exports_as_it_is(choice, vm, disks, error):
    """Whether a VM whose snapshot is refused so can be exported without one: a halted one."""
    return (choice.kind == "vm-export" and vm["power_state"] == "Halted"
            and error.code in ONLY_SNAPSHOTS and not any(disk.left_out for disk in disks)
            and "export" not in vm.get("blocked_operations", {}))


# --- the snapshot ---

# What snapshots are of: its kind and ref, the name that ours bear, those that it has.
Source = collections.namedtuple("Source", "kind ref name snapshots")


def is_ours(record, source):
    """Whether this program made a snapshot of a Source: it bears exactly our name, or our key with
    its own uuid. Anything else in the key was inherited: other_config is copied with every
    snapshot, and comes back with a restored VM."""
    return (record["is_a_snapshot"] and record["snapshot_of"] == source.ref
            and (record["name_label"] == source.name
                 or record["other_config"].get(OUR_KEY) == "snapshot=" + record["uuid"]))


class Snapshot:
    """The snapshot of a planned VM, or of the disk that vdi-export takes: proved new, marked ours,
    made ready for the export, and destroyed at the end whatever happens.

    ref, record, disks: of what is exported. `outcome` hears what happens.
    """

    def __init__(self, xapi, watch, plan, outcome):
        self._xapi, self._watch, self._plan, self._outcome = xapi, watch, plan, outcome
        self.of_vm = plan.choice.kind == "vm-export"
        name = plan.choice.name
        self._sources = [Source("VM", plan.ref, "RESTORE_" + name, plan.vm["snapshots"])]
        for disk in plan.disks:
            our_name = ("SNAP_%s_%s" % (name, disk.vdi["name_label"])).replace(" ", "-")
            self._sources.append(Source("VDI", disk.ref, our_name, disk.vdi.get("snapshots", [])))
        self._disk = None if self.of_vm else first_disk(plan.disks)
        self._source = self._sources[0 if self.of_vm else 1 + plan.disks.index(self._disk)]
        self._made = None  # the ref of a snapshot that this process proved to be its own
        self.ref, self.record, self.disks = None, None, []

    @contextlib.contextmanager
    def taken(self):
        """The snapshot is there while this lasts. A halted VM that the host lets nobody snapshot is
        itself what is exported."""
        kind, plan, outcome = self._source.kind, self._plan, self._outcome
        known = self._xapi.call(kind + ".get_snapshots", self._source.ref)
        self._sweep()
        outcome.status = "SNAPSHOT-FAIL" if self.of_vm else "VDI-SNAPSHOT-FAIL"
        try:
            self.ref = self._take()
            self.record = self._xapi.call(kind + ".get_record", self.ref)
            if not self._is_snapshot(self.record) or self.ref in known:
                raise BackupError("the host named %s %s as the new snapshot, and it is none:"
                                  " nothing of it was changed" % (kind, self.record["uuid"]))
            self._made = self.ref
        except (Exception, Interrupted) as error:
            # Of a disk only where the outcome is not known: its snapshot bears no mark yet.
            if self.of_vm or not isinstance(error, XapiError) or error.code in UNKNOWN:
                self._look_for_lost(known)
            if not isinstance(error, XapiError) or not exports_as_it_is(
                    plan.choice, self._xapi.call("VM.get_record", plan.ref), plan.disks, error):
                raise
            self.ref, self.record, self.disks = plan.ref, plan.vm, plan.disks
            outcome.note("the host takes no snapshot of it (%s): the halted VM is exported as it"
                         " is, and a start waits until that has ended" % error.code)
        try:
            if self._made:
                self._watch.check()
                self._make_ready()
                outcome.say("snapshot %s taken" % self._source.name)
            yield self
        finally:
            if self._made:
                self._destroy(self._source, self._made, self.record)
            else:
                outcome.say("the export of the VM itself has ended: it can be started again")

    def stream(self, settings, activity):
        """The Stream of the export."""
        path, query = "/export_raw_vdi", {"vdi": self.ref, "format": settings.vdi_export_format}
        if self.of_vm:
            path, query = "/export", {"ref": self.ref}
            if settings.compress != "False":
                query["use_compression"] = "zstd" if settings.compress == "zstd" else "true"
        return Stream(self._xapi, path, query, activity)

    def prover(self, file):
        """What proves the export: the size of the disk, or the disks that have to be in it."""
        size = None if self.of_vm else int(self.record["virtual_size"])
        return prover(file, size, [disk.vdi["uuid"] for disk in self.disks])

    def _is_snapshot(self, record):
        return record["is_a_snapshot"] and record["snapshot_of"] == self._source.ref

    def _sweep(self):
        """Destroys what a killed run left on the pool, and nothing else."""
        for source in self._sources:
            for ref, record in self._xapi.records(source.kind, source.snapshots).items():
                if is_ours(record, source):
                    self._outcome.say("removing the leftover %ssnapshot %s" % (
                        "VDI " * (source.kind == "VDI"), record["uuid"]))
                    self._destroy(source, ref, record)

    def _take(self):
        """Takes the snapshot and returns what the host gives as its ref: not proved yet."""
        method, source = self._source.kind + ".snapshot", self._source
        left_out = [disk.ref for disk in self._plan.disks if disk.left_out and self.of_vm]
        args = [source.ref, source.name if self.of_vm else {}]
        more = [left_out] if left_out else []
        try:
            return self._xapi.run_task(method, *args, *more)
        except XapiError as error:
            if error.code != "MESSAGE_PARAMETER_COUNT_MISMATCH" or not left_out:
                raise
        return self._xapi.run_task(method, *args)  # a host before 21.4.0

    def _make_ready(self):
        """Marks the snapshot, so that the next run knows it, and prepares it for the export."""
        call, record, kind = self._xapi.call, self.record, self._source.kind
        self._outcome.status = "TEMPLATE-PARAM-SET-FAIL" if self.of_vm else "VDI-PARAM-SET-FAIL"
        if OUR_KEY in record["other_config"]:  # inherited: the VM was restored from such a backup
            call(kind + ".remove_from_other_config", self.ref, OUR_KEY)
        call(kind + ".add_to_other_config", self.ref, OUR_KEY, "snapshot=" + record["uuid"])
        if not self.of_vm:
            call("VDI.set_name_label", self.ref, self._source.name)
            self.disks = [self._disk]
            return
        if record["is_a_template"]:  # or an import of the XVA would give a template
            call("VM.set_is_a_template", self.ref, False)
        if record.get("ha_restart_priority"):
            try:
                call("VM.set_ha_restart_priority", self.ref, "")
            except XapiError as error:
                if error.code != "RBAC_PERMISSION_DENIED":  # that takes a pool-operator
                    raise
                self._outcome.warn("the backup keeps the VM's HA priority: %s" % error)
        disks = disks_of(self._xapi, record)
        there = {disk.vbd["userdevice"] for disk in disks}
        lost = [disk.label for disk in self._plan.disks
                if not disk.left_out and disk.vbd["userdevice"] not in there]
        if lost:
            raise BackupError("the snapshot lacks the disk %s: somebody removed it meanwhile"
                              % ", ".join(lost))
        for disk in disks:
            if disk.left_out:  # a host before 21.4.0, which cannot leave a disk out itself
                if not disk.vdi["is_a_snapshot"]:
                    raise BackupError("disk %s cannot be left out on this host" % disk.label)
                call("VDI.destroy", disk.ref)
        self.disks = [disk for disk in disks if not disk.left_out]

    def _look_for_lost(self, known):
        """After a snapshot that failed or was not answered: what came to be all the same goes."""
        try:
            found = patiently(self._watch, lambda: self._new_since(known))
            for ref, record in found.items():
                self._made = ref
                self._destroy(self._source, ref, record)
        except Exception as error:
            command = "snapshot-list" if self.of_vm else "vdi-list"
            self._outcome.warn("whether a snapshot was left could not be looked up (%s): see xe %s"
                               " for %s" % (error, command, self._source.name))
        self._made = None

    def _new_since(self, known):
        """{ref: record} of the snapshots that can be the one that this process asked for: of a VM
        those with our name; of a disk, which bears no mark yet, the one that no VM has."""
        source, vm = self._source, self._xapi.call("VM.get_record", self._plan.ref)
        if not self.of_vm and vm["current_operations"]:  # it may get a VM's disks in a moment
            raise XapiError(["OTHER_OPERATION_IN_PROGRESS"])
        new = set(self._xapi.call(source.kind + ".get_snapshots", source.ref)).difference(known)
        found = {ref: record for ref, record in self._xapi.records(source.kind, new).items()
                 if self._is_snapshot(record)
                 and (record["name_label"] == source.name if self.of_vm else not record["VBDs"])}
        if not self.of_vm and len(found) > 1:
            raise Refused("%d of disk %s are new, and are left alone: VDI %s" % (
                len(found), self._disk.label, ", ".join(vdi["uuid"] for vdi in found.values())))
        return found

    def _destroy(self, source, ref, record):
        """Destroys one of our snapshots, however often it takes. A failure is a warning."""
        try:
            patiently(self._watch, lambda: self._attempt(source, ref))
            self._outcome.say("snapshot destroyed")
        except Exception as error:
            command = "snapshot-uninstall" if source.kind == "VM" else "vdi-destroy"
            unmarked = ref == self._made and not self.of_vm and not self.disks
            again = "" if unmarked else ", the next run tries again"
            self._outcome.warn(
                "the snapshot %s could not be destroyed%s: %s (by hand: xe %s uuid=%s)"
                % (record["uuid"], again, reason_of(error), command, record["uuid"]))

    def _attempt(self, source, ref):
        """One attempt: proves the snapshot ours, then its disks, then itself; so its record, by
        which the next run knows it, is the last to go. Whoever repeats it does no harm."""
        record = self._xapi.records(source.kind, [ref]).get(ref)
        if record is None:
            return
        # One of a disk that was found, not told by the host, is ours while no VM has it.
        mine = ref == self._made and self._is_snapshot(record) and (
            self.of_vm or ref == self.ref or not record["VBDs"])
        if not mine and not is_ours(record, source):
            raise Refused("it is not this program's snapshot: left alone")
        if record.get("current_operations"):
            raise XapiError(["OTHER_OPERATION_IN_PROGRESS"])
        if source.kind == "VM":
            own = self._xapi.records("VBD", record["VBDs"])
            vdis = [vbd["VDI"] for vbd in own.values() if vbd["type"] == "Disk"]
            vdis = self._xapi.records("VDI", vdis + [record.get("suspend_VDI", NULL)])
            for vdi_ref, vdi in vdis.items():
                others = self._xapi.records("VBD", set(vdi["VBDs"]) - set(own))
                users = self._xapi.records("VM", [vbd["VM"] for vbd in others.values()])
                # dom0 reads a disk while it is exported, and lets go of it a little later.
                if not all(vm["is_control_domain"] for vm in users.values()):
                    self._outcome.warn("disk %s of the snapshot is on another VM: left alone"
                                       % vdi["uuid"])
                elif vdi["is_a_snapshot"]:
                    destroy(self._xapi, "VDI.destroy", vdi_ref)
        destroy(self._xapi, source.kind + ".destroy", ref)


def destroy(xapi, method, ref):
    """VM.destroy and its like; what is gone already is fine."""
    try:
        xapi.call(method, ref)
    except XapiError as error:
        if error.code != "HANDLE_INVALID":
            raise


def patiently(watch, action):
    """Does what cleans up: again while the host still holds a disk (an export's task ends before
    dom0 has let go of it, xen-api#4339), and while its toolstack is away."""
    pauses, begin = list(DETACH_PAUSES), time.monotonic()
    while True:
        try:
            return action()
        except XapiError as error:
            patience = RECOVERY_AT_STOP if watch.signum else RECOVERY
            away = error.code in GONE_FOR_NOW and time.monotonic() - begin < patience
            if not away and not (error.code in BUSY and pauses):
                raise
            time.sleep(2 if away else pauses.pop(0))


def disks_of(xapi, vm):
    """The Disks of a VM's record."""
    vbds = xapi.records("VBD", vm["VBDs"]).values()
    return list_disks(vbds, xapi.records("VDI", [vbd["VDI"] for vbd in vbds]))


# --- the disk ---


class Lock(contextlib.AbstractContextManager):
    """A lock in backup_dir, given as a descriptor: flock on .NAME.KIND, which the kernel lets go
    when the process dies, and which holds between the hosts of an NFS share. The file tells who
    has it, and goes at the end. supported is False where the file system has no locks.

    kind `lock`: of the backup of a VM; `read.lock`: shared by those who read its backups, and
    taken alone by who deletes some. Raises LockedError.
    """

    def __init__(self, top, name, kind="lock", shared=False):
        # The backup's lock of a VM called web.read must not be the readers' lock of web.
        name_there = re.sub(r"(\.read~*)\Z", r"\1~", name)
        self._top, self._file = top, native(".%s.%s" % (name_there, kind))
        self.supported = True
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        while True:
            self._fd = os.open(self._file, flags, 0o600, dir_fd=top)
            try:
                fcntl.flock(self._fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL):
                    self.supported = False
                    break
                holder = os.pread(self._fd, 200, 0).decode("utf-8", "replace").strip()
                os.close(self._fd)
                if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    raise LockedError("another run holds the lock of %s: %s" % (
                        name, holder or "a process that does not tell")) from None
                raise
            # The holder before may have removed the file between our open and our lock.
            with contextlib.suppress(FileNotFoundError):
                there = os.stat(self._file, dir_fd=top, follow_symlinks=False)
                if os.path.samestat(os.fstat(self._fd), there):
                    break
            os.close(self._fd)
        told = "process %d on %s since %s\n" % (
            os.getpid(), short_host_name(), time.strftime("%Y-%m-%d %H:%M:%S"))
        with contextlib.suppress(OSError):  # no space: the lock holds all the same
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, told.encode("utf-8"), 0)

    def now(self):
        """The time of the file server's clock, in seconds since 1970."""
        os.utime(self._fd)
        return os.fstat(self._fd).st_mtime

    def __exit__(self, *_error):
        with contextlib.suppress(OSError):
            if self.supported:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # no other reader has it
            os.unlink(self._file, dir_fd=self._top)
        os.close(self._fd)


def new_token():
    """What names a run: host, boot (with the namespace of its process numbers), process, its
    start, 16 random bytes."""
    boot = read_small("/proc/sys/kernel/random/boot_id").decode().strip()
    host = re.sub(r"[^\w.-]", "-", socket.gethostname()) or "-"
    return "%s,%s.%d,%d,%s,%s" % (host, boot, os.stat("/proc/self/ns/pid").st_ino, os.getpid(),
                                  _started("self"), os.urandom(16).hex())


def _started(pid):
    """When a process started, in clock ticks since boot; None if it runs no more."""
    with contextlib.suppress(OSError), open("/proc/%s/stat" % pid, "rb") as file:
        fields = file.read().rpartition(b")")[2].split()
        return None if fields[0] in b"ZX" else fields[19].decode()
    return None


def writer_of(vm_fd, name, own, now):
    """Who may still be writing an unfinished backup, in words, or "". own: this run's token.

    A process of this machine lives or not; another machine's (or one of before a reboot) may do so
    while its file was touched in the last minutes.
    """
    with contextlib.suppress(OSError), opened(name, vm_fd) as fd:
        age = now - os.stat(UNFINISHED, dir_fd=fd, follow_symlinks=False).st_mtime
        text = read_small(UNFINISHED, fd).decode("ascii", "replace")
        found = TOKEN.search(text)
        if found:
            host, boot, pid, start = found.groups()
            here = [host, boot] == own.split(",")[:2]
            alive = _started(pid) == start if here else age < ABANDONED_AFTER
            return "being written by process %s on %s" % (pid, host) if alive else ""
    return ""


def open_vm_folder(name, top):
    """A descriptor of a VM's folder in backup_dir. Raises Refused if it is a link, or another's:
    a file system may take a and A for the same, and list names in another Unicode form."""
    try:
        fd = open_folder(name, top)
    except OSError as error:
        if error.errno not in NO_FOLDER:
            raise
        raise Refused("%s is a symbolic link or no folder: refused" % name) from None
    with contextlib.suppress(OSError):  # FileNotFoundError where case counts
        twin = os.stat(name.swapcase(), dir_fd=top, follow_symlinks=False)
        folds = name.swapcase() != name and os.path.samestat(os.fstat(fd), twin)
        if folds and nfc(name) not in map(nfc, os.listdir(top)):
            os.close(fd)
            raise Refused("%s belongs to a VM whose name differs only in case" % name)
    return fd


class Target:
    """The folder of one VM, and the new backup in it. All happens relative to descriptors, so what
    was looked at is what is changed. A context manager: a backup that was not published goes.

    top: descriptor of backup_dir. name: as folder_name gives it. folders: what scan found.
    """

    def __init__(self, top, name, patterns, lock, outcome):
        self._top, self._lock_name, self._vm = top, name, native(name)
        self._patterns, self._lock, self._outcome = patterns, lock, outcome
        self._token = new_token()
        self._made_vm = self._published = False
        self._unfinished = self._vm_fd = None
        self._open = contextlib.ExitStack()  # descriptors
        self.fd = self.name = None  # of the new backup's folder
        self.sums = []  # (file below the folder, SHA-256)

    def __enter__(self):
        try:
            with contextlib.suppress(FileExistsError):
                os.mkdir(self._vm, 0o700, dir_fd=self._top)
                self._made_vm = True
            self._vm_fd = open_vm_folder(self._vm, self._top)
            self._open.callback(os.close, self._vm_fd)
            self.folders = self._clear()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _clear(self):
        """Unfinished backups of runs that are over go; those of living runs stay. Returns the
        Folders that are left."""
        left = scan(self._vm_fd, self._patterns, self._vm)
        for item in left[:]:
            if item.unfinished and item.created is not None and self._clear_one(item.name):
                left.remove(item)
        foreign = [item.name for item in left
                   if item.created is None or not item.marker and not item.unfinished]
        if foreign:
            more = ["and %d more" % len(foreign[5:])] * bool(foreign[5:])
            self._outcome.say("left alone, no backup of this program: %s"
                              % ", ".join(foreign[:5] + more))
        return left

    def _clear_one(self, name):
        writer = writer_of(self._vm_fd, name, self._token, self._lock.now())
        if writer:
            self._outcome.warn("%s is %s: left alone" % (name, writer))
            return False
        self._outcome.say("removing the unfinished backup %s" % name)
        with contextlib.suppress(OSError):  # an empty one: who has just made it makes another
            os.rmdir(name, dir_fd=self._vm_fd)
            return True
        return self._remove(name)

    def _remove(self, name):
        try:
            remove_folder(self._vm_fd, name, self._vm)
            return True
        except (OSError, BackupError) as error:
            self._outcome.warn("%s could not be removed: %s" % (name, describe(error)))
            return False

    def prune(self, policy, uuid, pre_clean=False):
        """Deletes what the rules of retention do not keep, and nothing while a restore reads."""
        doomed = None
        try:
            folders = scan(self._vm_fd, self._patterns, self._vm)
            doomed = expired(folders, policy, self.name, uuid, pre_clean)
            # Where nothing goes, it takes away the lock of a run that was killed.
            with Lock(self._top, self._lock_name, "read.lock"):
                for name in doomed:
                    self._outcome.say("deleting the oldest backup %s" % name)
                    if self._remove(name):
                        self._outcome.pruned.append(name)
        except (OSError, LockedError) as error:
            if doomed != []:
                self._outcome.warn("old backups of this VM are not deleted this time: %s"
                                   % describe(error))

    def begin(self, pattern):
        """Makes the folder of the new backup, with the token of this run in it."""
        moment, taken = datetime.datetime.now(), set(os.listdir(self._vm_fd))
        while self._unfinished is None:
            self.name = native(moment.strftime(pattern))
            moment += datetime.timedelta(seconds=1)  # two at once, or a clock set back
            if self.name in taken:
                continue
            try:
                os.mkdir(self.name, 0o700, dir_fd=self._vm_fd)
            except FileExistsError:
                continue
            # Another run may take it away, or for its own, while it is empty.
            with contextlib.suppress(FileNotFoundError, FileExistsError):
                self.fd = self._open.enter_context(opened(self.name, self._vm_fd))
                self._unfinished = new_file(UNFINISHED, self.fd, self._token.encode("ascii"))
        self._open.callback(os.close, self._unfinished)

    def touch(self):
        """Tells the runs of other machines that this one is at work."""
        fd = self.fd
        with contextlib.suppress(OSError):  # published meanwhile
            if fd is not None:
                os.utime(UNFINISHED, dir_fd=fd, follow_symlinks=False)

    def write(self, file, text):
        """Writes a small file of the backup, `NAME` or `FOLDER/NAME`, and keeps its SHA-256."""
        folder, data = native(os.path.dirname(file) or "."), utf8(text)
        with contextlib.suppress(FileExistsError):
            os.mkdir(folder, 0o700, dir_fd=self.fd)
        with opened(folder, self.fd) as fd:
            os.close(new_file(os.path.basename(file), fd, data))
            if folder != ".":  # that of the backup is flushed when it is published
                sync(fd)
        self.sums.append((file, hashlib.sha256(data).hexdigest()))

    def publish(self, file, saved, backup_dir):
        """Turns a proved export into a backup; returns its path. The marker is renamed into place
        last of all, and only while the folder is in its place and bears the token of this run."""
        os.rename(native(file + ".partial"), native(file), src_dir_fd=self.fd, dst_dir_fd=self.fd)
        lines = []
        for name, value in [(file, saved.digest)] + self.sums:
            escaped = name.replace("\\", "\\\\")  # as sha256sum does
            lines.append("%s%s  %s\n" % ("\\" if escaped != name else "", value, escaped))
        self.write("SHA256SUMS", "".join(lines))
        sync(self.fd)
        path, now = os.path.join(backup_dir, self._vm, self.name), int(time.time())
        if not os.path.samestat(os.stat(path), os.fstat(self.fd)) or read_small(
                UNFINISHED, self.fd) != self._token.encode("ascii"):
            raise BackupError("%s is another run's by now: not published" % path)
        # The order rises even if the clock was set back; ages are told by the clock itself.
        created = max([now] + [int(item.created) + 1 for item in backups(self.folders)])
        text = "created=%d\nmade=%d\n%s\n" % (created, now, self._token)
        os.pwrite(self._unfinished, text.encode("ascii"), 0)
        os.fsync(self._unfinished)
        os.rename(UNFINISHED, MARKERS[0], src_dir_fd=self.fd, dst_dir_fd=self.fd)
        self._published = True
        for fd in (self.fd, self._vm_fd, self._top):
            sync(fd)
        return path

    def __exit__(self, *_error):
        """After a failure the unfinished folder goes, if it is still this run's: never a marked
        one, and nothing that was there before. Where nothing answers any more, the next run does
        it."""
        fd, self.fd = self.fd, None
        with self._open, contextlib.suppress(OSError):
            if fd is not None and not self._published:
                marked = set(MARKERS).intersection(os.listdir(fd))
                there = os.stat(self.name, dir_fd=self._vm_fd, follow_symlinks=False)
                if not marked and os.path.samestat(there, os.fstat(fd)):
                    self._remove(self.name)
        if self._made_vm and not self._published:
            with contextlib.suppress(OSError):  # an empty folder only
                os.rmdir(self._vm, dir_fd=self._top)


# ============================== RESTORE.txt ==============================

NOTE = """\
This folder holds a backup of {what} {name} (uuid {plan.vm[uuid]}),
taken by vmbackup from the pool {pool} at the host {run.host}.

  export    {plan.file}
  memory    {memory}, {vcpus}
{disks}{networks}  storage   {sr_name} (uuid {sr})

If the host is gone: a new one has to be of its version or newer, with the storage attached and
networks of the names above, or XAPI makes some that lead nowhere. To see that the backup is whole:
       cd {folder}
       sha256sum -c SHA256SUMS
{caution}
Then one of these, typed in this folder. HOST is the pool's master; any storage repository will do.

1. With vmbackup, from any machine; it proves the export while it sends it:
       vmbackup.py restore - {folder} host={address} sr={sr}

2. With xe, in a dom0 that sees this folder:
{xe}
3. With curl, from any machine; it prints an error page if the import failed. CA is a file with
   the host's certificate, which this prints in dom0: openssl x509 -in /etc/xensource/xapi-ssl.pem
{curl}
Without any host, the disks as images:
{images}"""
WHOLE = ("""\
Never start the restored VM while the original runs: two machines of one name and address.
MAC addresses are new unless asked for (preserve=true).
""", """\
       xe vm-import filename={file} sr-uuid={sr}
     So made (by curl, too) it is called RESTORE_NAME. With the uuid that this prints for UUID:
       xe vm-param-set uuid=UUID name-label={vm}
""", """\
       curl -g --cacert CA --user root -T {file} 'https://{address}/import?sr_uuid={sr}'
""", """\
       vmbackup.py extract {folder} to=.
""")
ONE_DISK = ("""\
This is one disk of the VM. It goes into a new disk, which is attached to a VM that you make
first (memory and CPUs above, more in vm.cfg, VIFs and vm-metadata.xml).
""", """\
       xe vdi-create sr-uuid={sr} name-label={label} type=user virtual-size={size}
     With the uuid that it prints in place of VDI, and that of the VM in place of VM:
       xe vdi-import uuid=VDI filename={file} format={form}
       xe vbd-create vm-uuid=VM vdi-uuid=VDI device=0 bootable=true mode=RW type=Disk
""", """\
       curl -g --cacert CA --user root -T {file} 'https://{address}/import_raw_vdi?vdi=VDI&format={form}'
     VDI is the uuid of a new disk of at least {size} bytes. Never name one that is in use.
""", """\
       qemu-img convert -f {qemu} -O qcow2 {file} disk.qcow2
""")


def restore_note(run, plan, vm, disks, vifs, folder):
    """The text of RESTORE.txt: the ways back for just this backup. Pure. vm, disks, vifs: what is
    exported; folder: the name of the backup's."""
    whole, name = plan.choice.kind == "vm-export", plan.choice.name
    sr = plan.srs.get(disks[0].vdi["SR"], {}) if disks else {}
    path = os.path.abspath(os.path.join(
        run.settings.backup_dir, native(folder_name(name)), folder))
    form = plan.file.rpartition(".")[2]
    address = "HOST" if run.host.startswith("/") else run.host  # the socket is dom0's own
    words = {
        "what": "the VM" if whole else "the first disk of the VM", "name": printable(name),
        "pool": printable(run.pool), "address": address, "run": run, "plan": plan,
        "file": shlex.quote("./" + plan.file), "folder": shlex.quote(from_argv(path)),
        "memory": size_text(int(vm.get("memory_dynamic_max") or 0)),
        "vcpus": plural(int(vm.get("VCPUs_max") or 0), "CPU"), "vm": shlex.quote(name),
        "sr": sr.get("uuid") or "SR", "sr_name": printable(sr.get("name_label", "")),
        "label": shlex.quote(name + "-restored"), "form": form,
        "qemu": {"vhd": "vpc"}.get(form, "raw"),
        "size": sum(int(disk.vdi["virtual_size"]) for disk in disks),
        "disks": "".join("  disk      %s  %s, %s bytes, %s (uuid %s)\n" % (
            disk.label, size_text(int(disk.vdi["virtual_size"])), disk.vdi["virtual_size"],
            printable(disk.vdi["name_label"]), disk.vdi["uuid"]) for disk in disks),
        "networks": "".join("  network   %s  %s, MAC %s\n" % (
            vif["device"], printable(vif["network_name_label"]), vif["MAC"]) for vif in vifs)}
    ways = zip(("caution", "xe", "curl", "images"), WHOLE if whole else ONE_DISK)
    return NOTE.format(**words, **{key: text.format(**words) for key, text in ways})


# ============================== the backup of one VM ==============================


def back_up_vm(run, choice, xapi, outcome, activity):
    """One VM's backup, in the order that the guarantees stand on. Raises what went wrong; what
    happened on the way is told to `outcome`."""
    settings, name, outcome.status = run.settings, folder_name(choice.name), "ERROR verify_vm_name"
    check_name(choice, run.meeting)
    outcome.status = "ERROR"
    with opened(settings.backup_dir) as top, Lock(top, name) as lock, \
            Target(top, name, run.patterns, lock, outcome) as target:
        activity.touch = target.touch
        if not lock.supported:
            outcome.warn("this file system has no locks: never run two backups into it at once")
        vm, disks, srs = look_up(xapi, choice, outcome)
        with run.planning:
            plan = plan_vm(settings, choice, vm, disks, srs, target.folders, run.free(activity),
                           run.refused)
            activity.expected = plan.expected
        if plan.refusal:
            outcome.status, error = plan.refusal
            raise error
        for text in plan.notes:
            outcome.note(text)
        outcome.file = plan.file
        if settings.pre_clean:
            target.prune(plan.policy, vm["uuid"], pre_clean=True)
        target.begin(settings.backup_dir_pattern)
        outcome.say("new backup folder %s" % os.path.join(
            settings.backup_dir, native(name), target.name))
        activity.doing = "snapshot"
        with Snapshot(xapi, run.watch, plan, outcome).taken() as snapshot:
            for file, text in metadata(xapi, plan, snapshot, target.name, run, outcome):
                target.write(file, text)
            outcome.status = "VM-EXPORT-FAIL" if snapshot.of_vm else "VDI-EXPORT-FAIL"
            outcome.say("%s begins, about %s to expect" % (choice.kind, size_text(plan.expected)))
            activity.doing = "export"
            saved = save(snapshot.stream(settings, activity), plan.file + ".partial", target.fd,
                         snapshot.prover(plan.file))
            vouch(saved, outcome)
            outcome.folder = target.publish(plan.file, saved, settings.backup_dir)
            outcome.say("*** success: %s : %s" % (plan.file, size_text(saved.size)))
            activity.doing = "clean-up"
        target.prune(plan.policy, vm["uuid"])


def check_name(choice, meeting):
    """Raises Refused unless just one VM bears the name, and no other chosen one its folder."""
    several = len(choice.refs)
    if several != 1:
        raise Refused("%d VMs bear this name: rename all but one" % several if several
                      else "no VM bears this name")
    if choice.name in meeting:
        raise Refused("its folder would be that of another chosen VM too (%s): rename one"
                      % ", ".join(sorted(meeting[choice.name] - {choice.name})))


def look_up(xapi, choice, outcome):
    """(record, Disks, {ref: storage repository}) of the chosen VM as it is now."""
    ref = choice.refs[0]
    vm = xapi.records("VM", [ref]).get(ref)
    if vm is None:
        raise Refused("the VM was deleted since this run began")
    outcome.uuid = vm["uuid"]
    if vm["name_label"] != choice.name:
        outcome.warn("the VM is now called %s" % vm["name_label"])
    disks = disks_of(xapi, vm)
    for text in left_out_texts(disks):
        outcome.say(text)
    outcome.say("is %s, %s" % (vm["power_state"].lower(), plural(len(disks), "disk")))
    return vm, disks, xapi.records("SR", [disk.vdi["SR"] for disk in disks])


def vouch(saved, outcome):
    """Tells what proved the export, and warns of what could not be proved."""
    if not saved.task_known:
        outcome.warn("the host lost the task: only the check of the archive vouches for it")
    outcome.say("export proved whole: HTTP 200, %s" % ", ".join(saved.checks))
    outcome.checks, outcome.bytes, outcome.sha256 = saved.checks, saved.size, saved.digest
    outcome.transfer_seconds = saved.seconds
    for phrase in saved.checks:
        if phrase.startswith("NOT "):
            outcome.warn("the export was proved, but %s" % phrase)


def metadata(xapi, plan, snapshot, folder, run, outcome):
    """Yields (file, text) of what lies beside the export: values as of the snapshot (of a
    vdi-export as of the VM), uuids of the originals."""
    own, vm, disks = [], plan.vm, plan.disks
    if snapshot.of_vm:
        vm, disks = snapshot.record, snapshot.disks
    try:
        yield "vm-metadata.xml", fetch_ova(xapi, plan.ref, Activity(plan.choice.name))
    except BackupError as error:
        outcome.warn("no vm-metadata.xml: %s" % error)
        own = [("vm_metadata", "none")]  # so that verify knows that it never was there
    guests = (vm.get("guest_metrics", NULL), plan.vm.get("guest_metrics", NULL))
    guest = next(iter(xapi.records("VM_guest_metrics", guests).values()), {})
    os_version = re.split(r"[|;]", guest.get("os_version", {}).get("name", ""))[0].strip()
    own += [("base_template_name", vm["other_config"].get("base_template_name", "")),
            ("os_version", os_version), ("orig_uuid", plan.vm["uuid"])]
    yield "vm.cfg", cfg(dict(vm, name_label=plan.choice.name), (
        "name_label", "name_description", "memory_dynamic_max", "VCPUs_max", "VCPUs_at_startup"),
        own)
    originals = {disk.vbd["userdevice"]: disk for disk in plan.disks}
    for disk in disks:
        original = originals.get(disk.vbd["userdevice"], disk)
        place, unpluggable = folder_name("DISK-" + disk.label), original.vbd.get("unpluggable", "")
        yield place + "/vbd.cfg", cfg(disk.vbd, ("userdevice", "bootable", "mode", "type"), [
            ("unplugable", unpluggable), ("unpluggable", unpluggable),
            ("empty", disk.vbd.get("empty", "")), ("orig_uuid", original.vbd["uuid"])])
        yield place + "/vdi.cfg", cfg(disk.vdi, (
            "name_label", "name_description", "virtual_size", "type", "sharable", "read_only"), [
            ("orig_uuid", original.vdi["uuid"]),
            ("orig_sr_uuid", plan.srs.get(disk.vdi["SR"], {}).get("uuid", ""))])
    vifs = sorted(xapi.records("VIF", vm["VIFs"]).values(), key=lambda vif: vif["device"].zfill(4))
    uuids = {vif["device"]: vif["uuid"] for vif in xapi.records("VIF", plan.vm["VIFs"]).values()}
    networks = xapi.records("network", [vif["network"] for vif in vifs])
    for vif in vifs:
        vif["network_name_label"] = networks.get(vif["network"], {}).get("name_label", "")
        yield "VIFs/%s.cfg" % folder_name("vif-" + vif["device"]), cfg(
            vif, ("device", "network_name_label", "MTU", "MAC", "other_config"),
            [("orig_uuid", uuids.get(vif["device"], vif["uuid"]))])
    yield "RESTORE.txt", restore_note(run, plan, vm, snapshot.disks, vifs, folder)


def cfg(record, keys, more):
    """The text of a .cfg file: these keys of an API record, in this order, then `more` pairs."""
    lines = []
    for key, value in [(key, record.get(key, "")) for key in keys] + more:
        value = str(value).replace("\\", "\\\\").replace("\r", "\\r").replace("\n", "\\n")
        lines.append("%s=%s\n" % (key, value))
    return "".join(lines)


def fetch_ova(xapi, ref, activity):
    """The ova.xml of the VM's /export_metadata, indented."""
    from xml.parsers import expat

    query = {"ref": ref, "export_snapshots": "false"}
    with Stream(xapi, "/export_metadata", query, activity) as stream:
        reader = Reader(ring(stream.readinto), "the beginning of /export_metadata")
        data = take_ova(reader)
        reader.skip(1024)  # the end of the archive
        while reader.some(MIB):
            if reader.at > METADATA_LIMIT:
                raise BackupError("/export_metadata gave more than %s" % size_text(METADATA_LIMIT))
        stream.verdict()
    try:
        expat.ParserCreate().Parse(bytes(data), True)
        return indented(data.decode("utf-8"))
    except (expat.ExpatError, UnicodeDecodeError) as error:
        raise BackupError("/export_metadata gave no ova.xml: %s" % describe(error)) from None


def indented(text):
    """Well-formed XML, each element that holds others on lines of its own. (minidom would take many
    times its memory.)"""
    depth, lines = 0, []
    # An element without content stays one: a line end in it would be its content.
    text = re.sub(r"<(\w+)></\1>", r"<\1/>", text.strip())
    for tag in text[1:-1].split("><"):  # text holds no <
        depth -= tag.startswith("/")
        lines.append("%s<%s>\n" % ("  " * depth, tag))
        depth += tag[0] not in "/?!" and "</" not in tag and not tag.endswith("/")
    return "".join(lines)


# ============================== choice and preview ==============================

PROBE = ".vmbackup-probe-%s-" % short_host_name()  # in backup_dir, and a process number behind it


def free_bytes(path):
    """Bytes that are free in a file system; None where it does not tell."""
    with contextlib.suppress(OSError):
        usage = shutil.disk_usage(path)
        return usage.free if usage.total else None
    return None


def candidates(xapi, log):
    """{ref: record} of the pool's VMs that are neither template, snapshot nor control domain, nor
    just being imported."""
    flags, found = ("is_a_template", "is_a_snapshot", "is_control_domain"), {}
    for ref, vm in xapi.all("VM").items():
        if not any(vm.get(flag) for flag in flags):
            if "import" in vm.get("current_operations", {}).values():
                log("NOTE - %s is being imported: left out" % vm["name_label"])
            else:
                found[ref] = vm
    return found


def tell_choice(settings, selection, log):
    """Logs upstream's block with what the rules came to, and what is odd about them. Adds to
    settings.warnings. Raises ConfigError where nothing at all is to be done."""
    log("VmBackup.py running with these settings:")
    for key in ("backup_dir", "status_log", "compress", "max_backups", "vdi_export_format",
                "pool_db_backup"):
        value = getattr(settings, key)
        log("  %-17s = %s" % (key, "none" if value is None else value))
    lists = {"exclude": selection.excluded + selection.unknown_excludes}
    for kind in ("vdi-export", "vm-export"):
        chosen = [choice for choice in selection.choices if choice.kind == kind]
        lists[kind] = ["%s:%d" % (c.name, c.keep) if c.keep else c.name for c in chosen]
    for key, items in lists.items():
        log("  %s (cnt)= %d" % (key, len(items)))
        log(("  %s: %s" % (key, ", ".join(sorted(items)))).rstrip())
    settings.warnings += ["***WARNING - vm not found: %s" % rule for rule in selection.unmatched]
    if selection.unknown_excludes:
        unknown = " ".join(selection.unknown_excludes)
        settings.warnings.append("***WARNING - vm(s) Exclude does not exist: %s" % unknown)
    for line in settings.notes + settings.warnings:
        log(line)
    missing = [choice.name for choice in selection.choices if not choice.refs]
    if missing:
        log("ERROR - vm(s) List does not exist: %s" % " ".join(missing))
    for choice in selection.choices:
        if len(choice.refs) > 1:
            log("*** ERROR: duplicate VM name found: %s" % choice.name)
    for text in selection.notes:
        log(text)
    log("VMs-not-in-backup: %s" % ", ".join(selection.left))
    if not selection.choices and (settings.only or not settings.pool_db_backup):
        raise ConfigError("ERROR - nothing to back up: the rules choose no VM%s" % (
            " that only= matches" if settings.only else ""))


def try_out(settings, names):
    """What one probe of backup_dir tells, gone afterwards: (the error of a new backup's name that
    its file system refuses, or None; {VM's name: the names that lead to one folder}: long names
    that are cut alike, and where case or Unicode forms are folded). Raises ConfigError unless
    something can be made there."""
    alike, meeting, refused = collections.defaultdict(list), collections.defaultdict(set), None
    for name in names:
        alike[unicodedata.normalize("NFC", folder_name(name)).casefold()].append(name)
    remove_probes(settings.backup_dir)
    probe = os.path.join(settings.backup_dir, "%s%d" % (PROBE, os.getpid()))
    new = datetime.datetime.now().strftime(settings.backup_dir_pattern)
    try:
        os.mkdir(probe, 0o700)
        os.mkdir(os.path.join(probe, native(new)), 0o700)
    except OSError as error:
        if error.errno in NAME_REFUSED and os.path.exists(probe):
            refused = Refused("the file system of backup_dir refuses a folder called %s: set"
                              " backup_dir_pattern=backup-%%Y-%%m-%%d-%%H-%%M-%%S" % new)
        elif error.errno not in (errno.ENOSPC, errno.EDQUOT):  # that is for each VM to say
            remove_probes(settings.backup_dir)
            raise ConfigError("ERROR - backup_dir is not writable: %s" % describe(error)) from None
    for group in alike.values():
        for pair in itertools.combinations(group, 2):
            first, second = (os.path.join(probe, native(folder_name(name))) for name in pair)
            same = first == second
            with contextlib.suppress(OSError):
                os.mkdir(first, 0o700)
                same = os.path.lexists(second)
                os.rmdir(first)
            for name in pair if same else ():
                meeting[name].update(pair)
    remove_probes(settings.backup_dir)
    return refused, meeting


def remove_probes(backup_dir):
    """Removes the probes of this process and of killed ones of this host: only empty folders."""
    for probe in os.listdir(backup_dir):
        pid, path = probe[len(PROBE) :], os.path.join(backup_dir, probe)
        if probe.startswith(PROBE) and (
                pid == str(os.getpid()) or not os.path.exists("/proc/" + pid)):
            with contextlib.suppress(OSError):
                for _, names, _, fd in os.fwalk(path, topdown=False):
                    for name in names:
                        os.rmdir(name, dir_fd=fd)
                os.rmdir(path)


def preview_vms(run, xapi, vms, selection):
    """Logs what a run would do with each VM: a table, then in full what matters. The number of
    calls does not depend on the pool. Returns the exit status."""
    settings, log = run.settings, run.log
    pool = types.SimpleNamespace(
        vms=vms, vdis=xapi.all("VDI"), srs=xapi.all("SR"), free=run.free(), total=0, told=[],
        plugged={pbd["SR"] for pbd in xapi.all("PBD").values() if pbd["currently_attached"]},
        vbds=collections.defaultdict(list), warnings=[])
    for vbd in xapi.all("VBD").values():
        pool.vbds[vbd["VM"]].append(vbd)
    rows, failed = [], {}
    for choice in sorted(selection.choices, key=lambda choice: choice.name.lower()):
        try:
            check_name(choice, run.meeting)
            cells = _preview_vm(run, choice, pool)
        except (OSError, BackupError) as error:
            failed[choice.name] = describe(error)
            cells = ["ERROR: %s" % describe(error)]
        rows.append([choice.name, choice.kind] + cells)
    rows.sort(key=len)  # those that fail first
    rows.insert(0, ["VM", "kind", "disks", "to expect", "there/kept", "would go"])
    settings.warnings += pool.warnings
    for line in (table(rows, right=(2, 3, 4)) if rows[1:] else []) + pool.told + pool.warnings:
        log(line)
    for pair in failed.items():
        log("***ERROR - %s: %s" % pair)
    free = free_bytes(settings.backup_dir)
    log("together about %s to expect%s%s" % (
        size_text(pool.total), "" if free is None else ", %s free" % size_text(free),
        ": the last ones may not fit" if free is not None and pool.total > free else ""))
    mail = "none" if not settings.mail_to or settings.mail_when == "never" else (
        "to %s (%s)" % (", ".join(settings.mail_to), settings.mail_when))
    reports = [path for path in (settings.report_json, settings.metrics_file) if path]
    log("pool %s, host %s, parallel=%d, mail: %s, reports: %s" % (
        run.pool, run.host, settings.parallel, mail, ", ".join(reports) or "none"))
    run.watch.check()
    if failed:
        log("ERROR preview parameters: %s could not be backed up: %s" % (
            plural(len(failed), "VM"), ", ".join(failed)))
        return 2
    found = " - WARNINGS found (see above)" if settings.warnings else ""
    log("SUCCESS preview parameters" + found)
    return 1 if settings.warnings else 0


def _preview_vm(run, choice, pool):
    """The cells of the table. What is to be told or expected is added to the pool's; raises why
    the run would fail."""
    settings, name, ref = run.settings, native(folder_name(choice.name)), choice.refs[0]
    disks, folders, warn = list_disks(pool.vbds[ref], pool.vdis), [], []
    with opened(settings.backup_dir) as top, contextlib.ExitStack() as stack:
        with contextlib.suppress(FileNotFoundError):
            vm_fd = open_vm_folder(name, top)
            stack.callback(os.close, vm_fd)
            folders = scan(vm_fd, run.patterns, name)
        plan = plan_vm(settings, choice, pool.vms[ref], disks, pool.srs, folders, pool.free,
                       run.refused)
        begun = [item.name for item in folders if item.created is not None and item.unfinished]
        for old in plan.doomed + begun:
            try:
                with opened(old, vm_fd) as fd:
                    judge(fd, name)
                why = old in begun and writer_of(vm_fd, old, new_token(), time.time())
            except (OSError, BackupError) as error:
                why = describe(error)
            warn += ["%s cannot be deleted: %s" % (old, why)] if why else []
    rules = ["%s %d" % rule for rule in zip(plan.policy._fields, plan.policy) if rule[1]]
    told = ["would delete %s (beyond %s)" % (", ".join(plan.doomed), ", ".join(rules))
            ] * bool(plan.doomed)
    told += ["would remove the unfinished backup %s" % old for old in begun]
    told += left_out_texts(disks) + ["NOTE - %s" % text for text in plan.notes]
    pool.total += plan.expected
    pool.told += ["%s: %s" % (choice.name, text) for text in told]
    pool.warnings += ["***WARNING - %s: %s" % (choice.name, text) for text in warn]
    if plan.refusal:
        raise plan.refusal[1]
    for vdi in [pool.vdis.get(vbd["VDI"]) for vbd in pool.vbds[ref]]:
        if vdi and vdi["SR"] not in pool.plugged and choice.kind == "vm-export":
            raise XapiError(["NO_HOSTS_AVAILABLE", vdi["name_label"]])
    return [str(sum(not disk.left_out for disk in disks)), size_text(plan.expected),
            "%d/%d" % (len(backups(folders)), len(plan.kept)),
            gone_text(plan.doomed) or "-"]


def gone_text(folders):
    """'2 backups', or just one's date."""
    date = "".join(folders).replace("backup-", "")
    return plural(len(folders), "backup") if folders[1:] else date


# ============================== the run ==============================

POOL_DUMP = re.compile(r"pool_db_\d{8}-\d{6}\.dump(\.partial)?\Z")
RESULTS = {"ERROR": "FAILED", "WARNING": "warning", "SKIPPED": "skipped", "SUCCESS": "ok"}


def run_table(run):
    """Lines of the table of what became of each VM: the failed ones first, the totals last."""
    order, rows = list(RESULTS), [["VM", "result", "size", "time", "rate", "note"]]
    items = [("pool database" if item is run.pool_database else item.name, item)
             for item in run.results()]
    items.sort(key=lambda pair: (order.index(pair[1].result), pair[0].lower()))
    for name, item in items:
        if item.error:  # nothing is as important as the reason: it takes the other columns, too
            rows.append([name, RESULTS[item.result], item.error])
            continue
        gone = ["deleted " + gone_text(item.pruned)] if item.pruned else []
        rows.append([name, RESULTS[item.result], size_text(item.bytes) if item.bytes else "",
                     time_text(item.seconds) if item.seconds else "",
                     rate_text(item.bytes / item.transfer_seconds) if item.transfer_seconds else "",
                     "; ".join(item.warnings + item.notes + gone)])
    failed, free = [name for name, item in items if item.error], free_bytes(run.settings.backup_dir)
    notes = ["%s left" % size_text(free)] if free is not None else []
    notes += ["%d failed: %s" % (len(failed), ", ".join(failed))] if failed else []
    seconds, size = time.monotonic() - run.begin, sum(item.bytes for _, item in items)
    rows.append(["total", "", size_text(size), time_text(seconds),
                 rate_text(size / max(seconds, 0.001)), "; ".join(notes)])
    return table(rows, right=(2, 3, 4))


class Run:
    """One run of the program, and what its VMs share; filled while it goes on, for the reports.

    log: function(text), with progress(activities). status: function(program, *texts), the status
    log. watch: the Watch.
    """

    def __init__(self, settings, log, status, watch):
        self.settings, self.log, self.status, self.watch = settings, log, status, watch
        self.patterns = list(dict.fromkeys([settings.backup_dir_pattern, DEFAULT_PATTERN]))
        self.start, self.begin = datetime.datetime.now(), time.monotonic()
        self.host = self.pool = ""
        self.exit_status, self.error, self.begun = 3, None, False
        self.outcomes, self.pool_database, self.table = [], None, []
        self.not_in_backup = self.pool_vms = None
        self.refused, self.meeting = None, {}  # see try_out
        self.planning, self._touched = threading.Lock(), 0.0

    def execute(self, hosts, credentials, preview):
        """Connects, chooses, and previews or backs up. Returns the exit status. The main thread
        only waits, and applies the rules: their regular expressions would hold up all others."""
        new_xapi = functools.partial(Xapi, hosts, credentials, self.log, self.watch)
        xapi, watch = new_xapi(), self.watch
        try:
            vms, names = watch.do(self._connect, xapi), {}
            for ref, vm in vms.items():
                names.setdefault(vm["name_label"], []).append(ref)
            selection = watch.pure(select, self.settings.rules, names, self.settings.only)
            self.pool_vms, self.not_in_backup = sorted(names), selection.left
            watch.do(self._prepare, selection)
            if preview:
                return watch.do(preview_vms, self, xapi, vms, selection)
            del vms  # thousands of records are not held while the exports run
            return watch.do(self._back_up, xapi, new_xapi, selection)
        except ConnectionLost:
            watch.check()  # perhaps it was a signal that broke it off
            raise
        finally:
            watch.do(xapi.close)

    def _connect(self, xapi):
        if not self.settings.tls_verify:
            self.log("***WARNING - tls_verify=False: the host's certificate is not checked")
        xapi.connect()
        self.watch.check()
        pool = xapi.pool()
        self.host, self.pool = str(xapi.endpoint), pool.get("name_label", "")
        return candidates(xapi, self.log)

    def _prepare(self, selection):
        """What run and preview look at alike before the first VM."""
        tell_choice(self.settings, selection, self.log)
        names = [choice.name for choice in selection.choices]
        self.refused, self.meeting = try_out(self.settings, names)

    def _back_up(self, xapi, new_xapi, selection):
        """Backs up the pool database if asked, and the VMs, `parallel` at a time."""
        self.log("VmBackup running on %s, pool %s, host %s"
                 % (short_host_name(), self.pool, self.host))
        self.begun = True
        self.status("vmbackup.py", "begin")
        self.log("Space before backups: %s" % self._space())
        with self.watch.attend(self._show):
            self._work([xapi] + [new_xapi() for _ in range(self.settings.parallel - 1)],
                       selection.choices)
        self.log("Space after backups: %s" % self._space())
        self.table = run_table(self)
        for line in self.table:
            self.log(line)
        tally = "S:%d W:%d E:%d" % self.counts()[:3]
        self.status("vmbackup.py", "end", status_word(self._verdict()), tally)
        code = self._verdict()  # once more: that line too may have been the first that failed
        text = {0: "Success", 1: "**WARNING(s)**"}.get(code, "**ERRORS DETECTED**")
        self.log("VmBackup ended - %s - %s" % (text, tally))
        return code

    def _work(self, idle, choices):
        """Does the jobs, each with one of the idle Xapis; those that failed and may end otherwise
        again when all are done, `retries` times."""
        jobs: Any = []
        if self.settings.pool_db_backup:
            name = "METADATA_" + short_host_name()
            self.pool_database = Outcome("pool-db", name, self.log)
            jobs.append((self.pool_database, "pool database", self._dump))
        for number, choice in enumerate(choices, 1):
            jobs.append((Outcome(choice.kind, choice.name, self.log),
                         "[%d/%d] %s" % (number, len(choices), choice.name),
                         functools.partial(back_up_vm, self, choice)))

        def do(job, tries_left):
            xapi = idle.pop()
            try:
                return self._try(xapi, tries_left, *job)
            finally:
                idle.append(xapi)

        try:
            with ThreadPoolExecutor(len(idle)) as pool:
                for tries_left in range(self.settings.retries, -1, -1):
                    failed = list(pool.map(do, jobs, itertools.repeat(tries_left)))
                    jobs = [job for job, again in zip(jobs, failed) if again]
                    if not jobs:
                        break
        finally:
            for xapi in idle:
                xapi.close()

    def _try(self, xapi, tries_left, outcome, label, work):
        """One attempt at a VM, or at the pool database. Tells at once what came of it; True if it
        is to be tried again."""
        earlier, stopped = outcome.error, self.watch.signum
        if not earlier and not stopped and outcome is not self.pool_database:
            self.status(outcome.kind, "begin", outcome.name)
        if not stopped:  # else nothing is begun, nor begun again
            begin, outcome.error, outcome.status = time.monotonic(), None, "ERROR"
            outcome.attempts += 1
            try:
                with self.watch.activity(label) as activity:
                    work(xapi, outcome, activity)
            except (Exception, Interrupted) as error:
                broken = isinstance(error, ConnectionLost) and self.watch.signum  # by the stop
                outcome.error = reason_of(Interrupted(self.watch.signum) if broken else error)
                outcome.final = getattr(error, "final", False)
                outcome.locked = isinstance(error, LockedError)
                outcome.status = "ERROR locked" if outcome.locked else outcome.status
                debug(outcome.say)
            outcome.seconds += time.monotonic() - begin
        outcome.skipped = not outcome.attempts
        if outcome.error and not outcome.final and tries_left and not self.watch.signum:
            outcome.say("failed, to be tried again when all others are done: %s" % outcome.error)
            return True
        if earlier and not outcome.error:
            outcome.warn("saved by try %d; before: %s" % (outcome.attempts, earlier))
        if outcome is not self.pool_database:
            self.outcomes.append(outcome)
        if not outcome.skipped:
            self._tell(outcome)
        return False

    def _tell(self, outcome):
        """What came of a VM or the pool database: a line in the log, for a VM in the status log."""
        if outcome is self.pool_database:
            if outcome.error:
                self.log("***ERROR - pool database backup failed: %s" % outcome.error)
            return
        text, told = "***ERROR*** %s" % outcome.error, "%s %s" % (outcome.status, outcome.name)
        if not outcome.error:
            word = "WARNING" if outcome.warnings else "Success"
            text = "***%s*** t:%d" % (word, outcome.seconds // 60)
            told = "%s %s,elapse:%d size:%dG" % (
                outcome.result, outcome.name, outcome.seconds // 60, outcome.bytes // (1 << 30))
        self.status(outcome.kind, "end", told)
        self.log("VmBackup %s %s - %s" % (outcome.kind, outcome.name, text))

    def _dump(self, xapi, outcome, activity):
        """Dumps the pool's database to METADATA_SERVER/pool_db_YYYYMMDD-HHMMSS.dump and keeps the
        max_backups newest."""
        own, pattern = native(folder_name(outcome.name)), "pool_db_%Y%m%d-%H%M%S.dump"
        path = os.path.join(self.settings.backup_dir, own)
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, 0o700)
        with opened(self.settings.backup_dir) as top, Lock(top, from_argv(own)), \
                opened(own, top) as fd:
            there = sorted(filter(POOL_DUMP.match, os.listdir(fd)))
            dumps = [name for name in there if name.endswith(".dump")]
            for name in set(there).difference(dumps):
                os.unlink(name, dir_fd=fd)
            moment, tables = datetime.datetime.now(), ()
            while moment.strftime(pattern) in dumps:
                moment += datetime.timedelta(seconds=1)
            name = moment.strftime(pattern)
            with contextlib.suppress(IndexError, BackupError, OSError), open(
                    open_file(dumps[-1], fd), "rb", buffering=0) as file:
                tables = dump_tables(ring(file.readinto))  # the last may be damaged
            stream = Stream(xapi, "/pool/xmldbdump", {}, activity, xapi.master())
            try:
                saved = save(stream, name + ".partial", fd,
                             functools.partial(prove_dump, tables=tables))
                os.rename(name + ".partial", name, src_dir_fd=fd, dst_dir_fd=fd)
            finally:
                with contextlib.suppress(OSError):
                    os.unlink(name + ".partial", dir_fd=fd)
            sync(fd)
            outcome.folder, outcome.file = path, name
            vouch(saved, outcome)
            self.log("pool database saved: %s, %s" % (name, size_text(saved.size)))
            for old in dumps[: max(len(dumps) + 1 - self.settings.max_backups, 0)]:
                try:
                    os.unlink(old, dir_fd=fd)
                    outcome.pruned.append(old)
                except OSError as error:
                    outcome.warn("%s could not be removed: %s" % (old, describe(error)))

    # --- what the VMs share ---

    def _show(self, activities):
        if time.monotonic() - self._touched > TOUCH_EVERY:
            self._touched = time.monotonic()
            for activity in activities:
                activity.touch()
        self.log.progress(activities)

    def free(self, mine=None):
        """Bytes that backups may take, without those that others under way still expect; None where
        that is not to be checked, or nothing tells. mine: the Activity that asks."""
        free = free_bytes(self.settings.backup_dir) if self.settings.space_check else None
        if free is not None:
            free -= sum(max(other.expected - other.done, 0) for other in self.watch.activities[:]
                        if other is not mine)
        return free

    def _space(self):
        path = self.settings.backup_dir
        try:
            usage = shutil.disk_usage(path)
        except OSError as error:
            return describe(error)
        if not usage.total:
            return "NOTE - %s tells no size: whether backups will fit is not checked" % path
        return "%s total %s, used %s, free %s" % ((path,) + tuple(map(size_text, usage)))

    def results(self):
        """The Outcomes so far: that of the pool database, then those of the VMs."""
        return [item for item in [self.pool_database] if item] + self.outcomes

    def counts(self):
        """(S, W, E, skipped): of the pool database only E counts."""
        results = collections.Counter(item.result for item in self.outcomes)
        failed = bool(self.pool_database and self.pool_database.error)
        return (results["SUCCESS"], results["WARNING"], results["ERROR"] + failed,
                results["SKIPPED"])

    def _verdict(self):
        """0 all good, 1 warnings, 2 errors, 4 if all that was to be done was locked, 128+n."""
        if self.watch.signum:
            return 128 + self.watch.signum
        if any(item.error for item in self.results()):
            return 4 if all(item.locked for item in self.results()) else 2
        warned = any(item.warnings for item in self.results())
        return 1 if self.settings.warnings or warned else 0


# ============================== restore ==============================
#
# Makes a VM (of an XVA) or a disk (of raw and vhd) on the pool, and changes nothing that was there.
# What a restore made and did not finish, clear() destroys: the one place here that does.

HELD_BACK = 4 * MIB  # bytes at the end of an export that go out only when all is proved
LONGEST_CHUNK = 66 * MIB  # of an XVA, with headers and end: the same where the last one is longer
HOST_ENDS = 120  # seconds that the task of a restore which was killed may still take to end
UNUSED_ENDS = 5  # the same where nothing bears it: it may be that nothing was sent
NOTE_FILE = re.compile(r"\.restore-[0-9a-f-]{36}\.json\Z")
ELSEWHERE = "/var/tmp"  # for the notes, where backup_dir cannot be written  # noqa: S108


def check_packages():
    """Raises ConfigError where one of the two packages is missing: in dom0 they may be."""
    import importlib.util

    for module in ("XenAPI", "requests"):
        if importlib.util.find_spec(module) is None:
            raise ConfigError("ERROR - the Python package %s is missing: pip install %s, or use"
                              " vmbackup.pyz, which carries it" % (module, module))


def restore(places, options, log, watch):
    """A backup's way back to a pool. Returns the exit status. Raises ConfigError for what is
    refused before anything was sent, another BackupError for what failed."""
    path, first = os.path.realpath(native(places[1])), native(places[0])
    if not os.path.exists(path) and (os.path.isdir(first) or EXPORT.match(first)):
        raise ConfigError("ERROR - the first argument has to be the password (a password file, - or"
                          " local)")
    if not os.path.exists(path):
        raise ConfigError("ERROR - there is no config file, folder or export %s" % places[1])
    is_config = os.path.isfile(path) and not EXPORT.match(os.path.basename(path))
    backup = options.get("backup", "")
    if "/" in backup:
        raise ConfigError("ERROR - backup=%s: the name of a folder in the VM's" % backup)
    if is_config != bool(places[2:]) or backup and not is_config:
        raise ConfigError("ERROR - the VM's name is missing" if is_config else
                          "ERROR - a VM's name and backup= go with a config file")
    if options.get("as", "") != printable(options.get("as", "")):
        raise ConfigError("ERROR - as=%s: no VM can bear such a name" % options["as"])
    if options.get("preserve", "true").lower() not in ("true", "false"):
        raise ConfigError("ERROR - preserve=%s: allowed are True, False" % options["preserve"])
    settings = make_settings(load_config(path) if is_config else [], options["settings"])
    if is_config:
        folder = os.path.join(settings.backup_dir, native(folder_name(places[2])))
        path = os.path.join(folder, native(backup))
    check_packages()
    hosts = endpoints(settings, places[0] == "local")
    watch.rate = settings.rate_limit * 10**6
    xapi = Xapi(hosts, watch.pure(credentials, settings, places[0]), log, watch)
    if not settings.tls_verify:
        log("***WARNING - tls_verify=False: the host's certificate is not checked")
    try:
        with watch.attend(log.progress):
            return watch.do(restore_from, path, options, xapi, log)
    except ConnectionLost:
        watch.check()  # perhaps it was a signal that broke it off
        raise
    finally:
        watch.do(xapi.close)


def restore_from(path, options, xapi, log):
    """The same in a worker. path: of what is restored; see find_source."""
    begin = time.monotonic()
    with contextlib.ExitStack() as stack:
        source = find_source(path, log, stack)
        xapi.connect()
        pool = xapi.pool()
        source.places.append(stack.enter_context(opened(ELSEWHERE)))
        for place in [] if "preview" in options else source.places:
            sweep(xapi, place, pool["uuid"], log)
        plan = plan_restore(options, source, xapi, pool, log)
        xapi.watch.check()
        if "preview" not in options:
            with xapi.watch.activity("restore of " + source.label) as activity:
                uuid = carry_out(xapi, source, plan, activity, log)
            log("restored: %s uuid=%s t:%d" % (plan.name, uuid, (time.monotonic() - begin) // 60))
    return 0


# --- what is on disk ---


def find_source(path, log, stack):
    """What is restored, a namespace: file (open), file_name, size, form (raw, vhd or None: an XVA),
    kind (of object that it becomes), digest (the SHA-256 it has to have, or None), disk_size and
    sr_uuid (of a single disk, as recorded), name and uuid of its VM, label, date, places
    (descriptors of folders for the note). It stays locked and open as long as `stack`.

    path: of a backup's folder, of an export, or of a VM's folder with a slash at its end: the
    newest. Raises ConfigError, ArchiveError."""
    folder = os.path.dirname(path) if os.path.isfile(path) else path
    sums, places, disk_size, sr_uuid = {}, [], None, None
    try:
        if folder != path and not EXPORT.match(os.path.basename(path)):
            raise FileNotFoundError
        if folder != path and not set(MARKERS).intersection(os.listdir(folder)):
            item = Folder("", export=os.path.basename(path), made=os.stat(path).st_mtime)
            fd = stack.enter_context(opened(folder))
        else:
            above, name = os.path.split(folder)
            top, vm = os.path.split(above)
            places.append(stack.enter_context(opened(top)))
            try:
                stack.enter_context(Lock(places[0], from_argv(vm), "read.lock", shared=True))
            except OSError as error:
                log("***WARNING - not locked against a deletion: %s" % describe(error))
            vm_fd = stack.enter_context(opened(vm, places[0]))
            found = [item for item in backups(scan(vm_fd, None)) if name in ("", item.name)]
            if not found:
                raise FileNotFoundError
            fd = stack.enter_context(opened(found[-1].name, vm_fd))
            export, sums, _ = look_into(fd)
            item = found[-1]._replace(export=export)
        file = stack.enter_context(io.FileIO(open_file(item.export, fd)))
        stem, form = EXPORT.match(item.export).groups()
        if form in ("raw", "vhd"):
            disk_size, sr_uuid = recorded_disk(fd)
    except FileNotFoundError:
        raise ConfigError("ERROR - there is no such backup with a marker: %s" % path) from None
    except OSError as error:
        raise ConfigError("ERROR - cannot read the backup: %s" % describe(error)) from None
    form = form if form in ("raw", "vhd") else None
    return types.SimpleNamespace(
        file=file, file_name=item.export, size=os.fstat(file.fileno()).st_size, places=places,
        form=form, kind="VDI" if form else "VM", digest=sums.get(item.export),
        label=item.name or item.export, disk_size=disk_size, sr_uuid=sr_uuid, uuid=item.uuid,
        date=datetime.datetime.fromtimestamp(item.made),
        name=item.label or printable(vm_name(stem)))


def recorded_disk(fd):
    """(virtual_size in bytes or None, uuid of its storage repository or None) of the first disk of
    a backup's folder, by its vdi.cfg."""
    for path in FIRST_DISKS:
        with contextlib.suppress(FileNotFoundError):
            vdi = read_cfg(path, fd)
            size = vdi.get("virtual_size", "")
            return int(size) if size.isdigit() else None, vdi.get("orig_sr_uuid")
    return None, None


def read_ova(source):
    """What an XVA's ova.xml tells, a namespace: version (two numbers, of its XAPI), name, uuid and
    mac_seed of its VM, uuids {class: set}, networks [(name, bridge)], sizes of its disks in bytes.
    Raises ArchiveError."""
    unpack = {".gz": gunzip, ".zst": unzstd}.get(os.path.splitext(source.file_name)[1], iter)
    with contextlib.closing(unpack(ring(source.file.readinto))) as pieces:
        version, records, disks = parse_ova(take_ova(Reader(pieces, "the very beginning")))
    try:
        (vm,), networks = records["VM"].values(), records["network"].values()
        return types.SimpleNamespace(
            version=[int(version.get(key, 0)) for key in ("xapi_major", "xapi_minor")],
            name=vm["name_label"], uuid=vm["uuid"], mac_seed=vm["other_config"].get("mac_seed"),
            uuids={kind: {record["uuid"] for record in records[kind].values()}
                   for kind in ("VM", "VBD", "VIF", "VTPM")},
            networks=[(network["name_label"], network["bridge"]) for network in networks],
            sizes=[disk.size for disk in disks.values()])
    except Exception as error:  # hostile records are of any shape
        raise ArchiveError("ova.xml does not tell of just one VM: %s" % describe(error)) from None


def held_back(source):
    """How many bytes at the end go out last: of a plain archive all from the header of the last
    chunk on, for XAPI reads it no further. Raises ArchiveError where none is near the end."""
    if not source.size:
        raise ArchiveError("it is empty")
    for held in (HELD_BACK, LONGEST_CHUNK):
        start = max(source.size - held, 0) // 512 * 512
        tail = os.pread(source.file.fileno(), source.size - start, start)
        end = max(tail.rfind(b".xxhash\0"), tail.rfind(b".checksum\0"))
        near = end > 0 and tail[end // 512 * 512 : end] + b"\0" in tail  # its chunk's name
        if near or not start or not source.file_name.endswith(".xva"):
            return held
    raise ArchiveError("there is no disk's chunk near its end")


def plan_restore(wish, source, xapi, pool, log):
    """What a restore makes, and where, a namespace: checked against the pool, and logged. Changes
    nothing. Raises ConfigError where it is refused."""
    plugged = {pbd["SR"] for pbd in xapi.all("PBD").values() if pbd["currently_attached"]}
    srs = {ref: dict(sr, free=max(int(sr["physical_size"]) - int(sr["physical_utilisation"]), 0))
           for ref, sr in xapi.all("SR").items()
           if sr["content_type"] != "iso" and ref in plugged}
    ref = choose_sr(wish.get("sr"), source, pool, srs)
    plan = types.SimpleNamespace(pool=pool, sr=ref, preserve=wish.get("preserve", "false").lower(),
                                 names=[], kin=[], length=source.size)
    others, name, networks = xapi.all(source.kind), source.name, []
    if source.form:
        told = int.from_bytes(os.pread(source.file.fileno(), 8, 48), "big")  # a VHD's own size
        plan.sizes = [told if source.form == "vhd" else source.disk_size or source.size]
        if source.form == "raw":  # the file may be longer than its disk, by zeros
            plan.length = min(source.size, plan.sizes[0])
    else:
        ova = read_ova(source)
        networks, plan.sizes, plan.names = ova.networks, ova.sizes, [ova.name]
        twins = [vm for vm in others.values()
                 if ova.mac_seed and vm["other_config"].get("mac_seed") == ova.mac_seed]
        check_archive(ova, twins, plan, xapi)
        name = name if source.uuid else re.sub(r"\ARESTORE_", "", ova.name)
        plan.kin = [vm["name_label"] for vm in others.values() if not vm["is_a_snapshot"] and (
            vm in twins or vm["name_label"] == name or vm["uuid"] in (source.uuid, ova.uuid))]
    plan.name = choose_name(wish.get("as"), name, source, others)
    plan.names.append(plan.name)
    size, free = sum(plan.sizes), srs[ref]["free"]
    log("%s, %s (%s), becomes the %s %s on %s: %s of %s, %s free there%s" % (
        source.label, source.file_name, size_text(source.size), "disk" if source.form else "VM",
        plan.name, srs[ref]["name_label"], plural(len(plan.sizes), "disk"), size_text(size),
        size_text(free), " - ***WARNING - that may not fit" if size > free else ""))
    there = {network[key] for network in xapi.all("network").values()
             for key in ("name_label", "bridge")}
    for network in networks:
        if not there.intersection(network):
            log("NOTE - the pool has no network %s: XAPI makes one that leads nowhere" % network[0])
    return plan


def choose_sr(wanted, source, pool, srs):
    """The ref of the storage repository to restore to, of `srs`, those in use for disks. Raises
    ConfigError, which lists them."""
    default = srs.get(pool["default_SR"], {}).get("uuid")
    for wish in [wanted] if wanted else filter(None, [source.sr_uuid, default]):
        found = [ref for ref, sr in srs.items() if wish in (sr["uuid"], sr["name_label"])]
        if len(found) == 1:
            return found[0]
    raise ConfigError("ERROR - %s: choose one with sr=, by name or uuid: %s" % (
        "sr=%s is not one storage repository for disks" % wanted if wanted else
        "the pool has no default storage repository in use", ", ".join(sorted(
            "%s (%s, %s free)" % (sr["name_label"], sr["uuid"], size_text(sr["free"]))
            for sr in srs.values()))))


def check_archive(ova, twins, plan, xapi):
    """Raises ConfigError where XAPI would refuse the archive, or reuse with it what exists. twins:
    the VMs and snapshots that bear its MAC seed."""
    software = xapi.call("host.get_software_version", plan.pool["master"])
    here = [int(number) for number in re.findall(r"\d+", software.get("xapi", ""))[:2]]
    if len(here) == 2 and ova.version > here:
        raise ConfigError("ERROR - the archive is of XAPI %d.%d, newer than the pool's %d.%d:"
                          " update the pool first" % tuple(ova.version + here))
    if plan.preserve == "true":
        for kind, uuids in ova.uuids.items():
            twins = twins + [one for one in (xapi.all(kind) if uuids else {}).values()
                             if one["uuid"] in uuids]
        if twins:
            raise ConfigError("ERROR - preserve=True: the original or a copy is on the pool (%s,"
                              " uuid %s): delete it first, or restore without preserve" % (
                                  twins[0].get("name_label", "a device"), twins[0]["uuid"]))


def choose_name(wanted, name, source, others):
    """The name of what is made, one that no other bears. Raises ConfigError."""
    taken = {other["name_label"] for other in others.values() if not other["is_a_snapshot"]}
    if wanted in taken:
        raise ConfigError("ERROR - as=%s: one of that name is there already" % wanted)
    dated = "%s-restored-%s" % (name, source.date.strftime("%Y-%m-%d"))
    names = [wanted] if wanted else [dated] if source.form else [name, dated]
    names += ["%s-%d" % (dated, number) for number in range(2, len(taken) + 3)]
    return next(name for name in names if name not in taken)


# --- the restore ---


def carry_out(xapi, source, plan, activity, log):
    """Makes what was planned and returns its uuid. If it fails, nothing that it made is left."""
    query = {"format": source.form} if source.form else {
        "sr_id": plan.sr, "restore": plan.preserve}
    lock, path = None, "/import_raw_vdi" if source.form else "/import"
    try:
        # The master leads to a host that sees the storage repository.
        with Stream(xapi, path, query, activity, xapi.master(), put=True) as stream:
            task = xapi.call("task.get_record", stream.task)
            facts = {"pool": plan.pool["uuid"], "task": stream.task, "names": plan.names,
                     "created": str(task["created"]), "disks": len(plan.sizes),
                     "backup": source.label, "kind": source.kind,
                     "time": time.strftime("%Y-%m-%d %H:%M:%S")}
            name = ".restore-%s.json" % task["uuid"]
            place, lock = write_note(source.places, name, facts, log)
            if source.form:
                query["vdi"] = xapi.run_task("VDI.create", {
                    "name_label": plan.name, "name_description": "", "SR": plan.sr, "type": "user",
                    "virtual_size": str(plan.sizes[0]), "sharable": False, "read_only": False,
                    "other_config": {"import_task": stream.task}})  # as XAPI marks what it imports
            activity.doing, activity.expected = "import", plan.length
            send(source, stream, plan.length, log)
        made = marked(xapi.all(source.kind), stream.task)
        if list(made) != stream.result:
            raise BackupError("the host tells of another object than it made")
        xapi.watch.check()
        ((ref, record),) = made.items()
        finish(xapi, source, plan, ref, record, log)
    except BaseException:
        if lock is not None:
            os.close(lock)
            with contextlib.suppress(OSError):  # then the next restore does it
                sweep(xapi, place, plan.pool["uuid"], log)
        raise
    os.unlink(name, dir_fd=place)
    os.close(lock)
    return record["uuid"]


def send(source, stream, length, log):
    """Sends `length` bytes of the export, the last ones when all is proved; returns when the host
    tells that it has imported it."""
    proof = threading.Event()

    def compare(pieces):
        digest = hash_all(pieces)
        if source.digest and source.digest != digest:
            raise ArchiveError("it does not match SHA256SUMS")

    def guarded(pieces, held):
        tail, left, free = [], length, max(length - held, 0)
        for piece in pieces:
            piece = piece[:left]
            yield piece[:free]
            tail += [bytes(piece[free:])] * (len(piece) > free)
            left, free = left - len(piece), max(free - len(piece), 0)
        proof.set()  # fan_out tells this consumer of the end when the others have proved all
        yield from tail

    def upload(held, pieces):
        stream.send(guarded(pieces, held))
        if not stream.verdict():
            raise BackupError("the host lost the task of the import")
        if not proof.is_set():
            raise BackupError("the host took the import for whole before its end")

    source.file.seek(0)
    try:
        held = held_back(source)
        stream.open(length)
        _, proved, _ = fan_out(
            ring(source.file.readinto), compare, prover(source.file_name, source.disk_size),
            functools.partial(upload, held))
    except ArchiveError as error:
        raise ArchiveError("%s is damaged, it was not imported: %s" % (
            source.file_name, error)) from None
    log("%s proved whole: %s" % (source.file_name, ", ".join(
        ["sha256" if source.digest else "NOT sha256"] + proved)))


def finish(xapi, source, plan, ref, record, log):
    """Makes of what was imported what was asked for: named, told from the original, safe to have
    beside it. Of a disk it tells how to attach it."""
    if source.form:
        log("to attach it:")
        log("  xe vm-list name-label=%s params=uuid" % shlex.quote(source.name))
        log("  xe vbd-create vm-uuid=VM vdi-uuid=%s device=autodetect type=Disk mode=RW"
            " bootable=false" % record["uuid"])
        log("  xe vbd-plug uuid=VBD  (if the VM runs)")
        return
    others = [vm["name_label"] for other, vm in xapi.all("VM").items()
              if other != ref and not vm["is_a_snapshot"]]
    while plan.name in others:  # another restore was quicker
        plan.name += "-2"
    xapi.call("VM.set_name_label", ref, plan.name)
    xapi.call("VM.set_name_description", ref, ("restored from %s by vmbackup\n%s" % (
        source.label, record["name_description"])).strip())
    xapi.call("VM.remove_from_other_config", ref, OUR_KEY)  # that of the snapshot
    xapi.call("VM.set_is_a_template", ref, False)
    if plan.kin and record["ha_restart_priority"]:
        xapi.call("VM.set_ha_restart_priority", ref, "")
    if plan.kin:
        xapi.call("VM.remove_from_other_config", ref, "auto_poweron")
        log("NOTE - %s is on the pool: neither HA nor a host's start will start the restored VM"
            % plan.kin[0])


# --- what a restore leaves that is cut off ---


def write_note(places, name, facts, log):
    """Writes the file that tells the next restore what this one may leave, into the first of the
    folders that takes it; (descriptor of the folder, that of the file, which locks it)."""
    for place in places:
        fd = None
        try:
            fd = new_file(name, place)
            fcntl.flock(fd, fcntl.LOCK_EX)  # where there are no locks, the next place serves
            os.write(fd, json.dumps(facts).encode("ascii"))
            os.fsync(fd)
            os.stat(name, dir_fd=place)  # another restore may have swept it away, still empty
            sync(place)
            return place, fd
        except OSError as error:
            if fd is not None:
                os.close(fd)
                with contextlib.suppress(OSError):
                    os.unlink(name, dir_fd=place)
            log("***WARNING - the restore is noted in %s: %s" % (ELSEWHERE, describe(error)))
    raise BackupError("the restore cannot be noted")


def sweep(xapi, place, pool, log):
    """Clears away what restores left on this pool that live no more, by their notes in a folder."""
    for name in sorted(filter(NOTE_FILE.match, os.listdir(place))):
        try:
            with open(open_file(name, place), "rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                about, users = os.fstat(file.fileno()), (os.geteuid(), os.fstat(place).st_uid)
                if about.st_mode & 0o022 or about.st_uid not in users:
                    raise BackupError("not a note that only its owner can have written")
                facts = json.loads(file.read(MIB).decode("ascii") or "{}")
                if facts and facts["pool"] != pool:
                    continue
                if facts:
                    log("clearing away what a restore of %s left at %s" % (
                        facts["backup"], facts["time"]))
                    clear_away(xapi, facts, log)
                os.unlink(name, dir_fd=place)
        except (BlockingIOError, FileNotFoundError):
            pass  # it lives, or another restore has just swept it away
        except Exception as error:
            log("***WARNING - what %s tells of is not cleared away, the next restore tries it: %s"
                % (name, reason_of(error)))


def clear_away(xapi, facts, log):
    """Destroys what a restore made and did not finish: what bears its own import_task, and only
    while nothing tells that somebody took it into use. What is left alone is named."""
    task, kinds = facts["task"], ("VM", "VDI") if facts["kind"] == "VM" else ()
    with contextlib.suppress(XapiError):
        xapi.call("task.cancel", task)
    begun = any(marked(xapi.all(kind), task) for kind in kinds)  # else it may never end
    try:
        xapi.wait_for(task, HOST_ENDS if begun else UNUSED_ENDS,
                      "what the host is still at work on", False)
    except XapiError as error:
        if begun or error.code != "TASK_TIMEOUT" or xapi.watch.time_left() < CLEANUP_GRACE:
            raise
    with contextlib.suppress(XapiError):
        xapi.call("task.destroy", task)
    disk_comes = any(record["name_label"] == "Async.VDI.create" and record["status"] == "pending"
                     for record in xapi.all("task").values())
    if facts["kind"] == "VDI" and disk_comes and not marked(xapi.all("VDI"), task):
        raise BackupError("the host is making a disk, which may be its")
    for record in patiently(xapi.watch, lambda: clear(xapi, facts)):
        log("NOTE - %s uuid=%s, which a restore left, is left alone: it was started, renamed,"
            " copied or attached since" % (record["name_label"], record["uuid"]))


def marked(records, task):
    """{ref: record} of those that bear a restore's mark and are no snapshots."""
    return {ref: record for ref, record in records.items()
            if not record.get("is_a_snapshot") and task in (
                record["other_config"].get("import_task"),
                record.get("sm_config", {}).get("import_task"))}


def clear(xapi, facts):
    """One attempt at that; whoever repeats it does no harm. Returns the records of the VMs and
    disks if they are left alone."""
    vms, created = xapi.all("VM"), facts["created"]
    own, disks = marked(vms, facts["task"]), marked(xapi.all("VDI"), facts["task"])
    used = len(own) > 1 or len(disks) > facts["disks"]  # it was copied
    for vm in own.values():
        metrics = xapi.records("VM_metrics", [vm["metrics"]]).get(vm["metrics"], {})
        used = used or vm["power_state"] != "Halted" or vm["name_label"] not in facts["names"]
        used = used or str(metrics.get("start_time", "")) > created
    used = used or any(each["snapshots"] for each in itertools.chain(own.values(), disks.values()))
    for vbd in xapi.all("VBD").values():
        foreign = vbd["type"] == "Disk" and (vbd["VM"] in own) != (vbd["VDI"] in disks)
        used = used or foreign and not vms.get(vbd["VM"], {}).get("is_control_domain")
    if used:
        return [*own.values(), *disks.values()]
    if any(vm["current_operations"] for vm in own.values()):
        raise XapiError(["OTHER_OPERATION_IN_PROGRESS"])
    for ref in own:
        destroy(xapi, "VM.destroy", ref)
    for ref in disks:
        destroy(xapi, "VDI.destroy", ref)
    for ref, network in marked(xapi.all("network"), facts["task"]).items():
        if not network["VIFs"] and not network["PIFs"]:
            destroy(xapi, "network.destroy", ref)
    return []


# ============================== list and check ==============================

# What the disk tells of a VM: its name, that of its folder, the Folders in that, or an error.
Shelf = collections.namedtuple("Shelf", "vm folder found error")
AGES = {"m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}  # seconds
FORGOTTEN = 30 * 86400  # seconds without a backup after which a VM is perhaps gone
NAMED = 12  # late VMs in check's first line: monitors cut it at 4 KiB


def open_top(places):
    """(folder, Settings or None) of a config file (its backup_dir) or a folder, the first of the
    words."""
    top, settings = native(places[0]), None
    if os.path.isfile(top):
        settings = make_settings(load_config(top), [])
        top = settings.backup_dir
    if not os.path.isdir(top):
        hidden = any(os.path.exists(native(word)) for word in places[1:])  # it may be a password
        raise ConfigError("ERROR - there is no such config file or folder%s (it stands first, for"
                          " no password is needed here)" % ("" if hidden else ": " + top))
    return os.path.abspath(top), settings


def take_stock(places, watch):
    """(folder, Settings or None, [Shelf, ...], whether it is one VM's or one backup's) of a config
    file or folder. A folder that holds no backup, nor what looks like one, is no VM's: pool dumps,
    ISOs. Raises OSError, ConfigError, Interrupted."""
    top, settings = open_top(places)
    patterns = [settings.backup_dir_pattern, DEFAULT_PATTERN] if settings else None
    (above, folder), shelves = os.path.split(top), []
    with opened(top) as fd:
        single = None if settings else _shelf(fd, folder, patterns)
        if single and single.found:
            return top, None, [single], True
        for name in sorted(os.listdir(fd)):
            watch.check()
            try:
                with opened(name, fd) as vm_fd:
                    shelves.append(_shelf(vm_fd, name, patterns))
            except OSError as error:
                if error.errno not in ABSENT and name != "lost+found":
                    shelves.append(Shelf(vm_name(name), name, [], describe(error)))
        shelves = [item for item in shelves if item.found or item.error]
        if not shelves and not settings and read_marker(fd)[0]:
            with opened(above) as vm_fd:
                single = _shelf(vm_fd, os.path.basename(above), patterns)
            return top, None, [single._replace(
                found=[item for item in single.found if item.name == folder])], True
    names = collections.Counter(item.vm for item in shelves)
    return top, settings, [
        item if names[item.vm] == 1 or item.folder == native(folder_name(item.vm)) else
        item._replace(vm="%s (in %s)" % (item.vm, from_argv(item.folder)))  # it was renamed
        for item in shelves], False


def _shelf(vm_fd, folder, patterns):
    found = sorted(scan(vm_fd, patterns, folder), key=lambda item: item.name)
    label = "".join(item.label for item in backups(found)[-1:])
    dated = any(item.created is not None for item in found)
    return Shelf(label or vm_name(folder), folder, found if dated else [], "")


def _named(shelves, vm):
    return [item for item in shelves if vm == item.vm or native(folder_name(vm)) == item.folder]


def _chosen(settings, shelves, watch):
    """The Choices of a config file; their refs are Shelves."""
    names = {item.vm: [item] for item in shelves}
    return watch.pure(select, settings.rules, names).choices


def _odd(item):
    """What is odd about a Folder: texts, with the kind of oddity in front of a colon."""
    alien = not (item.marker or item.unfinished or item.pinned or item.error)
    return [text for text in (
        item.error and "unreadable: " + item.error, item.unfinished and "unfinished",
        alien and "foreign", item.foreign and "foreign: " + printable(item.foreign),
        item.marker and not whole(item) and "no export", item.pinned and "pinned",
        (item.made or 0) > time.time() + AHEAD and "from the future") if text]


def _facts(item, key):
    """What JSON tells of a backup, or of none; key: how its date is called."""
    if not item:
        return {key: None, "age_seconds": None, "kind": None, "file": None, "bytes": 0}
    moment = datetime.datetime.fromtimestamp(int(item.made)).astimezone()
    kind = "vdi-export" if (item.export or "").endswith((".raw", ".vhd")) else "vm-export"
    return {key: moment.isoformat(), "age_seconds": int(time.time() - item.made),
            "kind": kind if item.export else None,
            "file": item.export and from_argv(item.export), "bytes": item.size}


def _overview(shelf):
    good = backups(shelf.found)
    odd = collections.Counter(text.split(":")[0] for item in shelf.found for text in _odd(item))
    texts = ["%d %s" % (odd[text], text) for text in sorted(odd)]
    return {"vm": shelf.vm, "backups": len(good), **_facts(good[-1] if good else None, "newest"),
            "total_bytes": sum(item.size for item in good),
            "odd": texts + ["unreadable: " + shelf.error] * bool(shelf.error)}


def _details(shelf, settings, choices):
    """One VM's backups, with the rules of the config file that keep each."""
    keep = [choice.keep for choice in choices if shelf in choice.refs]
    why = kept(shelf.found, settings.policy(keep[0])) if keep else {}
    for item in backups(shelf.found):
        ruled = why.get(item.name) if keep else ["not chosen"] if settings else []
        yield {"folder": from_argv(item.name), **_facts(item, "created"), "marker": item.marker,
               "pinned": item.pinned, "kept_by": ruled, "odd": _odd(item)}


def list_backups(places, options, log, watch):
    """Prints what is there, as a table or as JSON. Returns 0, or 2 where no backup is."""
    top, settings, shelves, single = watch.do(take_stock, places, watch)
    choices = _chosen(settings, shelves, watch) if settings and places[1:] else []
    for vm in places[1:]:
        shelves = _named(shelves, vm)
    good = [item for shelf in shelves for item in backups(shelf.found)]
    if single or places[1:]:
        entries = [facts for item in shelves for facts in _details(item, settings, choices)]
        rows = [("backup", "age", "size", "kept by")] + [
            (item["folder"], _age(item), size_text(item["bytes"]), ", ".join(dict.fromkeys(
                (item["kept_by"] or ["would be deleted"] * (item["kept_by"] is None))
                + item["odd"]))) for item in entries]
        rows += [(item.name, "", "", ", ".join(_odd(item))) for shelf in shelves
                 for item in shelf.found if item not in good]
        lines = table(rows, 1000, (1, 2))  # nothing is cut: a narrow terminal folds the line
    else:
        entries = [_overview(item) for item in shelves]
        lines = table([("VM", "n", "newest", "age", "kind", "size", "all", "odd")] + [
            (item["vm"], str(item["backups"]), (item["newest"] or "never")[:10], _age(item),
             (item["kind"] or "")[:-7], size_text(item["bytes"]), size_text(item["total_bytes"]),
             ", ".join(item["odd"])) for item in entries], 1000, (1, 3, 5, 6))
    lines.append("%s of %s, %s; %s free in %s" % (
        plural(len(good), "backup"), plural(len(shelves), "VM"),
        size_text(sum(item.size for item in good)), size_text(shutil.disk_usage(top).free), top))
    for line in [json.dumps(entries, indent=2)] if "json" in options else map(printable, lines):
        log.bare(line)
    return 0 if good else 2


def _age(facts):
    age = facts["age_seconds"]
    return "-" if age is None else time_text(age)


def plain(text):
    """Text without what divides a monitor's line."""
    return re.sub("[|'\"`]", "_", printable(text))


def check(places, options, log, watch):
    """Prints a line for Nagios and its like, then one for each VM that is late, worst first.
    Returns the exit status."""
    ages = []
    for key, default in (("warn", "26h"), ("crit", "50h")):
        age = re.match(r"([1-9][0-9]{0,8})([mhdw])\Z", options.get(key, default).lower())
        if not age:
            raise ConfigError("ERROR - %s=%s: allowed are ages like 90m, 26h, 3d, 2w" % (
                key, options[key]))
        ages.append(int(age.group(1)) * AGES[age.group(2)])
    if ages[1] < ages[0]:
        raise ConfigError("ERROR - crit= (default 50h) is below warn= (default 26h)")
    top, settings, shelves, _ = watch.do(take_stock, places, watch)
    if places[1:]:
        asked = [(places[1], _named(shelves, places[1]))]
    elif settings:
        asked = [(choice.name, choice.refs) for choice in _chosen(settings, shelves, watch)]
    else:
        asked = [(item.vm, [item]) for item in shelves
                 if backups(item.found) or any(one.error for one in [item] + item.found)]
    if not asked:
        raise BackupError("no backup in %s" % top)
    now = time.time()
    judged = sorted((_judge(*vm, now, *ages) for vm in asked), key=lambda item: item[0])
    late = [item for item in judged if item[1]]
    status, known = judged[0][1], [item[3] for item in judged if item[3] is not None]
    told = ["%s (%s)" % (name, text) for _, _, name, _, text in late[:NAMED] or judged[:1]]
    told += ["and %d more" % (len(late) - NAMED)] * (len(late) > NAMED)
    figures = ["vms=%d late=%d;0;0" % (len(judged), sum(item[1] in (1, 2) for item in judged))]
    if known:
        figures.append("oldest=%ds;%d;%d newest=%ds" % (max(known), *ages, min(known)))
    figures.append("free=%dB" % shutil.disk_usage(top).free)
    log.bare("VMBACKUP %s - %s%s | %s" % (
        ("OK", "WARNING", "CRITICAL", "UNKNOWN")[status],
        "%d of %d VMs: " % (len(late), len(judged)) if late else (
            "%s, longest ago " % plural(len(judged), "VM")), ", ".join(told), " ".join(figures)))
    for _, _, name, age, text in late:
        gone = "; gone? exclude=%s, or move its folder" % name if (age or 0) > FORGOTTEN else ""
        log.bare("%s: %s%s" % (name, text, gone))
    return status


def _judge(vm, shelves, now, warn, crit):
    """(place in the order, exit status, name, age in seconds or None, text) of one VM."""
    errors = [item.error for shelf in shelves for item in [shelf] + shelf.found if item.error]
    made = [item.made for shelf in shelves for item in backups(shelf.found)]
    age, text, status = None, "never", 2
    if made:
        age = int(now - max(made))
        text = time_text(age) if age >= -AHEAD else "%s in the future" % time_text(-age)
        status = 2 if age > crit or age < -AHEAD else 1 if age > warn else 0
    if errors:
        status, text = 3, "cannot be read: " + errors[0]
    order = (2, 3, 1, 0).index(status), -float("inf" if age is None else age)
    return order, status, plain(vm), age, plain(text)


# ============================== verify and extract ==============================

GRAIN = 64 * 1024  # bytes: so many zeros at a time become holes of an image
ZEROS = bytes(GRAIN)


def marked_folders(top):
    """Paths of the folders with a marker, up to two levels below or `top` itself, sorted; and of
    those that cannot be read, for whoever opens them to find out why."""
    found = []

    def fail(error):
        if not isinstance(error, FileNotFoundError) and not error.filename.endswith("/lost+found"):
            found.append(error.filename)

    for path, folders, files in os.walk(top, onerror=fail):
        folders[:] = sorted(folders) if path.count("/") < top.count("/") + 2 else []
        if set(MARKERS).intersection(files):  # a VM may be called `success`
            while found and path.startswith(found[-1] + "/"):
                found.pop()  # a marker may lie where no backup is: above one
            found.append(path)
    return found


def verify(places, _options, log, watch):
    """Proves every marked backup below a config file's backup_dir or a folder, or one export file:
    sums, archive, metadata. Reads only. Returns 0, or 2 if one is damaged or none is there."""
    top, only = os.path.abspath(native(places[0])), places[1:]
    lone = os.path.isfile(top) and EXPORT.match(top)
    results, top = collections.Counter(), top if lone else open_top(places)[0]
    names = {nfc(native(each)) for vm in only for each in (folder_name(vm), vm)}
    for path in [top] if lone else marked_folders(top):
        vm, name = path.split("/")[-2:]
        if names and not lone and nfc(vm) not in names:
            continue
        label = "VmBackup verify %s/%s" % (vm, name)
        try:
            with watch.activity(vm) as activity:
                proved = verify_path(path, watch, activity)
            log("%s - ***Success*** %s" % (label, ", ".join(proved)))
            results["good"] += 1
        except Exception as error:  # one odd folder must not end the others' turn
            if lone or marked_folders(path):  # else a run is deleting it meanwhile
                log("%s - ***ERROR*** %s" % (label, reason_of(error)))
                results["bad"] += 1
    if not results:
        log("ERROR - no marked backup%s in %s" % (" of " + only[0] if only else "", top))
    fine = results and not results["bad"]
    log("VmBackup verify ended - %s - S:%d W:0 E:%d" % (
        "Success" if fine else "**ERRORS DETECTED**", results["good"], results["bad"]))
    return 0 if fine else 2


def verify_path(path, watch, activity):
    """Phrases that tell what was proved of a backup's folder, or of an export by itself. Raises
    BackupError or OSError."""
    if os.path.isfile(path):
        (proved,) = read_export(path, None, watch, activity, prover(path))
        return ["NOT sha256 (a file by itself)"] + proved
    with opened(path) as fd:
        export, sums, ours = look_into(fd)
        told = check_metadata(fd, export, sums) if sums or ours else ["NOT sha256 (no SHA256SUMS)"]
        digest, proved = read_export(
            export, fd, watch, activity, hash_all, prover(export, recorded_disk(fd)[0]))
    if sums.get(export, digest) != digest:
        raise ArchiveError("%s does not match SHA256SUMS" % export)
    return told + proved


def read_export(name, dir_fd, watch, activity, *consumers):
    """What the consumers make of an export's pieces: fan_out() with progress and stops."""
    with open(open_file(name, dir_fd), "rb", buffering=0) as file:
        activity.doing, activity.expected = "reading", os.fstat(file.fileno()).st_size

        def readinto(view):
            watch.check()
            count = file.readinto(view)
            activity.note(count)
            return count

        return fan_out(ring(readinto), *consumers)


def check_metadata(fd, export, sums):
    """Phrases about what is beside the export: everything listed, right and there."""
    paths = set(files_below(fd)) - set(MARKERS) - {"SHA256SUMS", "keep", export}
    odd = paths.symmetric_difference(set(sums) - {export})
    if odd:
        raise ArchiveError("%s is %s" % (
            min(odd), "not listed in SHA256SUMS" if min(odd) in paths else "missing"))
    texts = {path: read_small(path, fd, METADATA_LIMIT) for path in paths}
    for path, data in texts.items():
        if hashlib.sha256(data).hexdigest() != sums[path]:
            raise ArchiveError("%s does not match SHA256SUMS" % path)
    alone = re.search(rb"^vm_metadata=none$", texts.get("vm.cfg", b""), re.MULTILINE)
    for name in ["vm.cfg"] + ["vm-metadata.xml"] * (not alone):
        if name not in sums:
            raise ArchiveError("SHA256SUMS does not list %s" % name)
    disks, there = {}, sum(path.startswith("DISK-") and path.endswith("/vdi.cfg")
                           and path[:-7] + "vbd.cfg" in texts for path in texts)
    with contextlib.suppress(ArchiveError, KeyError):  # no ova.xml, but it is what was written
        disks = parse_ova(texts["vm-metadata.xml"])[2]
    wanted = sum(disk.label != "suspend" and "[NOBAK]" not in disk.name for disk in disks.values())
    if there < wanted:  # not by label: a VM that is started meanwhile gets others
        raise ArchiveError("of %d folders DISK-* %d are missing" % (wanted, wanted - there))
    none = ["NOT vm-metadata.xml (it could not be fetched)"] if alone else []
    return ["sha256 of %d files" % len(sums)] + none


def files_below(fd, above=""):
    """The paths below a folder of all that is neither a folder nor STREWN."""
    with opened(above or ".", fd) as folder:
        for name in sorted(os.listdir(folder)):
            path = above + name
            if not stat.S_ISDIR(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
                if not STREWN.match(path):
                    yield path
            elif not STREWN.match(path + "/"):
                yield from files_below(fd, path + "/")


# --- extract ---


def extract(places, options, log, watch):
    """Writes the disks of an XVA as sparse raw images, proved on the way; returns 0, or raises."""
    source, to, fd, sums = native(places[0]), native(options.get("to", ".")), None, {}
    if not os.path.isdir(to):
        raise ConfigError("ERROR - there is no such folder: to=%s" % to)
    with contextlib.ExitStack() as stack:
        export = source
        if os.path.isdir(source):
            fd = stack.enter_context(opened(source))
            export, sums, _ = look_into(fd)
        elif not os.path.isfile(source) or not EXPORT.match(source):
            raise ConfigError("ERROR - there is no such backup's folder or export: %s" % source)
        stem, kind = EXPORT.match(os.path.basename(export)).groups()
        if kind in ("raw", "vhd"):
            path = os.path.abspath(source if fd is None else os.path.join(source, export))
            log("%s is a disk image already. As qcow2: qemu-img convert -f %s -O qcow2 %s %s" % (
                os.path.basename(export), {"vhd": "vpc"}.get(kind, kind), shlex.quote(path),
                shlex.quote("./" + stem + ".qcow2")))
            return 0
        images = Images(stack.enter_context(opened(to)), stem, options.get("disk"), log)
        stack.callback(images.close)
        activity = stack.enter_context(watch.activity(stem))
        proved, *digest = read_export(export, fd, watch, activity, prover(export, sink=images),
                                      *[hash_all] * (export in sums))
        if digest and digest[0] != sums[export]:
            raise ArchiveError("%s does not match SHA256SUMS" % export)
        images.keep()
        told = "sha256" if digest else "NOT sha256 (no SHA256SUMS)"
        log("VmBackup extract ended - Success - %s in %s, proved: %s" % (
            plural(len(images.files), "image"), to, ", ".join([told] + proved)))
    return 0


class Images:
    """The sink of prove_xva() that writes the images. close() deletes those that keep() did not
    give their names."""

    def __init__(self, dir_fd, stem, label, log):
        self._dir_fd, self._stem, self._label, self._log = dir_fd, stem, label, log
        self.files = {}  # id: (name, descriptor)

    def __call__(self, ref, offset, data):
        if ref == "ova.xml":
            self._create(parse_ova(data)[2])
        elif ref in self.files:
            view = memoryview(data)
            for start in range(0, len(view), GRAIN):
                part, at = view[start : start + GRAIN], offset + start
                while not ZEROS.startswith(part):  # nor is an empty rest written
                    count = os.pwrite(self.files[ref][1], part, at)
                    part, at = part[count:], at + count

    def _create(self, disks):
        labels = [disk.label for disk in disks.values()]
        if self._label not in labels + [None]:
            raise BackupError("there is no disk %s in it, but: %s" % (
                self._label, ", ".join(labels) or "none"))
        for ref, disk in disks.items():
            if self._label in (None, disk.label):
                name = native("%s-%s.raw" % (self._stem, folder_name(disk.label)))
                os.close(new_file(name, self._dir_fd))
                os.unlink(name, dir_fd=self._dir_fd)  # it could be made: there is no such file
                self.files[ref] = name, new_file(name + ".partial", self._dir_fd)
                os.ftruncate(self.files[ref][1], disk.size)
                self._log("disk %s is %s, %s (%s) -> %s" % (
                    disk.label, ref, disk.name or "-", size_text(disk.size), name))

    def keep(self):
        """Gives the images their names."""
        for name, fd in self.files.values():
            os.close(os.dup(fd))  # where a file server took not all of it, this raises OSError
            os.close(new_file(name, self._dir_fd))  # or rename() would replace what came meanwhile
            os.rename(name + ".partial", name, src_dir_fd=self._dir_fd, dst_dir_fd=self._dir_fd)

    def close(self):
        for name, fd in self.files.values():
            os.close(fd)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name + ".partial", dir_fd=self._dir_fd)


# ============================== reports ==============================

PROGRESS_EVERY = 300  # seconds between the progress lines where there is no terminal
SILENT = 30  # seconds without a byte after which the host is shown as silent
MAIL_TIMEOUT = 60  # seconds


class Log:
    """Lines `YYYY-MM-DD-(HH:MM:SS) - text` on standard output, whole and in UTF-8 whatever the
    locale, from any thread; and on a terminal a progress line that rewrites itself. `lines` holds
    what was logged."""

    def __init__(self, watch):
        self.lines, self._watch, self._lock = [], watch, threading.RLock()
        self._shown, self._told = "", time.monotonic()
        rich = os.environ.get("TERM", "dumb") != "dumb" and not os.environ.get("NO_COLOR")
        streams = sys.stdout, sys.stderr
        colour, live = [stream is not None and stream.isatty() for stream in streams]
        self._colour, self._live, self._plain = rich and colour, rich and live, not live

    def __call__(self, text):
        stamp = datetime.datetime.now().strftime("%Y-%m-%d-(%H:%M:%S)")
        line = "%s - %s" % (stamp, printable(str(text)))
        bad, odd = re.search("ERROR|  FAILED ", line), re.search("WARNING|  warning ", line)
        with self._lock:
            self.lines.append(line)
            if self._colour and (bad or odd):
                line = "\x1b[%sm%s\x1b[0m" % ("31" if bad else "33", line)
            self.bare(line)

    def bare(self, text):
        """Writes a text to standard output as it is, and a line end."""
        with self._lock:
            self.show()
            write_text(sys.stdout, text + "\n", self._watch)

    def show(self, text=""):
        """The progress line is to be this."""
        with self._lock:
            if self._shown or text:
                write_text(sys.stderr, "\r\x1b[K" + text, self._watch)
                self._shown = text

    def progress(self, activities):
        """Shows the Activities under way; called once a second."""
        now = time.monotonic()
        if self._live:
            with contextlib.suppress(OSError):
                columns = os.get_terminal_size(sys.stderr.fileno()).columns or 80
                self.show(progress_line(activities, max(columns - 1, 1), now))
        elif self._plain and activities and now - self._told > PROGRESS_EVERY:
            self._told = now
            for activity in activities:
                self("progress %s" % progress_text(activity, now))


def progress_line(activities, columns, now):
    """What is under way, in one line of so many columns: in full where that fits, else in short, as
    many as fit and how many more there are."""
    full = [progress_text(activity, now) for activity in activities]
    short = [progress_text(activity, now, short=True) for activity in activities]
    fewer = [short[:-more] + ["+%d" % more] for more in range(1, len(short))]
    lines = ["  |  ".join(parts) for parts in [full, short] + fewer]
    return next((line for line in lines if len(line) <= columns), lines[-1])[:columns]


def progress_text(activity, now, short=False):
    """'[3/50] web  50 % of about 12 GiB  31 MB/s  3 min left' of an Activity, or '[3] web 50 %'."""
    label, done, quiet = printable(activity.label), activity.done, now - activity.touched
    expected, rate = activity.expected, done / max(now - activity.started, 0.001)
    if activity.fraction > 0.02:
        expected = done / min(activity.fraction, 1)
    far, whole, pace = size_text(done), "", rate_text(rate)
    if not done or activity.doing == "clean-up":
        far, pace = activity.doing or "waiting for the host", time_text(quiet)
    elif expected > done:
        far, whole = "%d %%" % (100 * done // expected), " of about %s" % size_text(expected)
        pace += "  %s left" % time_text((expected - done) / rate)
    if done and quiet > SILENT:
        pace = "host silent for %s" % time_text(quiet)
    if not short:
        return "%s  %s%s  %s" % (label, far, whole, pace)
    label = re.sub(r"^\[(\d+)/\d+\]", r"[\1]", label)
    return "%s %s" % (label if len(label) < 19 else label[:10] + "\u2026" + label[-7:], far)


def path_bytes(text):
    """UTF-8 of a text that may hold file names: what stands for their bytes in an ASCII locale
    becomes those bytes again; a byte that is no UTF-8 becomes \\udcXX, as JSON escapes it."""
    with contextlib.suppress(UnicodeEncodeError):
        text = text.encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape")
    return text.encode("utf-8", "backslashreplace")


def write_text(stream, text, watch=None):
    """Writes UTF-8 at once, past Python's buffer. A reader that went away stops no backup, and one
    that reads no more holds up no stop."""
    import select

    data = path_bytes(text)
    with contextlib.suppress(OSError, ValueError, AttributeError):
        fd = stream.fileno()
        while data:
            while watch and not select.select([], [fd], [], LOOK)[1]:
                if watch.signum:
                    return
            data = data[os.write(fd, data[:4096]) :]  # not more than select promises


def make_status(path, log, warnings):
    """The function that appends a line to the status log (none if path is None) and flushes it.
    A failure is logged and added to `warnings`, once. A new one may be read by monitors of other
    users, whatever the umask."""
    lock, server = threading.Lock(), short_host_name()

    def status(program, *texts):
        stamp = datetime.datetime.now().strftime("%Y/%m/%d %H:%M:%S")
        line = printable(",".join((stamp, program, server) + texts)) + "\n"
        try:
            with lock:
                new = not os.path.exists(path)
                with open(path, "ab") as file:
                    file.write(line.encode("utf-8"))
                    if new:
                        os.fchmod(file.fileno(), 0o644)
        except OSError as error:
            text = "***WARNING - the status log cannot be written: %s" % describe(error)
            if text not in warnings:
                warnings.append(text)
                log(text)

    return status if path else lambda *texts: None


def replace_file(path, data, mode):
    """Replaces what bears this name (a link, not its target) by a new file, with a rename; after an
    OSError it is what it was before. What a killed run left half written goes, too."""
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, ".%s.vmbackup" % name)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary)
    fd = new_file(temporary, None)
    try:
        with open(fd, "wb") as file:
            if mode != 0o600:  # it is that from its first byte
                os.fchmod(fd, mode)
            file.write(data)
            file.flush()
            sync(fd)
        os.rename(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def write_json(run):
    """Replaces report_json atomically; the README describes its fields."""
    def told(item):
        moved = item.bytes / 1e6 / item.transfer_seconds if item.transfer_seconds else 0.0
        return {
            "name": item.name, "uuid": item.uuid, "kind": item.kind, "status": item.result,
            "folder": item.folder, "file": item.file, "sha256": item.sha256, "bytes": item.bytes,
            "seconds": round(item.seconds, 3), "transfer_seconds": round(item.transfer_seconds, 3),
            "mb_per_second": round(moved, 1), "attempts": item.attempts, "checks": item.checks,
            "warnings": item.warnings, "error": item.error, "pruned": item.pruned}

    report = {
        "version": __version__, "server": short_host_name(), "host": run.host, "pool": run.pool,
        "start": run.start.astimezone().isoformat(),
        "end": datetime.datetime.now().astimezone().isoformat(),
        "seconds": round(time.monotonic() - run.begin, 3),
        "status": status_word(run.exit_status), "exit_status": run.exit_status, "error": run.error,
        "counts": dict(zip(("success", "warning", "error", "skipped"), run.counts())),
        "bytes": sum(item.bytes for item in run.outcomes), "warnings": run.settings.warnings,
        "not_in_backup": run.not_in_backup,
        "pool_database": told(run.pool_database) if run.pool_database else None,
        "vms": [told(item) for item in run.outcomes]}
    text = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
    replace_file(run.settings.report_json, path_bytes(text), 0o644)


METRICS = (
    ("last_success_timestamp_seconds", "When the newest backup of the VM was made."),
    ("last_status", "How the VM's last backup ended: 0 success, 1 warning, 2 error."),
    ("last_size_bytes", "Size of the export in the newest backup of the VM."),
    ("last_duration_seconds", "How long the VM's last successful backup took."),
    ("backups", "How many backups of the VM there are."),
    ("run_end_timestamp_seconds", "When the last run ended."),
    ("run_exit_status", "Exit status of the last run."),
    ("free_bytes", "Free space in backup_dir."),
    ("info", "1; its label tells the version."))
SERIES = re.compile(  # metric, its label config, its other labels, value
    r'^vmbackup_(\w+)\{(config="(?:[^"\\\n]|\\.)*")(.*)\} (\S+)$', re.M)


def label_of(key, value):
    """One label of Prometheus' text format, quoted and escaped."""
    value = path_bytes(value).decode("utf-8").replace("\\", "\\\\").replace('"', '\\"')
    return '%s="%s"' % (key, value.replace("\n", "\\n"))


def write_metrics(run):
    """Replaces metrics_file atomically. Of the file that is there it keeps what other config files
    wrote, and the series of VMs that this run could not know or that only= left out."""
    with opened(os.path.dirname(run.settings.metrics_file) or ".") as folder:
        with contextlib.suppress(OSError):  # no locks here
            fcntl.flock(folder, fcntl.LOCK_EX)  # another run's series are not lost
        replace_file(run.settings.metrics_file, metrics(run).encode("utf-8"), 0o644)


def metrics(run):
    """The text of metrics_file."""
    settings, series, old = run.settings, {}, b""
    name = os.path.splitext(os.path.basename(settings.config_file or "none"))[0]
    mine = label_of("config", name)
    pool = {"," + label_of("vm", name) for name in run.pool_vms or ()}
    asked = {"," + label_of("vm", item.name): item for item in run.outcomes}
    stay = pool if settings.only else pool.intersection(asked)
    with contextlib.suppress(FileNotFoundError):
        old = read_small(settings.metrics_file, limit=64 * MIB)
    for metric, config, labels, value in SERIES.findall(old.decode("utf-8", "replace")):
        unknown = not run.begun and labels.startswith(",vm=")
        if config != mine or unknown or labels in stay:
            series[metric, config + labels] = value
    for vm in pool.intersection(asked):
        for metric, value in vm_metrics(run, asked[vm]).items():
            series[metric, mine + vm] = value
    series["run_end_timestamp_seconds", mine] = int(time.time())
    series["run_exit_status", mine] = run.exit_status
    series["free_bytes", mine] = free_bytes(settings.backup_dir)
    series["info", "%s,%s" % (mine, label_of("version", __version__))] = 1
    lines = []
    for metric, text in METRICS:
        lines += ["# HELP vmbackup_%s %s" % (metric, text), "# TYPE vmbackup_%s gauge" % metric]
        lines += ["vmbackup_%s{%s} %s" % (metric, labels, value)
                  for (of, labels), value in sorted(series.items())
                  if of == metric and value is not None]
    return "\n".join(lines) + "\n"


def vm_metrics(run, item):
    """{metric: value, or None for what is no more} of a VM that this run was asked for: its last
    success is the newest backup on disk, so one that failed keeps its old one."""
    told, found = {}, []
    if item.result != "SKIPPED":
        told["last_status"] = {"SUCCESS": 0, "WARNING": 1}.get(item.result, 2)
    if item.result in ("SUCCESS", "WARNING"):
        told["last_duration_seconds"] = round(item.seconds, 3)
    try:
        with opened(run.settings.backup_dir) as top, opened(
                native(folder_name(item.name)), top) as vm:
            found = backups(scan(vm, run.patterns))
    except OSError as error:
        if not isinstance(error, FileNotFoundError):
            return told  # what the file knew of the disk stays
    newest = found[-1] if found else None
    return dict(told, backups=len(found), last_size_bytes=newest and newest.size,
                last_success_timestamp_seconds=newest and int(newest.made))


def send_mail(run):
    """Mails the table, the reasons and the log. Raises BackupError, or what the email package says
    of odd addresses."""
    import email.message
    import email.policy
    import email.utils

    settings, word, server = run.settings, status_word(run.exit_status), socket.gethostname()
    tally = "S:%d W:%d E:%d" % run.counts()[:3]
    # CRLF in the parts, too; and no byte over 127, which not every mail server takes.
    message = email.message.EmailMessage(email.policy.SMTP.clone(cte_type="7bit"))
    message["Subject"] = printable("%s %s VmBackup.py, pool %s at %s - %s" % (
        word, server, run.pool, run.host, tally))  # as upstream's, for those who filter by it
    message["From"], message["To"] = settings.mail_from, ", ".join(settings.mail_to)
    message["Date"] = email.utils.localtime()
    message["Message-ID"] = email.utils.make_msgid(domain=server)
    message["Auto-Submitted"] = "auto-generated"
    lines = ["%s - %s" % (word, tally),
             "VmBackup on %s, pool %s, host %s" % (short_host_name(), run.pool, run.host),
             "%s, %s, exit status %d" % (run.start.strftime("%Y-%m-%d %H:%M:%S"), time_text(
                 time.monotonic() - run.begin), run.exit_status), ""]
    lines += run.error.split("\n") + [""] if run.error else []
    items = run.results()
    lines += run.table
    for head, texts in (
            ("Failed", ["%s %s: %s" % (item.kind, item.name, item.error)
                        for item in items if item.error]),
            ("Warnings", ["%s %s: %s" % (item.kind, item.name, text) for item in items
                          for text in item.warnings] + settings.warnings),
            ("In no backup", [", ".join(run.not_in_backup or [])])):
        lines += ["", head + ":"] + texts if any(texts) else []
    message.set_content("\n".join(map(printable, lines)) + "\n")
    message.add_attachment("\n".join(run.log.lines) + "\n", filename="vmbackup.log")
    # Python 3.6 tears headers that it has to fold, and folds them with bare line feeds.
    policy = email.policy.default.clone(max_line_length=998)
    data = message.as_bytes(policy=policy).replace(b"\n", b"\r\n")
    deliver(settings, data, min(MAIL_TIMEOUT, max(run.watch.time_left() / 4, 1)))
    run.log("mail sent to %s" % ", ".join(settings.mail_to))


def deliver(settings, data, timeout):
    """Hands a message to the mail server. Raises BackupError, if it was sent to some receivers
    only, too. timeout: seconds for each answer."""
    import smtplib
    import ssl

    context = ssl.create_default_context(cafile=settings.smtp_ca)
    if is_loopback(settings.smtp_server) and not settings.smtp_ca:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    tls = functools.partial(smtplib.SMTP_SSL, context=context)
    connect: Any = tls if settings.smtp_port == 465 else smtplib.SMTP
    try:
        with contextlib.closing(connect(settings.smtp_server, settings.smtp_port,
                                        timeout=timeout)) as smtp:
            if settings.smtp_starttls:
                smtp.starttls(context=context)
            if settings.smtp_user:
                smtp.login(settings.smtp_user,
                           read_password_file(settings.smtp_password_file, plain=True))
            refused = smtp.sendmail(settings.mail_from, settings.mail_to, data)
            with contextlib.suppress(OSError):
                smtp.quit()
    except smtplib.SMTPRecipientsRefused as error:
        refused = error.recipients
    except OSError as error:  # smtplib's are, too
        text = describe(error)
        if isinstance(error, smtplib.SMTPResponseException):
            text = "%d %s" % (error.smtp_code, os.fsdecode(error.smtp_error))
        if isinstance(error, ssl.SSLError):
            text += " (smtp_ca= names a CA of one's own; with smtp_port=465 TLS comes first)"
        raise BackupError("%s port %d: %s" % (
            settings.smtp_server, settings.smtp_port, text)) from None
    if refused:
        raise BackupError("; ".join("%s: %d %s" % (who, code, os.fsdecode(text))
                                    for who, (code, text) in refused.items()))


def send_reports(run):
    """Writes and mails what the settings ask for. What fails is a warning of the run; a mail that
    could not be sent stands in the reports, too, which do not wait for it."""
    settings = run.settings
    when = {"always": True, "problems": run.exit_status != 0, "never": False}[settings.mail_when]
    mail = settings.mail_to and when, send_mail, "the mail could not be sent"
    reports = ((settings.metrics_file, write_metrics, "metrics_file cannot be written"),
               (settings.report_json, write_json, "report_json cannot be written"))

    def make(wanted, function, failure):
        try:
            if wanted:
                function(run)
        except Exception as error:  # the email package raises nearly anything at odd addresses
            text = "***WARNING - %s: %s" % (failure, describe(error))
            settings.warnings.append(text)
            run.log(text)
            run.exit_status = run.exit_status or 1
            return False
        return True

    made = [make(*report) for report in reports]
    if not make(*mail):
        for report in itertools.compress(reports, made):
            make(*report)


# ============================== the command line ==============================

INVENTORY = "/etc/xensource-inventory"  # a dom0 has it
USAGE = """\
Usage: vmbackup.py <password> <config-file|vm-selector> [preview] [only=SELECTOR] [name=value ...]
       vmbackup.py <password> create-password-file=FILE
       vmbackup.py verify <config-file|folder|file> [vm-name]
       vmbackup.py list <config-file|folder> [vm-name] [json]
       vmbackup.py check <config-file|folder> [vm-name] [warn=26h] [crit=50h]
       vmbackup.py extract <backup-folder|file> [to=FOLDER] [disk=LABEL]
       vmbackup.py restore <password> <config-file|backup-folder|export-file> [vm-name] \
[preview] [backup=FOLDER] [sr=SR] [as=NAME] [preserve=True] [name=value ...]
       vmbackup.py help [command] | config | example | version
"""
# Each line is folded to the width of the terminal; `help WORD` shows the one that begins with it.
HELP = """\
<password>          itself; or a file made by create-password-file; or - (a line of standard \
input); or local (XAPI's socket in this dom0: no password)
<config-file>       for cron; see: vmbackup.py config
<vm-selector>       a VM's name or a regular expression; :N behind it replaces max_backups; \
vdi-export=SELECTOR takes only the first disk
preview             connects, checks and shows what would be done; changes nothing
only=SELECTOR       of the chosen VMs only those that it matches
create-password-file=FILE  writes the password, encoded, into a file for its owner's eyes only
verify              proves every backup on disk again: checksums, archive, metadata
list                which backups there are; of one VM each with the rule that keeps it
check               a line for Nagios and its like, then one for each VM without a backup younger \
than warn or crit (90m, 26h, 3d, 2w); exit status 0 OK, 1 WARNING, 2 CRITICAL, 3 UNKNOWN
extract             writes the disks of an XVA as sparse images NAME-xvda.raw into the folder to= \
(default: the current one), or just disk=
restore             makes a new, halted VM (vdi-export: a disk) of the newest backup or of \
backup=FOLDER, on sr=SR (name or uuid), called as=NAME, with its MAC addresses if preserve=True; \
changes nothing that is on the pool
Exit status         0 all good, 1 warnings, 2 a VM (or the pool database) failed, 3 nothing was \
started, 4 another run holds the lock, 128+n stopped by signal n

name=value          a setting, in the config file or, overriding it, as an argument:
"""
CONFIG = """\
# Example config file for vmbackup.py: name=value lines, '#' comments on lines of their own.
# A setting that is not given has the default shown here.

%s
#### which VMs ####
# Letters, digits, space, '-' and '_' only: the name of one VM. Anything else: a regular expression,
# matched from the start of the name. ':N' at the end replaces max_backups. Simple names win over
# regular expressions, later lines over earlier ones, exclude over all.

#exclude=TEMP-.*
# only the first disk of a VM whose other disks are too large; see the README
#vdi-export=PROD-with-many-disks
# whole VMs (an empty vm-export= means all)
#vm-export=my-vm-name
#vm-export=DEV.*:2
"""
EXAMPLE = """\
# make a password file once (in dom0 `local` needs no password); look first; the run; one VM again
  vmbackup.py - create-password-file=/root/vmbackup.pass
  vmbackup.py /root/vmbackup.pass weekend.cfg preview
  vmbackup.py /root/vmbackup.pass weekend.cfg
  vmbackup.py /root/vmbackup.pass weekend.cfg only=DEV-mySql
# without a config file; is any late, are all whole; a VM back
  vmbackup.py - 'DEV-my.*:2' compress=zstd backup_dir=/mnt/backup host=xen1.example.org
  vmbackup.py check weekend.cfg warn=26h crit=50h
  vmbackup.py verify weekend.cfg
  vmbackup.py restore - weekend.cfg DEV-mySql as=DEV-mySql-test
"""


def config_text():
    """What `config` prints and example.cfg holds."""
    about = [fold("# " + item.about, 96, "# ") + ["#%s=%s\n" % item[:2]] for item in SETTINGS]
    return CONFIG % "\n".join(itertools.chain(*about))


def help_text(topic=""):
    """All of the help, or its part about one word, as wide as the terminal (40 to 100 columns)."""
    usage, lines = USAGE.splitlines() + [""], HELP.splitlines() + ["%-19s %s (default: %s)" % (
        item.name, item.about, item.default or "none") for item in SETTINGS]
    if topic:
        parts = {re.match(r"<?([\w-]*)", line).group(1): line for line in lines if line}
        if topic not in parts:
            raise ConfigError("ERROR - no help on %s: %s" % (topic, allowed(topic, list(parts))))
        usage, lines = usage_of(topic), [parts[topic]]
    width = max(min(shutil.get_terminal_size((100, 24)).columns, 100), 40)
    folded = [fold(line, width, " " * 7) for line in usage]
    folded += [fold(line, width, " " * min(20, width // 3)) for line in lines]
    return "\n".join(itertools.chain(*folded)) + "\n"


def usage_of(name):
    """The lines of the usage that show a command."""
    return [line for line in USAGE.splitlines() if re.search(" %s[ =]" % name, line)]


def fold(line, width, indent):
    """The lines of a text in so many columns, all but the first behind `indent`."""
    import textwrap

    return textwrap.wrap(line, width, subsequent_indent=indent, break_on_hyphens=False) or [""]


TEXTS = {"help": help_text, "config": config_text, "example": lambda: EXAMPLE,
         "version": lambda: "vmbackup.py %s\n" % __version__}
COMMANDS: Any = {"verify": verify, "list": list_backups, "check": check, "extract": extract,
            "restore": restore}
DRY_RUN = re.compile(r"-+n\Z|-+preview\Z|-*dry[-_]?run\Z", re.IGNORECASE)  # preview, elsewhere


def log_error(error, log):
    """Logs what went wrong, a line for each cause."""
    for line in reason_of(error).split("\n"):
        log(line if "ERROR" in line else "ERROR - " + line)
    debug(log)


def dispatch(words, log, watch):
    """Tells the kinds of command lines apart; returns the exit status. Raises BackupError."""
    first = words[0].lower() if words else ""
    text = {"-h": "help", "-v": "version"}.get(first, first.lstrip("-"))
    if first in COMMANDS and words[1:] and words[1].lower() in ("-h", "--help"):
        text, words = "help", ["help", first]
    if text == "help" or (text in TEXTS and len(words) == 1):
        write_text(sys.stdout, TEXTS[text](*[word.lower() for word in words[1:2]]))
        return 0
    if first != "check":
        return command(first, words, log, watch)
    try:
        return command(first, words, log, watch)
    except (Exception, Interrupted) as error:  # a monitor hears of it in any case
        text = re.sub(r"\A[ *-]*ERROR[ -]*", "", reason_of(error).split("\n")[0])
        log.bare("VMBACKUP UNKNOWN - %s" % plain(text))
        return 3


def command(name, words, log, watch):
    """Does what the command of this name, or else a run, is told by all the words."""
    own = name in COMMANDS
    words, usage = words[own:], usage_of(name if own else "<password>")[0]
    missing = " ".join(re.findall("<.*?>", usage)[len(words) :])
    if missing and name == "check":
        raise ConfigError("missing: " + missing)
    if missing:
        near = "" if own else similar(name, list(COMMANDS) + list(TEXTS))
        write_text(sys.stderr, "%s\nMissing: %s%s\n" % (
            "Usage: " + usage.strip() if own else USAGE.rstrip(),
            missing if own else "<password> or <config-file|vm-selector>: both are needed",
            ", or did you mean %s?" % near if near else ""))
        return 3
    if "<password>" in usage:
        check_order(*words[:2])
    if not own and words[1].lower().startswith("create-password-file="):
        return create_password_file(words, log, watch)
    places, options = parse_words(usage, words)
    if name not in ("verify", "extract"):
        return COMMANDS.get(name, backup_command)(places, options, log, watch)
    with watch.attend(log.progress):
        return watch.do(COMMANDS[name], places, options, log, watch)


def parse_words(usage, words):
    """(the words that stand in the places of a usage, {option: value} of the others, with the pairs
    for make_settings as `settings`). Raises ConfigError for a word that it does not show."""
    shown = re.findall(r"\[(.*?)\]", usage)
    options = {each.partition("=")[0]: each for each in shown}
    known = KNOWN if options.pop("name", None) else {}
    most = usage.count("<") + bool(options.pop("vm-name", None))
    places, given = [], collections.defaultdict(list)  # type: Any, Any
    for word in words:
        key, separator, value = word.partition("=")
        key = key.lower()
        as_shown = key in options and bool(separator) == ("=" in options[key])
        if len(places) < usage.count("<"):
            places.append(word)
        elif separator and (key in known or key == "only" and as_shown and value):
            given["settings"].append((key, value, "command line"))
        elif as_shown and (value or not separator and key not in given):  # or a VM bears the name
            given[key] = value
        elif len(places) < most and not (separator and "=" in usage):
            places.append(word)
        else:
            near = similar(key + separator, [name + "=" for name in known] + list(COMMANDS) + [
                name + "=" * ("=" in options[name]) for name in options if not as_shown])
            if "preview" in options and (DRY_RUN.match(word) or key == "preview"):
                near = "preview"
            more = [each for each in shown if each != "vm-name"] + list(known)
            raise ConfigError("ERROR - invalid parameter %s: %s" % (
                key + "=" if "pass" in key else word, "did you mean %s?" % near if near else
                "allowed are " + ", ".join(more) if more else "it is one word too many"))
    return places, given


def check_order(*words):
    """Refuses swapped arguments, and shows none of them: one is the password."""
    key, separator, _ = words[0].lower().partition("=")
    wrong, configs = separator and key in RULE_KEYS + ("create-password-file",), []
    for word in filter(os.path.isfile, map(native, words)):
        with contextlib.suppress(ConfigError):
            configs += [word] if load_config(word) else []
    if wrong or DRY_RUN.match(words[0]) or configs == [native(words[0])]:
        raise ConfigError("ERROR - the first argument has to be the password (a password file, - or"
                          " local), a config file or selector and preview stand behind it")


def create_password_file(words, log, watch):
    """Writes a password file of mode 0600; of files that exist it replaces only such a one."""
    path = native(words[1].partition("=")[2])
    if words[2:] or not path:
        raise ConfigError("ERROR - create-password-file=FILE stands alone behind the password")
    password = watch.pure(read_password, words[0], True)
    if os.path.lexists(path):
        read_password_file(path)
    try:
        replace_file(path, base64.b64encode(password.encode("utf-8")), 0o600)
    except OSError as error:
        raise ConfigError("ERROR - cannot write the password file: %s" % describe(error)) from None
    log("password file saved to: %s" % path)
    return 0


def backup_command(places, options, log, watch):
    """A run or preview; returns the exit status."""
    (word, selector), preview = places, "preview" in options
    settings = watch.do(read_settings, selector, options["settings"])
    if settings.config_file:
        log("VmBackup config loaded from: %s" % selector)
    mistakes = watch.do(check_outputs, settings, word, log)
    path = settings.status_log if settings.config_file and not preview else None
    run = Run(settings, log, make_status(path, log, settings.warnings), watch)
    watch.rate = settings.rate_limit * 10**6
    try:
        if mistakes:
            raise ConfigError("\n".join(mistakes))
        hosts = endpoints(settings, word == "local")
        run.host = ", ".join(map(str, hosts))
        check_packages()
        watch.do(check_paths, settings)
        run.exit_status = run.execute(hosts, watch.pure(credentials, settings, word), preview)
    except (Exception, Interrupted) as error:
        code = getattr(error, "exit_code", 2)
        run.exit_status = 3 if code == 2 and not run.begun else code
        run.error = reason_of(error)
        log_error(error, log)
        if not run.begun:
            watch.do(run.status, "vmbackup.py", "begin")
        watch.do(run.status, "vmbackup.py", "end", "ERROR", run.error.replace("\n", "; "))
    if not preview:
        watch.do(send_reports, run)
    return run.exit_status


def read_settings(selector, pairs):
    """The Settings of a run: of its second argument, then of `pairs`. Raises ConfigError."""
    path = native(selector)
    if os.path.isfile(path):
        settings = make_settings(load_config(path), pairs)
        settings.config_file = path
    else:
        settings = make_settings([], [parse_selector(selector)] + pairs)
    if not settings.pool_db_backup and all(rule.key == "exclude" for rule in settings.rules):
        raise ConfigError("ERROR - no VMs loaded: %s has no vm-export= or vdi-export=" % selector)
    return settings


def parse_selector(text):
    """The pair of make_settings for a vm-selector. Raises ConfigError for what may be none."""
    key, separator, value = text.partition("=")
    key, bare = key.lower(), re.sub(r":[0-9]+\Z", "", text).strip()
    if separator and key in ("vm-export", "vdi-export"):
        return key, value, "command line"
    if not bare:
        raise ConfigError("ERROR - the VM selector is empty: give '.*' for all VMs")
    words = RULE_KEYS + ("only", "create-password-file")
    if DRY_RUN.match(text) or separator and (key in KNOWN or similar(key, words)):
        raise ConfigError("ERROR - invalid parameter %s: the second argument is a config file, a VM"
                          " selector, vm-export= or vdi-export=; preview and settings stand behind"
                          " it" % text)
    if "/" in text or bare.lower().endswith((".cfg", ".conf", ".ini")):
        raise ConfigError("ERROR - no such config file: %s (for a VM of that name: vm-export=%s)"
                          % (text, text))
    return "vm-export", text, "command line"


def check_outputs(settings, word, log):
    """Mistakes in the names of the files that a run writes. Such a file is taken out of the
    settings, or the report of just this mistake would go there."""
    folder, config = os.path.dirname(KNOWN["status_log"].default), settings.config_file
    if settings.status_log == KNOWN["status_log"].default and not os.path.isdir(folder):
        settings.status_log = None
        if config:
            log("NOTE - no status log is written: the folder %s does not exist (status_log= names"
                " another file, or none)" % folder)
    read = (config, native(word), settings.smtp_password_file, settings.tls_ca)
    mistakes, taken = [], [os.path.realpath(name) for name in read if name]
    for key, begin in (("status_log", b""), ("report_json", rb"\s*(\{|\Z)"),
                       ("metrics_file", rb"\s*((# (HELP|TYPE) )?vmbackup_|\Z)")):
        path = getattr(settings, key)
        if not path or key == "status_log" and (not config or path == os.devnull):
            continue
        try:
            if os.path.realpath(path) in taken:
                raise BackupError("this file serves for something else")
            if os.path.isdir(path) or not os.path.isdir(os.path.dirname(path) or "."):
                raise BackupError("give a file in a folder that exists")
            if os.path.exists(path) and not re.match(begin, read_start(path)):
                raise BackupError("what it holds is none of this program's")
        except (OSError, BackupError) as error:
            mistakes.append("ERROR - %s=%s: %s" % (key, path, describe(error)))
            setattr(settings, key, None)
        taken.append(os.path.realpath(path))
    return mistakes


def check_paths(settings):
    """Raises ConfigError for what the settings name and a run could not use."""
    import ssl

    path = settings.backup_dir
    if not os.path.isdir(path):
        raise ConfigError("ERROR - backup_dir does not exist: %s (is the share mounted?)%s"
                          % (path, meant(path) if " #" in path else ""))
    if os.stat(path).st_dev == os.stat("/").st_dev:
        text = "backup_dir lies on the file system of / (is the share mounted?): %s" % path
        if settings.require_mount:
            raise ConfigError("ERROR - " + text)
        if os.path.exists(INVENTORY):
            settings.warnings.append("***WARNING - %s; backups there may fill this dom0" % text)
    for key in ("tls_ca", "smtp_ca", "smtp_password_file"):
        file = getattr(settings, key)
        try:
            if file:
                read_start(file)  # a pipe would be waited for
            if file and key.endswith("_ca"):
                ssl.create_default_context(cafile=file)
        except (OSError, BackupError) as error:
            raise ConfigError("ERROR - %s=%s cannot be used: %s" % (
                key, file, describe(error))) from None
    if settings.compress == "zstd" and not shutil.which("zstd"):
        raise ConfigError("ERROR - compress=zstd: the command zstd is not here, so that no export"
                          " could be proved: install it, or set compress=gzip")


def main(argv=None) -> int:
    """Runs the program with these arguments (default: sys.argv's); returns the exit status."""
    os.umask(0o077)
    words = [from_argv(arg) for arg in (sys.argv[1:] if argv is None else argv)]
    warnings.simplefilter("ignore")  # of users' patterns
    watch = Watch()
    watch.install()
    log = Log(watch)
    try:
        return dispatch(words, log, watch)
    except (Exception, Interrupted) as error:
        log_error(error, log)
        return getattr(error, "exit_code", 2)
    finally:
        log.show()


if __name__ == "__main__":
    sys.exit(main())

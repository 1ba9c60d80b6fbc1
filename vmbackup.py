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
  * Deleted on disk are only marked folders beyond max_backups and unfinished folders of this
    program; never the newest good backup, nothing with a foreign file in it.
  * Destroyed on the pool are only snapshots proved to be this program's: is_a_snapshot,
    snapshot_of the VM being backed up, and our other_config key or exactly our name.
  * One VM's failure never stops the others, and the exit status tells the worst that happened.
  * The password appears in no output, file, mail or argument of a child.

What it does not promise: that the guest's applications were quiet (snapshots are crash
consistent), that an XVA fits an older XAPI, or anything about time: see the README.

Read it from the top: settings, selection, retention and the archive checker are pure; then come
the XAPI client, the backup of one VM, the run, reports and the command line, each built on what
stands above it. Derived in behaviour from NAUbackup/VmBackup 3.25 of Northern Arizona University.
"""

import base64
import collections
import contextlib
import datetime
import errno
import fcntl
import functools
import hashlib
import http.client
import importlib.util
import io
import itertools
import json
import mmap
import os
import re
import shutil
import signal
import socket
import ssl
import stat
import struct
import subprocess
import sys
import tarfile
import termios
import threading
import time
import traceback
import types
import unicodedata
import urllib.parse
import warnings
import xml.parsers.expat
import xmlrpc.client
import zlib
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

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


class ConfigError(BackupError):
    """Usage, configuration or login: nothing was started. Several lines = several mistakes."""

    exit_code = 3


class LockedError(BackupError):
    """Another run holds the lock."""

    exit_code = 4


class ArchiveError(BackupError):
    """The bytes are not a whole export."""


class Interrupted(BackupError):
    """A signal asked the program to stop."""

    def __init__(self, signum):
        super().__init__("stopped by signal %d" % signum)
        self.exit_code = 128 + signum


# What XAPI's error codes mean to whoever reads the log, and what to do (datamodel_errors.ml).
ADVICE = {
    "HANDLE_INVALID": "the object is gone: deleted, or the host's toolstack was restarted",
    "HOST_IS_SLAVE": "this host is not the pool master: set host= to the master",
    "HOST_STILL_BOOTING": "the host is starting or has lost its master: try again when it is up",
    "HOST_OFFLINE": "the host is switched off or unreachable",
    "INTERNAL_ERROR": "XAPI failed inside: look at /var/log/xensource.log on the host",
    "LICENCE_RESTRICTION": "the pool's licence does not allow this",
    "MESSAGE_METHOD_UNKNOWN": "this XAPI is too old for the call",
    "NO_HOSTS_AVAILABLE": "no live host sees all storage of this VM: an unplugged storage"
    " repository, or an ISO left in the drive? (xe vm-cd-eject)",
    "NOT_SUPPORTED_DURING_UPGRADE": "a rolling pool upgrade is under way: run again after it",
    "OPERATION_BLOCKED": "an administrator blocked this operation (blocked_operations of the VM)",
    "OPERATION_NOT_ALLOWED": "XAPI does not allow this on such an object",
    "OTHER_OPERATION_IN_PROGRESS": "something else is working on this VM: see xe task-list",
    "RBAC_PERMISSION_DENIED": "the user lacks the role for this; root or pool-admin has it",
    "SESSION_AUTHENTICATION_FAILED": "wrong user name or password",
    "SESSION_INVALID": "the session ended: the host's toolstack was restarted",
    "SR_BACKEND_FAILURE_44": "the storage repository has no space left for a snapshot",
    "SR_BACKEND_FAILURE_46": "the storage repository could not read or attach the disk",
    "SR_BACKEND_FAILURE_109": "the chain of snapshots is too long: delete snapshots of this VM and"
    " let the storage repository coalesce",
    "SR_OPERATION_NOT_SUPPORTED": "this storage repository cannot take snapshots",
    "TASK_CANCELLED": "the task was cancelled on the host",
    "UUID_INVALID": "there is no such object any more",
    "VDI_IN_USE": "the disk is still attached somewhere",
    "VDI_IO_ERROR": "the host could not read the disk: check its storage",
    "VDI_IS_SHARABLE": "shared disks cannot be snapshotted",
    "VDI_NOT_MANAGED": "the disk is not managed by XAPI",
    "VDI_ON_BOOT_MODE_INCOMPATIBLE_WITH_OPERATION": "the disk is set to reset on boot",
    "VDI_TOO_LARGE": "the disk is too large for the format (vhd ends at 2040 GiB): use raw",
    "VM_BAD_POWER_STATE": "the VM is not in a power state that allows this",
    "VM_HAS_VUSBS": "a VM with USB devices passed through cannot be snapshotted",
}


class XapiError(BackupError):
    """A failure that XAPI reported: `code` and `params` as in its ErrorDescription."""

    def __init__(self, details, doing=""):
        details = [str(item) for item in details] or ["INTERNAL_ERROR"]
        # From v24.34 on rbac_raise hides another handler's failure in its third element.
        hidden = re.match(r"([A-Z][A-Z0-9_]+): \[", details[2]) if len(details) > 2 else None
        self.code = details[0]
        if self.code == "RBAC_PERMISSION_DENIED" and hidden:
            self.code = hidden.group(1)
        self.params = details[1:] if self.code != "SESSION_INVALID" else []  # it is a secret
        text = " ".join([self.code] + [item for item in self.params if item])
        advice = ADVICE.get(self.code)
        if advice is None and self.code.startswith("SR_BACKEND_FAILURE_"):
            advice = "the storage repository refused: look at /var/log/SMlog on the host"
        text += " (%s)" % advice if advice else ""
        super().__init__("%s: %s" % (doing, text) if doing else text)


class ConnectionLost(XapiError):
    """A call or stream broke: whether the host carried it out is not known."""

    def __init__(self, reason):
        super().__init__(["CONNECTION_LOST"])
        text = re.sub(r"(session_id=)[^&\s']+", r"\1...", describe(reason))  # worth a password
        self.args = ("the connection to the host broke: %s" % text,)


def describe(error):
    """One line about any exception; an OSError without Python's brackets around the number."""
    if isinstance(error, OSError) and error.strerror and not isinstance(error, ssl.SSLError):
        return "%s: %s" % (error.filename, error.strerror) if error.filename else error.strerror
    return str(error) or type(error).__name__


def reason_of(error):
    """The same for what ends a VM's backup or a run; a programming error names its place."""
    if isinstance(error, (BackupError, OSError)):
        return describe(error)
    line = traceback.extract_tb(error.__traceback__)[-1].lineno
    return "internal error, please report it: %s at line %d: %s" % (
        type(error).__name__, line, describe(error))


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
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            return "%.*f %s" % (0 if unit == "bytes" else 1, size, unit)
        size /= 1024.0
    return "%.1f TiB" % size


# ============================== settings ==============================

Setting = collections.namedtuple("Setting", "name default parse about")
Rule = collections.namedtuple("Rule", "key value name keep simple")  # a line that selects VMs
Address = collections.namedtuple("Address", "scheme host port")  # scheme unix: host = socket path


def _choice(*values):
    table = {str(value).lower(): value for value in values}
    return lambda text: table[text.lower()]


def _number(low, high):
    def parse(text):
        if not re.match(r"[0-9]{1,18}\Z", text) or not low <= int(text) <= high:
            raise ValueError
        return int(text)

    return parse


def _several(parse):
    return lambda text: [parse(item.strip()) for item in text.split(",") if item.strip()] or None


def _file(text):
    return native(text) or None


def _fingerprint(text):
    pin = text.replace(":", "").lower()
    if not re.match(r"[0-9a-f]{64}\Z", pin):
        raise ValueError
    return pin


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
        with warnings.catch_warnings():  # Python 3.13 warns of patterns without a year
            warnings.simplefilter("ignore")
            moment = datetime.datetime.strptime(name, pattern)
    except (ValueError, re.error, IndexError, KeyError):
        return None
    return moment if moment.strftime(pattern) == name else None


def parse_host(text):
    """Address of `host`, `host:port`, `[v6]:port`, a URL, or the path of XAPI's unix socket.

    Raises ValueError for anything else, and for http:// to an address that is not loopback.
    """
    if text.startswith("/"):
        return Address("unix", native(text), 0)
    scheme, separator, rest = text.partition("://")
    scheme, rest = (scheme.lower(), rest) if separator else ("https", text)
    if rest.count(":") > 1 and not rest.startswith("["):
        rest = "[%s]" % rest
    url = urllib.parse.urlsplit("//" + rest)
    host = url.hostname
    if scheme not in ("http", "https") or not host or url.username or url.path.strip("/"):
        raise ValueError
    if not re.match(r"[\w.:%-]+\Z", host) or url.query or url.fragment or url.port == 0:
        raise ValueError
    host.encode("idna")  # or getaddrinfo would raise: an empty or too long label
    if scheme == "http" and not is_loopback(host):
        raise ValueError
    return Address(scheme, host, url.port or (443 if scheme == "https" else 80))


def is_loopback(host):
    """True for localhost, 127.0.0.0/8 and ::1: traffic that does not leave this machine."""
    return host in ("localhost", "::1") or bool(re.match(r"127(\.\d{1,3}){3}\Z", host))


_flag = _choice(True, False)
SETTINGS = [Setting(*row) for row in (
    ("backup_dir", "/snapshots/BACKUPS", _file, "folder for the backups: it must exist"),
    ("status_log", "/snapshots/NAUbackup/status.log", _file, "log for monitors, a line per event"),
    ("max_backups", "4", _number(1, 10**18), "how many backups to keep of each VM: 1 or more"),
    ("vdi_export_format", "raw", _choice("raw", "vhd"), "form of a vdi-export: raw or vhd"),
    ("pool_db_backup", "0", _number(0, 1), "take a pool database backup: 0 (no) or 1 (yes)"),
    ("compress", "False", _choice("False", "True", "gzip", "zstd"),
     "compression of a vm-export by the host: False, True or gzip, zstd"),
    ("pre_clean", "False", _flag, "True: delete the oldest backup before the new is made; False"),
    ("ignore_extra_keys", "False", _flag, "True: pass over unknown keys of the config file; False"),
    ("host", "localhost", _several(parse_host),
     "XAPI host: name, address, host:port, [v6]:port, https://..., http:// to a loopback address"
     " only; several separated by commas, tried in order. With `local`: the socket's path"),
    ("username", "root", str, "user to log in as"),
    ("tls_ca", "", _file, "PEM file of the CA that signed the host's certificate"),
    ("tls_fingerprint", "", _several(_fingerprint),
     "SHA-256 of the host's certificate: 64 hex digits, colons allowed; several by commas"),
    ("tls_verify", "True", _flag, "True; False: the host's certificate is not checked"),
    ("parallel", "1", _number(1, 1000), "how many VMs are exported at a time: 1 or more"),
    ("space_check", "True", _flag, "True: no snapshot where the export will not fit; False"),
    ("backup_dir_pattern", DEFAULT_PATTERN, _pattern,
     "name of a backup's folder: strftime, at least year, month and day, no slash"),
    ("mail_to", "", _several(str), "mail is sent when mail_to, mail_from and smtp_server are set"),
    ("mail_from", "", str, "sender of the mail"),
    ("smtp_server", "", str, "mail server"),
    ("smtp_port", "25", _number(1, 65535), "its port: 1 to 65535 (465: TLS from the first byte)"),
    ("smtp_starttls", "False", _flag, "encrypt the mail's transport with STARTTLS: True or False"),
    ("smtp_user", "", str, "login at the mail server"),
    ("smtp_password_file", "", _file, "its password, in a file made by create-password-file"),
    ("mail_when", "always", _choice("always", "problems", "never"), "always, problems or never"),
    ("report_json", "", _file, "report of the run as JSON, replaced at the end of every run"),
)]
KNOWN = {setting.name: setting for setting in SETTINGS}
RULE_KEYS = ("vm-export", "vdi-export", "exclude")


class Settings(types.SimpleNamespace):
    """All settings as attributes, `rules` (the VM selectors in order), `warnings` that count as the
    run's, and `notes` that do not."""

    def __init__(self):
        super().__init__(rules=[], warnings=[], notes=[], config_file=None, password_file=None)
        for item in SETTINGS:
            setattr(self, item.name, item.parse(item.default) if item.default else None)


def read_config(data, source):
    """[(key, value, where)] of a config file's bytes; value None: a line without '='."""
    if len(data) > MIB or b"\0" in data:
        raise ConfigError("ERROR - %s is not a config file: binary, or over 1 MiB" % source)
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


def is_simple(name):
    """True for a name of letters and digits of any script, space, '-' and '_' only."""
    return all(char in " -_" or unicodedata.category(char)[0] in "LMN" for char in name)


def make_rule(key, value):
    """The Rule of one vm-export=, vdi-export= or exclude= value; `:N` is read only from its end."""
    name, keep = value, None
    match = re.match(r"(.*):([+-]?[0-9]+)\Z", value, re.DOTALL) if key != "exclude" else None
    if match:
        name, keep = match.group(1).rstrip(), int(match.group(2)[:4000])  # Python has a limit
        if keep < 1:
            raise ConfigError("ERROR - max_backups must be 1 or more: %s=%s" % (key, value))
    # A simple name that is empty would match no VM: an empty vm-export= means all of them.
    rule = Rule(key, value, name, keep, bool(name) and is_simple(name))
    if not rule.simple:
        compile_rule(rule)
    return rule


def compile_rule(rule):
    """The compiled regular expression of a Rule; ConfigError with upstream's text if it is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return re.compile(rule.name)
    except (re.error, ValueError, OverflowError, RecursionError):
        raise ConfigError("***ERROR - invalid regex: %s=%s" % (rule.key, rule.value)) from None


def make_settings(config, words):
    """Settings from `config` (read_config's pairs) and then `words` [(key, value, where)].

    Raises ConfigError with a line for each mistake: unknown name, value not allowed, bad regex.
    """
    settings, mistakes, seen = Settings(), [], set()
    extra = [value for key, value, _ in config + words if key == "ignore_extra_keys"]
    ignore = bool(extra) and str(extra[-1]).lower() == "true"
    for number, (key, value, where) in enumerate(config + words):
        try:
            if ignore and number < len(config) and key not in KNOWN and key not in RULE_KEYS:
                settings.notes.append("ignoring config key: %s" % key)
            elif key in RULE_KEYS and value is not None:
                rule = make_rule(key, value)
                if rule.name or key == "vm-export":
                    settings.rules.append(rule)
                else:
                    settings.warnings.append("***WARNING - empty %s= is passed over" % key)
            else:
                setattr(settings, key, _parse_setting(key, value, where))
                if key in seen and number < len(config):
                    settings.warnings.append("***WARNING - %s: %s is given twice, the last one"
                                             " counts" % (where, key))
                seen.add(key)
        except ConfigError as error:
            mistakes.append(str(error))
    server = settings.smtp_server or ""
    safe = settings.smtp_starttls or settings.smtp_port == 465 or is_loopback(server)
    if settings.smtp_user and not safe:
        mistakes.append("ERROR - smtp_user needs smtp_starttls=True, or its password goes in clear")
    if settings.smtp_user and not settings.smtp_password_file:
        mistakes.append("ERROR - smtp_user needs smtp_password_file")
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    return settings


def _parse_setting(key, value, where):
    if value is None:
        raise ConfigError("ERROR - %s: no '=' in %s" % (where, key[:80]))
    if key not in KNOWN:
        import difflib

        names = list(RULE_KEYS) + list(KNOWN)
        near = "".join(" (%s?)" % name for name in difflib.get_close_matches(key, names, 1))
        raise ConfigError("ERROR - %s: unknown setting %s%s, allowed are %s"
                          % (where, key, near, ", ".join(names)))
    setting = KNOWN[key]
    if not value and not setting.default:
        return None
    try:
        parsed = setting.parse(value)
        if parsed in (None, ""):
            raise ValueError
        return parsed
    except (ValueError, KeyError):
        raise ConfigError("ERROR - %s: %s=%s is not allowed; %s"
                          % (where, key, value, setting.about)) from None


# ============================== selection ==============================

# One VM to back up. `refs` has one entry if all is well, none if no VM bears the name.
Choice = collections.namedtuple("Choice", "kind name refs keep rule")
Selection = collections.namedtuple("Selection", "choices excluded left unknown_excludes unmatched")
REGEX_TIMEOUT = 20  # seconds that all regular expressions together may take


def select(rules, names):
    """Which VMs the rules choose: a Selection, in the order of a run (vdi-export first).

    names: {name: [ref, ...]} of all candidates. Simple names come first, regular expressions do
    not replace them, among equals the last definition counts, exclude wins, and what vdi-export
    chose is not vm-exported. Pure; a regular expression may take long (see time_limit).
    """

    def matching(rule):
        if rule.simple:
            return [rule.name] if rule.name in names else []
        match = compile_rule(rule).match
        return [name for name in sorted(names) if match(name)]

    found = [(rule, matching(rule)) for rule in rules if rule.key == "exclude" or not rule.simple]
    excludes = [(rule, hits) for rule, hits in found if rule.key == "exclude"]
    excluded = list(dict.fromkeys(name for _, hits in excludes for name in hits))
    unknown = [rule.value for rule, hits in excludes if not hits]
    unmatched = ["%s=%s" % rule[:2] for rule, hits in found if rule.key != "exclude" and not hits]
    hidden, choices = set(excluded), []
    for kind in ("vdi-export", "vm-export"):
        chosen = {rule.name: rule for rule in rules if rule.key == kind and rule.simple}
        by_regex = {name: rule for rule, hits in found if rule.key == kind for name in hits}
        for name, rule in by_regex.items():
            chosen.setdefault(name, rule)
        for name, rule in chosen.items():
            if name not in hidden:
                choices.append(Choice(kind, name, names.get(name, []), rule.keep, rule))
        hidden.update(chosen)
    taken = {choice.name for choice in choices}
    left = sorted(name for name in names if name not in taken)
    return Selection(choices, excluded, left, unknown, unmatched)


@contextlib.contextmanager
def time_limit(seconds, message):
    """Ends what runs inside after `seconds` with ConfigError(message): the re module looks for
    signals while it matches (sre_lib.h), so a timer stops an expression of exponential time."""

    def ring(_signum, _frame):
        raise ConfigError(message)

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# ============================== names and retention ==============================

# A folder of a VM. created: seconds since 1970, or None if its name is in no known pattern.
Folder = collections.namedtuple("Folder", "name created marker partial")
EXPORT = re.compile(r"(.*)\.(xva|xva\.gz|xva\.zst|raw|vhd)\Z", re.DOTALL)
OWN_FILES = re.compile(
    r"(vm-metadata\.xml|vm\.cfg|SHA256SUMS|"
    r"success|success_(restore|compress|compressing)|unfinished\.partial|"
    r"DISK-[^/]*/(vbd|vdi)\.cfg|VIFs/vif-[^/]*\.cfg)\Z", re.DOTALL)
OWN_FOLDERS = re.compile(r"(DISK-[^/]*|VIFs)\Z", re.DOTALL)


def folder_name(name):
    """The file name for a VM's name: injective, at most 200 bytes, never '', '.', '..' or hidden.

    '/', NUL, control characters, surrogates, a leading '.' and '%' become %XX; what is longer is
    cut and ended with ~ and 8 hex digits of the SHA-256 of the name.
    """
    escaped = re.sub("[\x00-\x1f\x7f-\x9f/%\ud800-\udfff]|^[.]",
                     lambda match: "".join("%%%02X" % byte for byte in utf8(match.group())), name)
    data = escaped.encode("utf-8")
    # A name that looks like a cut one is hashed too, or it could meet the longer one's folder.
    if len(data) > 200 or (len(data) > 190 and re.search(r"~[0-9a-f]{8}\Z", escaped)):
        kept = re.sub("%.?\\Z", "", data[:191].decode("utf-8", "ignore"))
        return "%s~%s" % (kept, hashlib.sha256(utf8(name)).hexdigest()[:8])
    return escaped or "%"


def backups(folders):
    """The folders that are backups: with a marker and a known date, oldest first. Pure."""
    good = [item for item in folders if item.marker and item.created is not None]
    return sorted(good, key=lambda item: (item.created, item.name))


def expired(folders, keep, newest=None):
    """Names of the backups beyond the `keep` newest, oldest first. Pure.

    `newest` (the one just made) is the newest whatever the clock says; one always stays.
    """
    good = sorted(backups(folders), key=lambda item: item.name == newest)
    return [item.name for item in good[: -max(keep, 1)]]


def read_start(path, size):
    """The first bytes of a file, none if there is no such file."""
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        return file.read(size)
    return b""


def list_folders(path, patterns):
    """The Folders in a VM's folder, unknown ones included; other kinds of entries are left out."""
    found = []
    with os.scandir(path) as entries:
        for entry in entries:
            if not entry.is_dir(follow_symlinks=False):
                continue
            moment = next(filter(None, (parse_time(entry.name, p) for p in patterns)), None)
            created, marker, partial = None, None, False
            if moment:
                inside = os.listdir(entry.path)
                marker = next((name for name in MARKERS if name in inside), None)
                partial = not inside or any(name.endswith(".partial") for name in inside)
                with contextlib.suppress(OSError, OverflowError, ValueError, AttributeError):
                    created = moment.timestamp()
                    if marker:  # our marker tells the moment in UTC: right through DST and TZ
                        start = read_start(os.path.join(entry.path, marker), 64)
                        created = float(re.match(rb"created=([0-9]{1,15})\n", start).group(1))
            found.append(Folder(entry.name, created, marker, partial))
    return found


def foreign_entry(folder):
    """The first thing in a backup's folder that no version of this program wrote, or None. An
    export bears the name of the VM's folder: anything else.raw may be what a user unpacked."""
    vm = os.path.basename(os.path.dirname(folder))

    def refuse(error):
        raise error

    for base, names, files in os.walk(folder, onerror=refuse):
        for name in sorted(names + files):
            path = os.path.join(base, name)
            inside = os.path.relpath(path, folder)
            export = EXPORT.match(re.sub(r"\.partial\Z", "", inside))
            pattern = OWN_FOLDERS if os.path.isdir(path) else OWN_FILES
            ours = export.group(1) == vm if export else pattern.match(inside)
            if os.path.islink(path) or not ours:
                return inside
    return None


def remove_folder(folder):
    """Deletes a backup's folder. Its marker becomes UNFINISHED first and *.partial goes last, so a
    deletion that is cut short leaves what the next run knows as unfinished, never as a backup.

    Raises BackupError, with nothing deleted, if it is a link or anything foreign is in it.
    """
    if os.path.islink(folder):
        raise BackupError("%s is a symbolic link: left alone" % folder)
    foreign = foreign_entry(folder)
    if foreign:
        raise BackupError("%s is left alone: it holds %s, which is not ours" % (folder, foreign))
    for marker in MARKERS:
        with contextlib.suppress(FileNotFoundError):
            os.rename(os.path.join(folder, marker), os.path.join(folder, UNFINISHED))
    for name in sorted(os.listdir(folder), key=lambda name: name.endswith(".partial")):
        path = os.path.join(folder, name)
        shutil.rmtree(path) if os.path.isdir(path) else os.unlink(path)
    os.rmdir(folder)


# ============================== the archive checker ==============================
#
# A checker is fed the export's bytes in pieces of any size: feed(view) raises ArchiveError as soon
# as the bytes cannot be a whole export, finish() raises it if they ended too early and returns what
# was proved, as a list of phrases for log and report. Nothing here touches network or disk.


def _error_text(view, otherwise="data after the end of the archive"):
    """The message for bytes that do not belong there, which may be the HTTP 500 page that xapi
    appends after a failure."""
    text = bytes(view[:2048]).decode("utf-8", "replace")
    if not text.startswith("HTTP/1."):
        return otherwise
    reason = re.search(r"</h1>\s*([A-Z][A-Z0-9_]{3,})", text)
    told = ": " + reason.group(1) if reason else ""
    return "the host broke off and appended an error page" + told


class Checker:
    """Base of the checkers. _parse() is a generator: it yields a number of bytes and is sent just
    those, or it yields (number, take), and take(view) gets them piece by piece, uncopied."""

    def __init__(self):
        self._parser = self._parse()
        self._proceed(None)

    def _parse(self):
        raise NotImplementedError

    def _proceed(self, data):
        self._want = 0
        with contextlib.suppress(StopIteration):
            while not self._want:
                wanted, self._kept = self._parser.send(data), bytearray()
                self._want, self._take = (
                    wanted if isinstance(wanted, tuple) else (wanted, self._kept.extend))
                data = b""

    def feed(self, data):
        view = memoryview(data)
        while len(view):
            if not self._want:
                self._after(view)
                return
            piece, view = view[: self._want], view[self._want :]
            self._take(piece)
            self._want -= len(piece)
            if not self._want:
                self._proceed(bytes(self._kept))

    def _after(self, view):
        raise ArchiveError(_error_text(view))

    def finish(self):
        raise NotImplementedError

    def close(self):
        """Lets go of what the checker holds; harmless when called twice."""


def find_xxh64():
    """What makes an XXH64 with hashlib's update() and hexdigest(): from the package xxhash or by
    the system's libxxhash; None where there is neither."""
    try:
        from xxhash import xxh64

        return xxh64
    except ImportError:
        pass
    try:
        import ctypes

        library = ctypes.CDLL("libxxhash.so.0")
        reset, update, digest = library.XXH64_reset, library.XXH64_update, library.XXH64_digest
    except (ImportError, OSError, AttributeError):
        return None
    reset.argtypes = [ctypes.c_void_p, ctypes.c_ulonglong]
    update.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
    digest.argtypes, digest.restype = [ctypes.c_void_p], ctypes.c_ulonglong

    class Xxh64:
        def __init__(self):
            self._state = ctypes.create_string_buffer(256)  # XXH64_state_t needs 88
            reset(self._state, 0)

        def update(self, view):
            array = ctypes.c_char * len(view)
            data = bytes(view) if view.readonly else array.from_buffer(view)
            update(self._state, data, len(view))

        def hexdigest(self):
            return "%016x" % digest(self._state)

    return Xxh64


class XvaCheck(Checker):
    """Proves an XVA whole: tar headers, ova.xml, chunks in order, each with its hash, every disk
    filled to its virtual_size, two zero blocks, then nothing but zeros. uuids: the VDIs that have
    to be in it; without them the archive itself says which disks it holds.

    Format and arithmetic follow xen-api's export.ml and stream_vdi.ml (recv_all_vdi): chunk
    numbers rise but may skip (zeros, in units of the archive's first chunk), and a zero-length
    chunk is a keep-alive.
    """

    def __init__(self, uuids=()):
        self._uuids = uuids
        self._kinds = {".xxhash": find_xxh64(), ".checksum": hashlib.sha1}  # the latter till 2019
        self._name = "the very beginning"
        self._disks = {}
        self._chunks = self._hashed = 0
        super().__init__()

    def _parse(self):
        name, size = self._member((yield 512))
        if name != "ova.xml" or not 0 < size <= 256 * MIB:
            raise ArchiveError("the archive does not begin with ova.xml")
        self._disks = expected_disks((yield size + -size % 512)[:size], self._uuids)
        disk, offset, last, unit, done = None, 0, -1, None, []
        block = yield 512
        while block.strip(b"\0"):
            name, size = self._member(block)
            match = re.match(r"([^/]+)/([0-9]{8,18})\Z", name)
            if not match or size > 64 * MIB:
                raise ArchiveError("unexpected member %r" % name)
            if match.group(1) != disk:
                self._filled(disk, offset)
                disk, offset, last = match.group(1), 0, -1
                if disk not in self._disks or disk in done or int(match.group(2)):
                    raise ArchiveError("unexpected member %r" % name)
                done.append(disk)
            number, unit = int(match.group(2)), size if unit is None else unit
            offset += unit * (number - last - 1) + size
            if number <= last or offset > self._disks[disk]:
                raise ArchiveError("chunk %s is out of order" % name)
            last = number
            yield from self._chunk(name, size)
            block = yield 512
        self._filled(disk, offset)
        missing = [disk for disk, size in self._disks.items() if size and disk not in done]
        if missing:
            raise ArchiveError("disk %s is missing" % missing[0])
        if (yield 512).strip(b"\0"):
            raise ArchiveError("one zero block only before more data")

    def _chunk(self, name, size):
        sums = {kind: make() for kind, make in self._kinds.items() if make}

        def take(view):
            for each in sums.values():
                each.update(view)

        yield size, take
        yield -size % 512
        member, length = self._member((yield 512))
        kind = member[len(name) :]
        if name + kind != member or kind not in self._kinds or not 0 < length <= 64:
            raise ArchiveError("the hash of chunk %s is missing" % name)
        told = (yield 512)[:length].decode("ascii", "replace").lower()
        if kind in sums and sums[kind].hexdigest() != told:
            raise ArchiveError("chunk %s does not match its hash" % name)
        self._kinds = {kind: self._kinds[kind]}  # only of the first chunk are both sums needed
        self._chunks += 1
        self._hashed += kind in sums

    def _member(self, block):
        """(name, size) of a tar header."""
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
        except (tarfile.HeaderError, ValueError):
            text = _error_text(block, "no tar header in its place")
            raise ArchiveError("%s, after %s" % (text, self._name)) from None
        if header.size < 0 or header.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
            raise ArchiveError("unexpected kind of member: %r" % header.name)
        self._name = header.name
        return header.name, header.size

    def _filled(self, disk, offset):
        if disk is not None and offset != self._disks[disk]:
            raise ArchiveError("disk %s ends at %d of %d bytes" % (disk, offset, self._disks[disk]))

    def _after(self, view):
        if bytes(view).strip(b"\0"):
            raise ArchiveError(_error_text(view))

    def finish(self):
        if self._want:
            raise ArchiveError("the archive is cut off at %s" % self._name)
        proved = "archive (%d disks, %d chunks)" % (len(self._disks), self._chunks)
        if self._hashed == self._chunks:
            return [proved, "chunk hashes"]
        return [proved, "NOT %d chunk hashes (no libxxhash here)" % (self._chunks - self._hashed)]


def expected_disks(data, uuids=()):
    """{id: virtual_size in bytes} of the disks that an export with this ova.xml has to hold. It is
    one XML-RPC value without a prolog. Raises ArchiveError if it lacks a VDI of `uuids`: one that
    was destroyed since the snapshot leaves no other trace in an export (export.ml)."""
    if b"<!DOCTYPE" in data or b"<!ENTITY" in data:
        raise ArchiveError("ova.xml is not XAPI's")
    data, by_class = re.sub(rb"^\s*<\?xml[^>]*>", b"", data), collections.defaultdict(dict)
    try:
        value: Any = xmlrpc.client.loads(b"<params><param>" + data + b"</param></params>")[0][0]
        for item in value["objects"]:
            by_class[item["class"]][item["id"]] = item["snapshot"]
        vdis = by_class["VDI"]
        wanted = [vm.get("suspend_VDI") for vm in by_class["VM"].values()]
        for vbd in by_class["VBD"].values():
            sr = by_class["SR"].get(vdis.get(vbd["VDI"], {}).get("SR"), {})
            if vbd["type"] != "CD" and sr.get("content_type") != "iso":
                wanted.append(vbd["VDI"])
        found = {vdi: int(vdis[vdi]["virtual_size"]) for vdi in wanted if vdi in vdis}
        absent = sorted(set(uuids) - {vdi.get("uuid") for vdi in vdis.values()})
    except Exception as error:  # hostile bytes make the unmarshaller raise nearly anything
        raise ArchiveError("ova.xml cannot be read: %s" % describe(error)) from None
    if absent:
        raise ArchiveError("a disk of the snapshot is not in it: VDI %s" % ", ".join(absent))
    return found


class RawCheck(Checker):
    """Proves a raw disk whole: exactly `size` bytes."""

    def __init__(self, size):
        self._size, self._seen, self._start = size, 0, b""

    def feed(self, data):
        self._start = self._start or bytes(data[:2048])
        self._seen += len(data)
        if self._seen > self._size:
            raise ArchiveError("more bytes than the disk's virtual size (%d)" % self._size)

    def finish(self):
        if self._seen != self._size:
            short = "%d of %d bytes arrived" % (self._seen, self._size)
            raise ArchiveError(_error_text(self._start, short))
        return ["size (%d bytes)" % self._size]


class VhdCheck(Checker):
    """Proves a dynamic VHD whole: both footers, the header, each block of the table inside the
    file and apart from the others, nothing after the last footer (Microsoft's VHD specification).

    size: the disk's virtual_size in bytes, or None to take what the footer says.
    """

    def __init__(self, size=None):
        self._size, self._seen, self._tail = size, 0, b""
        self._footer, self._blocks, self._end = b"", [], 0
        super().__init__()

    def feed(self, data):
        self._seen += len(data)
        self._tail = (self._tail + bytes(data[-512:]))[-512:]
        super().feed(data)

    def _after(self, view):
        pass  # the blocks; finish() looks at the tail

    def _parse(self):
        self._footer = start = yield 512
        if not self._intact(start, b"conectix", 64):
            raise ArchiveError(_error_text(start, "no VHD footer in front"))
        at, size, kind = struct.unpack(">Q24xQ4xI", start[16:64])
        if kind != 3 or not 512 <= at <= MIB:
            raise ArchiveError("not a whole dynamic VHD")
        if self._size not in (None, size):
            raise ArchiveError("the VHD is for %d bytes, the disk has %d" % (size, self._size))
        yield at - 512
        header = yield 1024
        table, entries, block = struct.unpack(">Q4xII", header[16:36])
        sane = block >= 512 and -(-size // block) <= entries <= 4 * MIB
        if not self._intact(header, b"cxsparse", 36) or not sane or table < at + 1024:
            raise ArchiveError("the VHD's header is damaged")
        yield min(table - at - 1024, 64 * MIB), len  # skipped
        numbers = struct.unpack(">%dI" % entries, (yield entries * 4))
        self._end = table + -(-entries * 4 // 512) * 512
        self._blocks = sorted(number * 512 for number in numbers if number != 0xFFFFFFFF)
        for offset in self._blocks:
            if offset < self._end:
                raise ArchiveError("the VHD's blocks overlap")
            self._end = offset + -(-block // 4096 // 512) * 512 + block

    @staticmethod
    def _intact(data, cookie, at):
        told = data[at : at + 4]
        mine = ~(sum(data) - sum(told)) & 0xFFFFFFFF
        return data.startswith(cookie) and told == struct.pack(">I", mine)

    def finish(self):
        if self._want:
            raise ArchiveError("the VHD is cut off at its beginning")
        if self._tail != self._footer:
            page = self._tail[max(self._tail.find(b"HTTP/1."), 0) :]
            raise ArchiveError(_error_text(
                page, "the VHD does not end in its footer: cut off, or data after it"))
        # Up to a page of padding may stand before the last footer.
        if not self._end <= self._seen - 512 <= self._end + 4096:
            raise ArchiveError("the VHD's table does not fit its length")
        return ["VHD (footers, header, %d blocks)" % len(self._blocks)]


class GzipCheck(Checker):
    """Feeds what a gzip stream holds to another checker; both have to end where the file does."""

    def __init__(self, inner):
        self._inner, self._gzip = inner, zlib.decompressobj(31)

    def feed(self, data):
        view = memoryview(data)
        try:
            while len(view):
                if self._gzip.eof:
                    raise ArchiveError(_error_text(view))
                self._inner.feed(self._gzip.decompress(view, MIB))
                rest = self._gzip.unused_data if self._gzip.eof else self._gzip.unconsumed_tail
                view = memoryview(rest)
        except zlib.error as error:
            raise ArchiveError("the gzip stream is damaged: %s" % error) from None

    def finish(self):
        with contextlib.suppress(zlib.error):
            self._inner.feed(self._gzip.flush())  # zlib may hold back output with no input left
        if not self._gzip.eof:
            raise ArchiveError("the gzip stream is cut off")
        return ["gzip"] + self._inner.finish()


class ZstdCheck(Checker):
    """The same for zstd, through the command `zstd`, which XAPI itself needs in dom0."""

    def __init__(self, inner, command):
        self._inner = inner
        self._child = subprocess.Popen(
            [command, "-dcq"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True)  # Ctrl-C is for us: the child ends when its input does
        self._stdout: Any = self._child.stdout  # a BufferedReader
        self._thread = ThreadPoolExecutor(1)
        self._reader = self._thread.submit(self._read)

    def _read(self):
        buffer = memoryview(bytearray(MIB))
        try:
            for count in iter(lambda: self._stdout.readinto(buffer), 0):
                self._inner.feed(buffer[:count])
        except BaseException:
            self._child.kill()
            raise

    def feed(self, data):
        try:
            self._child.stdin.write(data)
        except OSError:
            failure = self._reader.exception()
            raise failure or ArchiveError("the zstd stream is damaged") from None

    def finish(self):
        self.close()
        self._reader.result()
        if self._child.returncode:
            raise ArchiveError("the zstd stream is cut off, damaged or followed by something")
        return ["zstd"] + self._inner.finish()

    def close(self):
        with contextlib.suppress(OSError):
            self._child.stdin.close()
        self._thread.shutdown()
        self._stdout.close()
        self._child.wait()


class ZstdFrameCheck(Checker):
    """Walks the blocks of one zstd frame without decompressing (RFC 8878): proves that the frame
    ends where the file does, and nothing about what is in it."""

    unproved = "NOT the archive inside (no zstd command here)"

    def _parse(self):
        head = yield 5
        if head[:4] != b"\x28\xb5\x2f\xfd":
            raise ArchiveError("not a zstd stream")
        flags, single = head[4], head[4] >> 5 & 1
        yield (1 - single) + (0, 1, 2, 4)[flags & 3] + (single, 2, 4, 8)[flags >> 6]
        last = 0
        while not last:
            word = int.from_bytes((yield 3), "little")
            last, kind, size = word & 1, word >> 1 & 3, word >> 3
            if kind == 3 or size > 128 * 1024:
                raise ArchiveError("the zstd stream is damaged")
            yield (1 if kind == 1 else size), len
        yield 4 * (flags >> 2 & 1)

    def finish(self):
        if self._want:
            raise ArchiveError("the zstd stream is cut off")
        return ["zstd frame", self.unproved]


class DatabaseCheck(Checker):
    """Proves a dump of the pool's database whole: it ends in </database>, and lists VMs (every host
    is one): during a rolling upgrade xapi sends one without tables (pool_db_backup.ml)."""

    def __init__(self):
        self._tail, self._vms = b"", False

    def feed(self, data):
        window = self._tail + bytes(data)
        self._vms = self._vms or bool(re.search(rb'<table name="VM">\s*<row ', window))
        self._tail = window[-64:]

    def finish(self):
        if not self._tail.rstrip().endswith(b"</database>"):
            raise ArchiveError("the dump does not end in </database>")
        if not self._vms:
            raise ArchiveError("the dump lists no VM: is a rolling pool upgrade under way?")
        return ["</database>"]


def make_checker(file_name, size=None, uuids=()):
    """The checker for an export by its file name; size: virtual_size in bytes of a single disk;
    uuids: of the VDIs that have to be in an XVA."""
    if file_name.endswith(".xva"):
        return XvaCheck(uuids)
    if file_name.endswith(".xva.gz"):
        return GzipCheck(XvaCheck(uuids))
    if file_name.endswith(".xva.zst"):
        command = shutil.which("zstd")
        return ZstdCheck(XvaCheck(uuids), command) if command else ZstdFrameCheck()
    return VhdCheck(size) if file_name.endswith(".vhd") else RawCheck(size)


# ============================== the XAPI client ==============================

CONNECT_TIMEOUT = 30  # seconds
KEEPALIVE = ((socket.TCP_NODELAY, 1), (socket.TCP_KEEPIDLE, 60), (socket.TCP_KEEPINTVL, 15),
             (socket.TCP_KEEPCNT, 8))
CALL_TIMEOUT = 600  # seconds: VM.destroy and others queue on the host while it is busy
LOGIN_GRACE = 5  # seconds that a login may still take once a signal came
SILENCE = 30  # seconds without a byte after which the host is asked how the task does
DEAD_AFTER = 180  # seconds without a byte and without an answer: the host is gone
LINGER = 600  # seconds that a stream may stay open and silent once its task has ended
TASK_ENDS = 60  # seconds that a task may stay pending once its stream has ended
FAILURE_PAUSES = (0, 0.2, 0.8, 2)  # seconds until a task must have told why its stream failed
SNAPSHOT_TIMEOUT = 3600  # seconds that a snapshot may take


class Stop:
    """A request to stop by signal. It tears nothing apart: code looks at it where it can undo what
    it has done, and exports that are being read end at once."""

    def __init__(self):
        self.signum = None
        self.exports = set()
        self.waiting = None  # an Xapi whose calls change nothing yet

    def handler(self, signum, _frame):
        """The signal handler: no locks in here, it may run between any two bytecodes."""
        self.signum = self.signum or signum
        for each in filter(None, list(self.exports) + [self.waiting]):
            each.abort()

    def check(self):
        if self.signum:
            raise Interrupted(self.signum)

    def sleep(self, seconds):
        """Waits; returns early once a stop was asked for. Signal-safe, unlike threading.Event."""
        end = time.monotonic() + seconds
        while not self.signum and time.monotonic() < end:
            time.sleep(max(0, min(0.1, end - time.monotonic())))


class Endpoint:
    """Where one host is reached and how it proves who it is.

    pins: SHA-256 fingerprints of the certificates to accept; ca: PEM file to verify with, None
    for the system's; verify False: no check. A loopback address needs no proof unless one is asked.
    """

    def __init__(self, address, pins=None, ca=None, verify=True):
        self.address, self.pins, self.ca, self.verify = address, pins, ca, verify
        self.checked = verify and bool(pins or ca or not is_loopback(address.host))
        self._context = None

    def __str__(self):
        scheme, host, port = self.address
        if scheme == "unix":
            return host
        host = "[%s]" % host if ":" in host else host
        return host if port == {"https": 443, "http": 80}[scheme] else "%s:%d" % (host, port)

    def at(self, address):
        """The Endpoint of another address that has to prove itself in the same way."""
        return Endpoint(address, self.pins, self.ca, self.verify)

    def open_socket(self, timeout):
        """A connected socket, TLS done and the certificate checked: nothing was sent before that.

        A dead peer is noticed by TCP keepalive within about three minutes, whatever `timeout`
        (seconds per read or write, None for ever).
        """
        scheme, host, port = self.address
        if scheme == "unix":
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        else:
            sock = socket.create_connection((host, port), CONNECT_TIMEOUT)
        try:
            if scheme == "unix":
                sock.settimeout(CONNECT_TIMEOUT)
                sock.connect(host)
            else:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                for option, value in KEEPALIVE:
                    sock.setsockopt(socket.IPPROTO_TCP, option, value)
            if scheme == "https":
                sock = self._tls(sock)
        except BaseException:
            sock.close()
            raise
        sock.settimeout(timeout)
        return sock

    def _tls(self, sock):
        self._context = self._context or self._make_context()
        name = self.address.host if self._context.check_hostname else None
        try:
            tls = self._context.wrap_socket(sock, server_hostname=name)
        except (ssl.SSLError, ssl.CertificateError) as error:
            # In Python 3.6 CertificateError is a wrong name only, and no SSLError.
            if isinstance(error, ssl.CertificateError) or "CERTIFICATE_VERIFY_FAILED" in str(error):
                raise BackupError(self._untrusted()) from None
            raise
        shown = hashlib.sha256(tls.getpeercert(True)).hexdigest()
        if self.checked and self.pins and shown not in self.pins:
            tls.close()
            raise BackupError(self._untrusted(shown))
        return tls

    def _make_context(self):
        if self.checked and not self.pins:
            context = ssl.create_default_context(cafile=self.ca)
            # XenServer's own certificates have no key identifiers, which newer Pythons ask for.
            context.verify_flags &= ~getattr(ssl, "VERIFY_X509_STRICT", 0)
        else:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            # XenServer 7 has RSA key exchange only and short keys, which the defaults refuse.
            levels = ssl.OPENSSL_VERSION_INFO >= (1, 1)  # older ones know none and raise
            context.set_ciphers("DEFAULT:@SECLEVEL=1" if levels else "DEFAULT")
        if hasattr(ssl, "TLSVersion"):
            context.minimum_version = ssl.TLSVersion.TLSv1_2
        else:
            context.options |= ssl.OP_NO_TLSv1 | ssl.OP_NO_TLSv1_1
        return context

    def _untrusted(self, shown=None):
        """One line: the fingerprint that the host shows, how to compare it and what to set."""
        if shown is None:
            bare = Endpoint(self.address, verify=False)
            try:
                with contextlib.closing(bare.open_socket(CONNECT_TIMEOUT)) as sock:
                    shown = hashlib.sha256(sock.getpeercert(True)).hexdigest()
            except OSError as error:
                return "the certificate of %s is not trusted (%s)" % (self, describe(error))
        shown = ":".join(re.findall("..", shown)).upper()
        return ("the certificate of %s is not trusted: its SHA-256 fingerprint is %s - compare it"
                " on the host's console with: openssl x509 -noout -fingerprint -sha256 -in"
                " /etc/xensource/xapi-ssl.pem - and if it is the same, add tls_fingerprint=%s"
                % (self, shown, shown))


class Connection(http.client.HTTPConnection):
    """HTTP over whatever the endpoint opens: TCP, checked TLS or the unix socket."""

    def __init__(self, endpoint, timeout):
        host = "localhost" if endpoint.address.scheme == "unix" else endpoint.address.host
        super().__init__(host, endpoint.address.port or 80, timeout=timeout)
        self._endpoint = endpoint

    def connect(self):
        self.sock = self._endpoint.open_socket(self.timeout)


class Transport(xmlrpc.client.Transport):
    """XML-RPC that never sends a call twice by itself: the stock transport does when a connection
    drops, and VM.snapshot must not happen twice. A connection that was idle is made anew."""

    user_agent = "vmbackup/" + __version__
    accept_gzip_encoding = False

    def __init__(self, endpoint, timeout):
        super().__init__()
        self._endpoint, self.timeout, self._used = endpoint, timeout, 0.0

    def make_connection(self, host):
        if time.monotonic() - self._used > 5:
            self.close()
        if self._connection[0] != host:
            self._connection = host, Connection(self._endpoint, self.timeout)
        return self._connection[1]

    def request(self, host, handler, request_body, verbose=False):
        try:
            return self.single_request(host, handler, request_body, verbose)
        finally:
            self._used = time.monotonic()


# What a call or a stream raises when the connection breaks (requests' errors are OSErrors).
BROKEN = (OSError, http.client.HTTPException, xmlrpc.client.ProtocolError,
          xml.parsers.expat.ExpatError)


def send(session, method, args):
    """One call on a XenAPI session; all that can go wrong as XapiError or ConnectionLost."""
    import XenAPI

    try:
        return session.xenapi_request(method, args)
    except XenAPI.Failure as failure:
        raise XapiError(failure.details, method) from None
    except (xmlrpc.client.ResponseError, xmlrpc.client.Fault) as fault:
        raise XapiError(["SESSION_INVALID", describe(fault)], method) from None
    except BROKEN as error:
        raise ConnectionLost(error) from None


def task_error(record, doing=""):
    """The XapiError of a task's record that ended otherwise than well; a cancelled task tells no
    error of its own (taskHelper.ml)."""
    return XapiError(record["error_info"] or ["TASK_CANCELLED"], doing)


class Xapi:
    """A logged-in session at the pool master, for one thread.

    hosts: Endpoints tried in order. credentials: (user, password). log: function(text).
    """

    def __init__(self, hosts, credentials, log):
        self._hosts, self._credentials, self._log = hosts, credentials, log
        self._session: Any = None
        self._transport: Any = None
        self.endpoint: Any = None
        self._filters, self._aborted = True, False

    def connect(self):
        """Logs in at the first host that answers, or at the master that it names.

        Raises ConfigError if the password is wrong, no host answers or none is trusted.
        """
        # A session that a lost connection left behind is still counted by the host.
        old, self._session = self._session and self._session.handle, None
        reasons = []
        for endpoint in self._hosts:
            try:
                self._login(endpoint)
            except ConfigError:
                raise
            except (BackupError, xmlrpc.client.Error) + BROKEN as error:
                if self._aborted:
                    raise ConnectionLost(error) from None
                reasons.append("%s: %s" % (endpoint, describe(error)))
                continue
            if old:
                with contextlib.suppress(Exception):
                    self._session.session.logout(old)
            return
        raise ConfigError("ERROR - no login: %s" % "; ".join(reasons))

    def _login(self, endpoint, hops=3):
        import XenAPI

        self._transport = transport = Transport(endpoint, CALL_TIMEOUT)
        session = XenAPI.Session("http://xapi", transport=transport)
        try:
            session.login_with_password(*self._credentials, "1.0", "vmbackup")
            self._session, self.endpoint = session, endpoint
            if self._aborted:
                signal.alarm(0)
        except XenAPI.Failure as failure:
            error = XapiError(failure.details)
            if error.code == "HOST_IS_SLAVE" and error.params and hops:
                self._login(self._master(endpoint, error.params[0]), hops - 1)
            elif error.code == "SESSION_AUTHENTICATION_FAILED":
                raise ConfigError("ERROR - login failed at %s: wrong user name or password for %s"
                                  " (a password file has to exist to be read)"
                                  % (endpoint, self._credentials[0])) from None
            else:
                raise error from None
        finally:
            if self._session is not session:
                transport.close()

    def _master(self, slave, told):
        """The Endpoint of the master that a slave names: an address, as a rule without a port."""
        try:
            address = parse_host(told)
        except ValueError:
            raise BackupError("the host names %r as its master" % told) from None
        plain = slave.address.scheme == "http"
        if plain and is_loopback(address.host):
            address = address._replace(scheme="http")
        if address.port == 443 and plain == (address.scheme == "http"):
            address = address._replace(port=slave.address.port)
        self._log("%s is not the pool master, going on to %s" % (slave, told))
        return slave.at(address)

    @property
    def handle(self):
        """The session reference; it changes when XenAPI logs in anew."""
        session = self._session
        if session is None:
            raise ConnectionLost(BackupError("not logged in"))
        return session.handle

    def call(self, method, *args):
        """The value of an XAPI call. Raises XapiError; ConnectionLost if the outcome is unknown.

        Only a call that reads, or that the host refused unexecuted, is ever sent again.
        """
        if self._session is None:
            self.connect()
        try:
            return send(self._session, method, args)
        except XapiError as error:
            again = ".get_" in method and isinstance(error, ConnectionLost) and not self._aborted
            if not again and error.code != "HOST_IS_SLAVE":
                raise
        self._log("lost the host, logging in again")
        try:
            self.connect()
        except ConfigError as error:
            raise ConnectionLost(error) from None
        return send(self._session, method, args)

    def ask(self, method, *args):
        """The same for another thread than the owner's: on a connection of its own, never a login,
        and with a short timeout. Raises XapiError."""
        import XenAPI

        transport = Transport(self.endpoint, SILENCE)
        session = XenAPI.Session("http://xapi", transport=transport)
        session._session = self.handle
        try:
            return send(session, method, args)
        finally:
            transport.close()

    def where(self, kind, expression):
        """{ref: record} of the objects of a class that the host's filter lets through, or None
        where it has no such filter (db_filter_parse.mly; hidden but stable, xe uses it)."""
        if self._filters:
            try:
                return self.call(kind + ".get_all_records_where", expression)
            except XapiError:
                self._filters = False  # nor is it asked again
        return None

    def records(self, kind, refs):
        """{ref: record} of the refs that exist, in one call where the host filters."""
        refs, found = [ref for ref in dict.fromkeys(refs) if ref != NULL], {}
        for start in range(0, len(refs) if len(refs) > 1 else 0, 1000):
            clauses = ['field "_ref"="%s"' % ref for ref in refs[start : start + 1000]]
            found.update(self.where(kind, " or ".join(clauses)) or {})
        for ref in refs:
            if ref not in found:
                try:
                    found[ref] = self.call(kind + ".get_record", ref)
                except XapiError as error:
                    if error.code != "HANDLE_INVALID":
                        raise
        return {ref: found[ref] for ref in refs if ref in found}

    def run_task(self, stop, method, *args):
        """Runs Async.method to its end and returns the ref that is its result.

        When a stop is asked for, the task is cancelled; if it ended well all the same its result
        is returned, so that the caller can undo it. Gives up after SNAPSHOT_TIMEOUT.
        """
        try:
            task = self.call("Async." + method, *args)
        except XapiError as error:
            if error.code != "MESSAGE_METHOD_UNKNOWN":
                raise
            return self.call(method, *args)
        deadline, pause, asked = time.monotonic() + SNAPSHOT_TIMEOUT, 0.02, False
        try:
            while True:
                record = self.call("task.get_record", task)
                if record["status"] not in ("pending", "cancelling"):
                    break
                if stop.signum and not asked:
                    asked, deadline = True, time.monotonic() + 60
                    with contextlib.suppress(XapiError):
                        self.call("task.cancel", task)
                if time.monotonic() > deadline:
                    stop.check()
                    doing = "%s did not end within %d s" % (method, SNAPSHOT_TIMEOUT)
                    raise XapiError(["TASK_TIMEOUT"], doing)
                time.sleep(pause) if asked else stop.sleep(pause)
                pause = min(pause * 1.5, 2)
        finally:
            with contextlib.suppress(XapiError):
                self.call("task.destroy", task)
        if record["status"] != "success":
            stop.check()
            raise task_error(record, method)
        return re.sub(r"</?value>", "", record["result"]).strip()  # Async wraps it in XML

    def member(self, address):
        """The Endpoint of another pool member, its certificate vouched for by the pool itself
        (host.get_server_certificate) over this connection, which is trusted already."""
        mine, pins = self.endpoint, []
        if address == mine.address:
            return mine
        other, near = mine.at(address), is_loopback(mine.address.host)
        if other.checked and (mine.checked or near or mine.address.scheme == "unix"):
            with contextlib.suppress(XapiError, ValueError):
                for ref, host in self.call("host.get_all_records").items():
                    if parse_host(host["address"]).host == address.host:
                        pem = self.call("host.get_server_certificate", ref)
                        der = ssl.PEM_cert_to_DER_cert(pem.strip() + "\n")
                        pins.append(hashlib.sha256(der).hexdigest())
        return Endpoint(address, pins) if pins else other

    def master(self):
        """The Endpoint of the pool master: this one, but for the socket of a slave, where calls
        are forwarded and streams are not."""
        if self.endpoint.address.scheme == "unix":
            with contextlib.suppress(XapiError, StopIteration):
                master = next(iter(self.call("pool.get_all_records").values()))["master"]
                if self.call("session.get_this_host", self.handle) != master:
                    host = self.call("host.get_record", master)
                    return self.member(Address("https", host["address"], 443))
        return self.endpoint

    def abort(self):
        """Ends the call that is under way, from a signal handler in the main thread. A login gets
        LOGIN_GRACE seconds more: if the host has carried it out, its session has to be ended."""
        self._aborted = True
        if self._session is None:
            signal.signal(signal.SIGALRM, lambda _signum, _frame: self._shut())
            signal.alarm(LOGIN_GRACE)
        else:
            self._shut()

    def _shut(self):
        with contextlib.suppress(OSError, AttributeError):  # not connected yet
            socket.socket.shutdown(self._transport._connection[1].sock, socket.SHUT_RDWR)

    def close(self):
        """Logs out; never raises."""
        session, self._session = self._session, None
        if session is not None:
            with contextlib.suppress(Exception):
                if self._aborted:  # by a signal, perhaps because the host is silent
                    self._transport.close()
                    self._transport.timeout = CONNECT_TIMEOUT
                session.xenapi_request("session.logout", ())
            session.transport.close()


class Watch(threading.Thread):
    """Looks after the open exports: asks the host every SILENCE seconds how their tasks do, aborts
    one whose host is gone, and tells `show(exports)` once a second how far they are."""

    def __init__(self, stop, show):
        super().__init__(name="watch", daemon=True)
        self.stop, self._show, self._end = stop, show, threading.Event()

    def run(self):
        while not self._end.wait(1):
            exports = list(self.stop.exports)
            for export in exports:
                if time.monotonic() - export.asked > SILENCE:
                    export.asked = time.monotonic()
                    self._ask(export)
            self._show(exports)

    def _ask(self, export):
        pending = True
        try:
            record = export.xapi.ask("task.get_record", export.task)
            export.progress = float(record.get("progress") or 0)
            pending = record["status"] == "pending"
            export.answered = time.monotonic()
        except ConnectionLost:
            if export.asked - max(export.touched, export.answered) > DEAD_AFTER:
                export.abort("the host sent nothing and did not answer for %d s" % DEAD_AFTER)
        except BackupError:
            pending, export.answered = False, time.monotonic()
        if not pending and export.asked - export.touched > LINGER:
            export.abort("the task has ended but the stream stays open and silent")

    def end(self):
        self._end.set()
        if self.is_alive():
            self.join()


class Export:
    """The body of an HTTP GET at XAPI with a task of its own, as a context manager: readinto()
    until it returns 0, then verdict(). Left without a verdict, the task is cancelled.

    requests speaks HTTP, over a socket that the Endpoint opened and checked; nothing of the
    environment (proxies, netrc, CA bundles) has a say, and no redirect is followed by itself.
    what: what is exported, for progress. size: bytes to expect.
    """

    def __init__(self, xapi, stop, path, query, what, size=0, endpoint=None):
        self.xapi, self.stop, self._path, self._query = xapi, stop, path, query
        self._endpoint = endpoint or xapi.endpoint
        self.what, self.size, self.received, self.progress = what, size, 0, 0.0
        self.task = self._sock = self._response = self._body = self._ended = None
        self.touched = self.answered = self.asked = self.started = time.monotonic()
        self.reason = None  # why it was aborted

    def __enter__(self):
        """Opens it, following redirects to pool members; logs in anew once after 401.

        Raises XapiError with the task's own reason where the host gives one.
        """
        self.stop.check()  # a task that nothing was begun with stays pending, even if destroyed
        try:
            self._make_task()
            self.stop.exports.add(self)
            self._open()
            return self
        except BaseException:
            self._ended = True
            self.__exit__()
            raise

    def _make_task(self):
        self.task = self.xapi.call("task.create", "vmbackup: " + self.what, "")

    def _open(self):
        endpoint, target, renewed, hops = self._endpoint, None, False, 0
        while True:
            self.stop.check()
            full = dict(self._query, session_id=self.xapi.handle, task_id=self.task)
            try:
                status, location = self._request(
                    endpoint, target or self._path + "?" + urllib.parse.urlencode(full))
            except BROKEN as error:
                self.stop.check()
                # urllib3 wraps an error of TLS in a text with the whole URL.
                cause = getattr(error.args[0] if error.args else None, "reason", None) or error
                raise self.failure() or ConnectionLost(self.reason or cause) from None
            if status == 200:
                return
            if status == 401 and not renewed:
                self._disconnect()
                renewed, target, endpoint = True, None, self.xapi.endpoint
                self.xapi.call("pool.get_all")  # XenAPI logs in again when the session is gone
                with contextlib.suppress(XapiError):
                    self.xapi.call("task.destroy", self.task)
                self._make_task()
            elif status in (301, 302, 307, 308) and location and hops < 5:
                self._disconnect()
                hops += 1
                try:
                    url = urllib.parse.urlsplit(location)
                    endpoint = self.xapi.member(parse_host("%s://%s" % (url.scheme, url.netloc)))
                except ValueError:
                    raise XapiError(["REDIRECT", location.split("?")[0]], "not followed") from None
                target = url.path + "?" + url.query
            elif status == 302:
                raise XapiError(["REDIRECT"], "the hosts send each other the request in a circle")
            else:
                told = re.search(r"</h1>\s*([A-Z][A-Z0-9_]{3,})(?:: \[ ?(.*?) ?\])?",
                                 self._error_page(), re.S)
                details = [told.group(1)] + (told.group(2) or "").split("; ") if told else []
                raise self.failure() or XapiError(details or ["HTTP_%d" % status],
                                                  "the host answered %d" % status)

    def _request(self, endpoint, target):
        """Sends the request and waits for the head, however long the host takes."""
        import requests
        import urllib3

        sock = self._sock = endpoint.open_socket(None)
        self.stop.check()  # a signal before this line found no socket to shut down

        class Direct(urllib3.connection.HTTPConnection):
            def connect(self):
                self.sock = sock

        class Adapter(requests.adapters.HTTPAdapter):
            def get_connection_with_tls_context(self, *_args, **_options):
                pool = urllib3.HTTPConnectionPool("xapi")
                pool.ConnectionCls = Direct
                return pool

            get_connection = get_connection_with_tls_context  # its name before requests 2.32

        session: Any = requests.Session()
        with session:
            session.trust_env = False
            # Or requests would wait for the end of the body of a redirect.
            session.get_redirect_target = lambda _response: None
            session.mount("http://", Adapter())
            headers = {"Accept-Encoding": "identity", "User-Agent": Transport.user_agent}
            self._response = session.get("http://xapi" + target, headers=headers, stream=True,
                                         allow_redirects=False)
        self.touched = time.monotonic()
        raw = self._response.raw
        # http.client's readinto fills the buffer without a copy; urllib3 1.26's own makes two.
        self._body = raw._fp if hasattr(getattr(raw, "_fp", None), "readinto") else raw
        return self._response.status_code, self._response.headers.get("Location", "")

    def readinto(self, view):
        try:
            count = self._body.readinto(view)
        except BROKEN + (ValueError,) as error:
            raise ConnectionLost(error) from None
        self.received += count
        self.touched = time.monotonic()
        return count

    def _error_page(self):
        buffer = bytearray(16384)
        with contextlib.suppress(OSError, BackupError):
            self._sock.settimeout(CONNECT_TIMEOUT)
            return bytes(buffer[: self.readinto(memoryview(buffer))]).decode("utf-8", "replace")
        return ""

    def abort(self, reason=None):
        """Ends a read that is under way in whatever thread; from a signal handler too."""
        self.reason = self.reason or reason
        sock = self._sock
        if sock is not None:
            with contextlib.suppress(OSError):  # not SSLSocket's: that would go on in clear text
                socket.socket.shutdown(sock, socket.SHUT_RDWR)

    def failure(self):
        """The XapiError of a task that failed, or None if it is not known to have (within 3 s: the
        task of an early failure may stay pending for ever, see xapi_http.ml)."""
        with contextlib.suppress(XapiError):
            for pause in FAILURE_PAUSES:
                time.sleep(pause)
                record = self.xapi.call("task.get_record", self.task)
                if record["status"] in ("failure", "cancelled"):
                    return task_error(record)
        return None

    def verdict(self):
        """Whether the task ended well: True, or False if it is gone (unknown). Raises XapiError
        if it failed, was cancelled or does not end within a minute of the stream's end."""
        deadline = time.monotonic() + TASK_ENDS
        while True:
            record = self.xapi.records("task", [self.task]).get(self.task)
            if record is None:
                self._ended = True
                return False
            if record["status"] in ("success", "failure", "cancelled"):
                self._ended = True
                if record["status"] == "success":
                    return True
                raise task_error(record, "the export's task failed")
            if time.monotonic() > deadline:
                raise XapiError(["TASK_TIMEOUT"], "the stream ended but its task did not")
            self.stop.check()
            self.stop.sleep(0.3)

    def _disconnect(self):
        for each in (self._response, self._sock):
            if each is not None:
                each.close()

    def __exit__(self, *_error):
        self.stop.exports.discard(self)
        self._disconnect()
        for method in ("task.destroy",) if self._ended else ("task.cancel", "task.destroy"):
            with contextlib.suppress(BackupError):
                if self.task:
                    self.xapi.call(method, self.task)


# ============================== from stream to disk ==============================

BUFFER = MIB
BUFFERS = 4
SYNC_EVERY = 64 * MIB


class FileWriter:
    """Writes a new file of mode 0600 and keeps the host's page cache clean of it. A context
    manager: finish() flushes the file to disk, leaving without it does not.

    Every 64 MiB a helper thread flushes what was written and drops it from the cache, so that at
    most two such windows are dirty: the file is not read again, dom0's memory is small, and the
    final fsync has little left to do. Measured: 1.6 s/GiB against 2.1 without, the same CPU, and
    no gain from windows of 8 to 32 MiB. O_DIRECT saves 0.1 to 0.3 CPU s/GiB, but would wait
    for a file server at every write.
    """

    def __init__(self, path):
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        self._written = self._synced = 0
        self._helper, self._flushed = ThreadPoolExecutor(1), None

    def write(self, view):
        while len(view):
            count = os.write(self._fd, view)
            view = view[count:]
            self._written += count
        if self._written - self._synced >= SYNC_EVERY:
            if self._flushed:
                self._flushed.result()
            self._flushed = self._helper.submit(self._flush, self._synced, self._written)
            self._synced = self._written

    def _flush(self, start, end):
        os.fdatasync(self._fd)
        os.posix_fadvise(self._fd, start, end - start, os.POSIX_FADV_DONTNEED)

    def finish(self):
        """Returns when all is safely on disk; raises OSError if it is not."""
        if self._flushed:
            self._flushed.result()
        os.fsync(self._fd)
        os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def __enter__(self):
        return self

    def __exit__(self, *_error):
        self._helper.shutdown()
        os.close(self._fd)


def pump(readinto, *takers):
    """Reads to the end into reused buffers and gives each piece to all takers, each in a thread of
    its own, while the next piece is read: network, hash, check and disk overlap (all release the
    GIL). Memory is bounded by BUFFERS * BUFFER bytes. Raises the first error of reader or takers.
    """
    # An mmap goes back to the system after use.
    buffers = [memoryview(mmap.mmap(-1, BUFFER)) for _ in range(BUFFERS)]
    jobs = collections.deque()  # a future for each taker of each piece, the oldest piece first
    with contextlib.ExitStack() as stack:
        threads = [stack.enter_context(ThreadPoolExecutor(1)) for _ in takers]
        for buffer in itertools.cycle(buffers):
            in_use = (BUFFERS - 1) * len(takers)  # what may be under way while `buffer` is filled
            while jobs and (len(jobs) > in_use or jobs[0].done()):
                jobs.popleft().result()
            count = readinto(buffer)
            if not count:
                break
            for thread, take in zip(threads, takers):
                jobs.append(thread.submit(take, buffer[:count]))
        for job in jobs:
            job.result()


# What came of an export: bytes, SHA-256 in hex, phrases of what was proved, task success or gone.
Saved = collections.namedtuple("Saved", "size digest checks task_known")


def save(export, path, checker):
    """Streams an Export (entered here) into a new file, proved whole by the checker and the task,
    and flushed to disk; returns Saved. Raises BackupError or OSError: then the file is no export.
    """
    digest = hashlib.sha256()
    with contextlib.closing(checker), export, FileWriter(path) as writer:
        try:
            pump(export.readinto, writer.write, digest.update, checker.feed)
            checks = checker.finish()
        except (ArchiveError, ConnectionLost) as error:
            export.stop.check()
            told = None if export.reason else export.failure()
            raise BackupError("the export is not whole: %s%s" % (
                export.reason or error, "; the host says: %s" % told if told else "")) from None
        export.stop.check()
        known = export.verdict()
        writer.finish()
    checks = ["sha256"] + ["task"] * known + checks
    return Saved(export.received, digest.hexdigest(), checks, known)


def sync(fd):
    """fsync, where there is one: not of folders on CIFS, nor of /dev/null."""
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise


def sync_folder(path):
    """Makes new names in a folder survive a power cut."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        sync(fd)
    finally:
        os.close(fd)


class Lock:
    """An exclusive lock on a VM's folder: flock on backup_dir/.NAME.lock, which the kernel lets go
    when the process dies, and which holds between the hosts of an NFS share. The file is removed
    at the end. supported is False where the file system has no locks."""

    def __init__(self, backup_dir, name):
        self._path = path = os.path.join(backup_dir, native(".%s.lock" % name))
        self.supported = True
        while True:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL):
                    self.supported = False
                    return
                os.close(self._fd)
                if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    raise LockedError("another run holds the lock of %s" % name) from None
                raise
            # The holder before may have removed the file between our open and our lock.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(self._fd), os.stat(path)):
                    return
            os.close(self._fd)

    def __enter__(self):
        return self

    def __exit__(self, *_error):
        with contextlib.suppress(OSError):
            os.unlink(self._path)
        os.close(self._fd)


# ============================== the backup of one VM ==============================

# A disk of a VM: label (device or userdevice) and its records. left_out: marked [NOBAK].
Disk = collections.namedtuple("Disk", "label vbd ref vdi left_out")
DETACH_PAUSES = (0.2, 0.5, 1, 2, 4, 8, 8, 8)  # seconds between the attempts to destroy a disk


def list_disks(vbds, vdis):
    """The Disks among VBD records (CDs and empty drives are none), by userdevice."""
    found = []
    for vbd in sorted(vbds, key=lambda vbd: vbd["userdevice"].zfill(4)):
        vdi = vdis.get(vbd["VDI"])
        if vbd["type"] == "Disk" and vdi:
            label = vbd.get("device") or vbd["userdevice"]
            if label in [disk.label for disk in found]:
                label += "-" + vbd["userdevice"]  # a device name may be stale
            found.append(Disk(label, vbd, vbd["VDI"], vdi, "[NOBAK]" in vdi["name_label"]))
    return found


def first_disk(disks):
    """The disk that vdi-export takes: xvda, hda or sda, else userdevice 0 (a VM that never ran)."""
    for device in ("xvda", "hda", "sda"):
        for disk in disks:
            if disk.vbd.get("device") == device:
                return disk
    return next((disk for disk in disks if disk.vbd["userdevice"] == "0"), None)


def export_file(settings, choice):
    """The file name of a VM's export, as text."""
    suffix = {"False": "xva", "zstd": "xva.zst"}.get(settings.compress, "xva.gz")
    if choice.kind == "vdi-export":
        suffix = settings.vdi_export_format
    return "%s.%s" % (folder_name(choice.name), suffix)


def last_size(vm_dir, folders, file_name):
    """Bytes of this file in the newest backup that has it, or None."""
    for item in reversed(backups(folders)):
        with contextlib.suppress(OSError):
            return os.path.getsize(os.path.join(vm_dir, item.name, native(file_name)))
    return None


def expected_size(kind, settings, disks, last):
    """Bytes that a backup will probably need: a raw disk's virtual size, else the size of the last
    backup of the same form (`last`, or None), else what the disks occupy on their storage."""
    if kind == "vdi-export":
        disks = [disk for disk in [first_disk(disks)] if disk]
        if settings.vdi_export_format == "raw":
            return sum(int(disk.vdi["virtual_size"]) for disk in disks)
    if last is not None:
        return last
    total = 0
    for disk in disks:
        if not disk.left_out:
            size, used = int(disk.vdi["virtual_size"]), int(disk.vdi.get("physical_utilisation", 0))
            total += min(size, used) if used > 0 else size
    return total


def check_space(backup_dir, expected, reserved=0):
    """Raises BackupError with both figures if `expected` bytes do not fit."""
    free = shutil.disk_usage(backup_dir).free - reserved
    if expected > free:
        raise BackupError("not enough space in %s: %s to expect, %s free (delete something, lower"
                          " max_backups, or set pre_clean=True or space_check=False)"
                          % (backup_dir, size_text(expected), size_text(max(free, 0))))


def is_ours(snapshot, source_ref, source, our_name):
    """Whether this program made a snapshot (of a VM or VDI): our exact name or our key.

    other_config is copied with every snapshot, and comes back with a restored VM: a key that names
    another snapshot (see key_of), or that the source bears as well, was inherited, no proof.
    """
    if not snapshot["is_a_snapshot"] or snapshot["snapshot_of"] != source_ref:
        return False
    tag = snapshot["other_config"].get(OUR_KEY)
    if snapshot["name_label"] == our_name or tag == key_of(snapshot):
        return True
    inherited = tag == source["other_config"].get(OUR_KEY) or str(tag).startswith("snapshot=")
    return tag is not None and not inherited


def key_of(snapshot):
    """The value of OUR_KEY that marks just this snapshot."""
    return "snapshot=%s" % snapshot["uuid"]


class Outcome:
    """What became of one VM (or the pool database): for log, status log, mail and report."""

    def __init__(self, kind, name):
        self.kind, self.name = kind, name
        self.uuid = self.folder = self.file = self.error = None
        self.status = "ERROR"  # upstream's word for the step that is under way
        self.bytes, self.seconds, self.locked = 0, 0.0, False
        self.checks, self.warnings, self.pruned = [], [], []

    @property
    def result(self):
        return "ERROR" if self.error else "WARNING" if self.warnings else "SUCCESS"

    @contextlib.contextmanager
    def recorded(self):
        """Takes the time of what runs inside, and keeps its error instead of letting it out."""
        begin = time.monotonic()
        try:
            yield
        except LockedError as error:
            self.error, self.locked, self.status = str(error), True, "ERROR locked"
        except Exception as error:
            self.error = reason_of(error)
        self.seconds = time.monotonic() - begin


class VmBackup:
    """One VM's backup. `run` gives settings, log, stop, patterns and the reserved space."""

    def __init__(self, run, xapi, choice):
        self.run, self.xapi, self.choice = run, xapi, choice
        self.settings, self.stop = run.settings, run.stop
        self.name, self.file_name = folder_name(choice.name), export_file(run.settings, choice)
        self.vm_dir = os.path.join(self.settings.backup_dir, native(self.name))
        self.outcome = Outcome(choice.kind, choice.name)
        self.folder, self.made_vm_dir = None, False
        self.sums = []  # (file below the folder, SHA-256)
        self.vm_ref = self.vm = None
        self.disks = []

    def log(self, text):
        self.run.log("%s: %s" % (self.choice.name, text))

    def warn(self, text):
        self.outcome.warnings.append(text)
        self.log("WARNING %s" % text)

    def back_up(self):
        """Does it all and returns the Outcome; an error is in it."""
        keep = self.choice.keep or self.settings.max_backups
        with self.outcome.recorded():
            self._check_name()
            with Lock(self.settings.backup_dir, self.name) as lock:
                if not lock.supported:
                    self.warn("this file system has no locks: never run two backups into it at"
                              " once")
                self._look_up_vm()
                existing = self._make_vm_folder()
                try:
                    self._remove_leftover_snapshots()
                    self._remove_unfinished(existing)
                    if self.settings.pre_clean:
                        self._prune(max(keep - 1, 1))
                    expected = self._expected(existing)
                    self.run.reserved[self.choice.name] = expected
                    self._make_folder()
                    if self.choice.kind == "vm-export":
                        self._export_vm(expected)
                    else:
                        self._export_vdi(expected)
                except BaseException:
                    self._discard()
                    raise
                finally:
                    self.run.reserved.pop(self.choice.name, None)
                self._prune(keep, newest=os.path.basename(self.folder))
        return self.outcome

    # --- before the snapshot ---

    def _check_name(self):
        several = len(self.choice.refs)
        if several != 1:
            self.outcome.status = "ERROR verify_vm_name"
            raise BackupError("%d VMs bear this name: rename all but one" % several if several
                              else "no VM bears this name")

    def _look_up_vm(self):
        self.vm_ref = self.choice.refs[0]
        self.vm = self.xapi.records("VM", [self.vm_ref]).get(self.vm_ref)
        if self.vm is None:
            raise BackupError("the VM was deleted since this run began")
        self.outcome.uuid = self.vm["uuid"]
        if self.vm["name_label"] != self.choice.name:
            self.warn("the VM is now called %s" % self.vm["name_label"])
        self.disks = self._disks_of(self.vm)
        for disk in self.disks:
            if disk.left_out:
                self.log("disk %s (%s) is left out" % (disk.label, disk.vdi["name_label"]))
        self.log("is %s, %d disks" % (self.vm["power_state"].lower(), len(self.disks)))

    def _disks_of(self, vm):
        vbds = self.xapi.records("VBD", vm["VBDs"]).values()
        return list_disks(vbds, self.xapi.records("VDI", [vbd["VDI"] for vbd in vbds]))

    def _make_vm_folder(self):
        if os.path.islink(self.vm_dir):
            raise BackupError("%s is a symbolic link: refused" % self.vm_dir)
        with contextlib.suppress(FileExistsError):
            os.mkdir(self.vm_dir, 0o700)
            self.made_vm_dir = True
        # On a file system that takes a and A for the same it may be another VM's.
        if native(self.name) not in os.listdir(self.settings.backup_dir):
            raise BackupError("%s belongs to a VM whose name differs only in case" % self.vm_dir)
        return list_folders(self.vm_dir, self.run.patterns)

    def _remove_leftover_snapshots(self):
        """What a killed run left on the pool, and nothing else."""
        for ref, record in self.xapi.records("VM", self.vm["snapshots"]).items():
            if is_ours(record, self.vm_ref, self.vm, "RESTORE_" + self.choice.name):
                self.log("removing the leftover snapshot %s" % record["uuid"])
                self._destroy("VM", ref, self.vm_ref)
        disks = {disk.ref: disk for disk in self.disks}
        refs = [ref for disk in self.disks for ref in disk.vdi.get("snapshots", [])]
        for ref, record in self.xapi.records("VDI", refs).items():
            disk = disks.get(record["snapshot_of"])
            if disk and is_ours(record, disk.ref, disk.vdi, self._vdi_snapshot_name(disk)):
                self.log("removing the leftover VDI snapshot %s" % record["uuid"])
                self._destroy("VDI", ref, disk.ref)

    def _remove_unfinished(self, existing):
        for item in existing:
            if item.created is None or not (item.marker or item.partial):
                self.log("%s is no backup of this program: left alone" % item.name)
            elif not item.marker:
                self.log("removing the unfinished backup %s" % item.name)
                self._try_remove(os.path.join(self.vm_dir, item.name))

    def _try_remove(self, path):
        try:
            remove_folder(path)
            return True
        except (OSError, BackupError) as error:
            self.warn("%s could not be removed: %s" % (os.path.basename(path), describe(error)))
            return False

    def _prune(self, keep, newest=None):
        for name in expired(list_folders(self.vm_dir, self.run.patterns), keep, newest):
            self.log("deleting the oldest backup %s" % name)
            if self._try_remove(os.path.join(self.vm_dir, name)):
                self.outcome.pruned.append(name)

    def _expected(self, existing):
        last = last_size(self.vm_dir, existing, self.file_name)
        expected = expected_size(self.choice.kind, self.settings, self.disks, last)
        if self.settings.space_check:
            self.outcome.status = "ERROR space"
            here = {export.what: export.received for export in list(self.stop.exports)}
            reserved = sum(max(size - here.get(name, 0), 0)
                           for name, size in list(self.run.reserved.items()))
            check_space(self.settings.backup_dir, expected, reserved)
            self.outcome.status = "ERROR"
        return expected

    def _make_folder(self):
        moment, tried = datetime.datetime.now(), ""
        while not self.folder:
            name = native(moment.strftime(self.settings.backup_dir_pattern))
            if name != tried:  # a pattern may have no seconds
                with contextlib.suppress(FileExistsError):  # two at once, or a clock set back
                    os.mkdir(os.path.join(self.vm_dir, name), 0o700)
                    self.folder = os.path.join(self.vm_dir, name)
            tried = name
            moment += datetime.timedelta(seconds=1)
        self._write_file(UNFINISHED, "", listed=False)
        self.log("new backup folder %s" % self.folder)

    def _discard(self):
        """After a failure: our unfinished folder goes, what was there before stays."""
        if self.folder and not self.outcome.folder:
            self._try_remove(self.folder)
        if self.made_vm_dir:
            with contextlib.suppress(OSError):
                os.rmdir(self.vm_dir)  # succeeds on an empty folder only

    # --- snapshot and export ---

    def _export_vm(self, expected):
        self.outcome.status = "SNAPSHOT-FAIL"
        snapshot = self._snapshot_vm([disk.ref for disk in self.disks if disk.left_out])
        try:
            self.stop.check()
            self.outcome.status = "TEMPLATE-PARAM-SET-FAIL"
            record = self._mark("VM", snapshot)
            if record["is_a_template"]:  # or an import of the XVA would give a template
                self.xapi.call("VM.set_is_a_template", snapshot, False)
            if record.get("ha_restart_priority"):
                self.xapi.call("VM.set_ha_restart_priority", snapshot, "")
            self.outcome.status = "VM-EXPORT-FAIL"
            disks = self._disks_of(record)
            self._check_disks(disks)
            self._metadata(record, [disk for disk in disks if not disk.left_out])
            for disk in disks:
                if disk.left_out:  # a host before 21.4.0, which cannot leave a disk out itself
                    if not disk.vdi["is_a_snapshot"]:
                        raise BackupError("disk %s cannot be left out on this host" % disk.label)
                    self._insist("VDI.destroy", disk.ref)
            query = {"ref": snapshot}
            if self.settings.compress != "False":
                query["use_compression"] = "zstd" if self.settings.compress == "zstd" else "true"
            uuids = [disk.vdi["uuid"] for disk in disks if not disk.left_out]
            self._stream("/export", query, make_checker(self.file_name, uuids=uuids), expected)
        finally:
            self._destroy("VM", snapshot, self.vm_ref)

    def _check_disks(self, disks):
        """Raises BackupError if the snapshot's disks are not those that the VM had before it."""
        taken = {disk.vbd["userdevice"] for disk in disks}
        lost = [d.label for d in self.disks if not d.left_out and d.vbd["userdevice"] not in taken]
        if lost:
            raise BackupError("the snapshot lacks the disk %s: somebody removed it meanwhile"
                              % ", ".join(lost))

    def _snapshot_vm(self, left_out):
        arguments = [self.vm_ref, "RESTORE_" + self.choice.name]
        try:
            try:
                options = [left_out] if left_out else []
                ref = self.xapi.run_task(self.stop, "VM.snapshot", *(arguments + options))
            except XapiError as error:
                if error.code != "MESSAGE_PARAMETER_COUNT_MISMATCH" or not left_out:
                    raise
                ref = self.xapi.run_task(self.stop, "VM.snapshot", *arguments)
        except BackupError:
            # Whether it came to be is unknown if the connection broke: look, and clean up.
            with contextlib.suppress(BackupError):
                self.vm = self.xapi.call("VM.get_record", self.vm_ref)
                self._remove_leftover_snapshots()
            raise
        self.log("snapshot RESTORE_%s taken" % self.choice.name)
        return ref

    def _vdi_snapshot_name(self, disk):
        return ("SNAP_%s_%s" % (self.choice.name, disk.vdi["name_label"])).replace(" ", "-")

    def _export_vdi(self, expected):
        self.outcome.status = "ERROR xvda-uuid not found"
        disk = first_disk(self.disks)
        if disk is None:
            raise BackupError("the VM has no first disk (xvda, hda, sda or userdevice 0)")
        if disk.left_out:
            raise BackupError("its first disk is marked [NOBAK]")
        self.outcome.status = "VDI-SNAPSHOT-FAIL"
        snapshot = self._snapshot_vdi(disk)
        try:
            self.outcome.status = "VDI-PARAM-SET-FAIL"
            record = self._mark("VDI", snapshot)
            self.stop.check()
            self.xapi.call("VDI.set_name_label", snapshot, self._vdi_snapshot_name(disk))
            self.log("snapshot %s taken" % self._vdi_snapshot_name(disk))
            self.outcome.status = "VDI-EXPORT-FAIL"
            self._metadata(self.vm, self.disks)
            query = {"vdi": snapshot, "format": self.settings.vdi_export_format}
            checker = make_checker(self.file_name, int(record["virtual_size"]))
            self._stream("/export_raw_vdi", query, checker, expected)
        finally:
            self._destroy("VDI", snapshot, disk.ref)

    def _snapshot_vdi(self, disk):
        try:
            return self.xapi.run_task(self.stop, "VDI.snapshot", disk.ref, {})
        except BackupError:
            # Not marked yet, one that came to be all the same cannot be told from anybody's.
            with contextlib.suppress(BackupError):
                new = set(self.xapi.call("VDI.get_snapshots", disk.ref))
                new.difference_update(disk.vdi.get("snapshots", []))
                for record in self.xapi.records("VDI", new).values():
                    self.warn("look whether the new snapshot of disk %s is this run's, VDI %s: it"
                              " is left alone" % (disk.label, record["uuid"]))
            raise

    def _mark(self, kind, snapshot):
        """Marks a new snapshot as ours; returns its record."""
        record = self.xapi.call(kind + ".get_record", snapshot)
        if OUR_KEY in record["other_config"]:  # inherited: the VM was restored from such a backup
            self.xapi.call(kind + ".remove_from_other_config", snapshot, OUR_KEY)
        self.xapi.call(kind + ".add_to_other_config", snapshot, OUR_KEY, key_of(record))
        return record

    def _destroy(self, kind, ref, source):
        """Destroys a snapshot that is proved one of `source`, a VM's disks before the VM: so its
        record, by which the next run knows it, is the last to go. A failure is a warning."""
        try:
            record = self.xapi.call(kind + ".get_record", ref)
            if not record["is_a_snapshot"] or record["snapshot_of"] != source:
                raise BackupError("it is not a snapshot of this VM: left alone")
            for pause in DETACH_PAUSES:
                if record.get("current_operations"):
                    time.sleep(pause)
                    record = self.xapi.call(kind + ".get_record", ref)
            if record.get("current_operations"):
                raise BackupError("something else is working on it")
            if kind == "VM":
                vbds = self.xapi.records("VBD", record["VBDs"]).values()
                vdis = [vbd["VDI"] for vbd in vbds if vbd["type"] == "Disk"]
                vdis.append(record.get("suspend_VDI", NULL))
                for vdi_ref, vdi in self.xapi.records("VDI", vdis).items():
                    if vdi["is_a_snapshot"]:
                        self._insist("VDI.destroy", vdi_ref)
            self._insist(kind + ".destroy", ref)
            self.log("snapshot destroyed")
        except Exception as error:
            if getattr(error, "code", "") != "HANDLE_INVALID":
                self.warn("the snapshot %s could not be destroyed, the next run tries again: %s"
                          % (ref, reason_of(error)))

    def _insist(self, method, ref):
        """Destroys again while the host still holds the disk: the export's task ends before dom0
        has let go of it (xen-api#4339)."""
        for pause in DETACH_PAUSES + (None,):
            try:
                self.xapi.call(method, ref)
                return
            except XapiError as error:
                if error.code == "HANDLE_INVALID":
                    return
                again = ("VDI_IN_USE", "OTHER_OPERATION_IN_PROGRESS", "CONNECTION_LOST")
                if pause is None or error.code not in again:
                    raise
                time.sleep(pause)

    def _stream(self, path, query, checker, expected):
        """Streams into NAME.xva.partial, checks while it comes, asks the task, publishes."""
        partial = os.path.join(self.folder, native(self.file_name + ".partial"))
        self.log("%s begins, about %s to expect" % (self.choice.kind, size_text(expected)))
        export = Export(self.xapi, self.stop, path, query, self.choice.name, expected)
        saved = save(export, partial, checker)
        if not saved.task_known:
            if ZstdFrameCheck.unproved in saved.checks:
                raise BackupError("the host lost the task, and without the command zstd nothing"
                                  " else proves the archive whole: install zstd")
            self.warn("the host lost the task: only the check of the archive vouches for it")
        self.log("export proved whole: HTTP 200, %s" % ", ".join(saved.checks))
        outcome = self.outcome
        outcome.checks, outcome.bytes, outcome.file = saved.checks, saved.size, self.file_name
        self._publish(partial, saved.digest)

    def _publish(self, partial, digest):
        """Turns a proved export into a backup. The marker is renamed into place last of all."""
        os.rename(partial, os.path.join(self.folder, native(self.file_name)))
        lines = []
        for file, value in [(self.file_name, digest)] + self.sums:
            escaped = file.replace("\\", "\\\\")  # as sha256sum does
            lines.append("%s%s  %s\n" % ("\\" if escaped != file else "", value, escaped))
        self._write_file("SHA256SUMS", "".join(lines), listed=False)
        for base, _folders, _files in os.walk(self.folder):
            sync_folder(base)
        existing = backups(list_folders(self.vm_dir, self.run.patterns))
        newest = existing[-1].created if existing else 0
        created = max(int(time.time()), int(newest) + 1)  # rises even if the clock was set back
        unfinished = os.path.join(self.folder, UNFINISHED)
        with open(unfinished, "w", encoding="ascii") as file:
            file.write("created=%d\n" % created)
            file.flush()
            os.fsync(file.fileno())
        os.rename(unfinished, os.path.join(self.folder, "success"))
        self.outcome.folder = self.folder
        for path in (self.folder, self.vm_dir, self.settings.backup_dir):
            sync_folder(path)
        self.log("*** success: %s : %s" % (self.file_name, size_text(self.outcome.bytes)))

    # --- metadata ---

    def _write_file(self, name, text, listed=True):
        data = utf8(text)
        path = os.path.join(self.folder, native(name))
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with open(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(fd)
        if listed:
            self.sums.append((name, hashlib.sha256(data).hexdigest()))

    def _write_cfg(self, name, record, keys, more):
        """A .cfg file: these keys of an API record, in this order, then `more` pairs."""
        lines = []
        for key, value in [(key, record.get(key, "")) for key in keys] + more:
            value = str(value).replace("\\", "\\\\").replace("\r", "\\r").replace("\n", "\\n")
            lines.append("%s=%s\n" % (key, value))
        self._write_file(name, "".join(lines))

    def _make_subfolder(self, name):
        os.mkdir(os.path.join(self.folder, native(name)), 0o700)
        return name

    def _metadata(self, vm, disks):
        """Writes vm-metadata.xml and the .cfg files: values of `vm` and `disks` (the snapshot's,
        or the VM's own for vdi-export), uuids of the originals."""
        try:
            self._write_file("vm-metadata.xml", self._fetch_ova())
        except BackupError as error:
            self.stop.check()
            self.warn("no vm-metadata.xml: %s" % error)
        guests = (vm.get("guest_metrics", NULL), self.vm.get("guest_metrics", NULL))
        guest = next(iter(self.xapi.records("VM_guest_metrics", guests).values()), {})
        os_version = re.split(r"[|;]", guest.get("os_version", {}).get("name", ""))[0].strip()
        left_out = ["%s: %s" % (d.label, d.vdi["name_label"]) for d in self.disks if d.left_out]
        own = [("base_template_name", vm["other_config"].get("base_template_name", "")),
               ("os_version", os_version), ("orig_uuid", self.vm["uuid"])]
        own += [("disks_left_out", ", ".join(left_out))] if left_out else []
        keys = ("name_label", "name_description", "memory_dynamic_max", "VCPUs_max",
                "VCPUs_at_startup")
        self._write_cfg("vm.cfg", dict(vm, name_label=self.choice.name), keys, own)
        originals = {disk.vbd["userdevice"]: disk for disk in self.disks}
        srs = self.xapi.records("SR", [disk.vdi["SR"] for disk in disks])
        for disk in disks:
            original = originals.get(disk.vbd["userdevice"], disk)
            folder = self._make_subfolder(folder_name("DISK-" + disk.label))
            unpluggable = original.vbd.get("unpluggable", "")
            more = [("unplugable", unpluggable), ("unpluggable", unpluggable),
                    ("empty", disk.vbd.get("empty", "")), ("orig_uuid", original.vbd["uuid"])]
            self._write_cfg(folder + "/vbd.cfg", disk.vbd,
                            ("userdevice", "bootable", "mode", "type"), more)
            more = [("orig_uuid", original.vdi["uuid"]),
                    ("orig_sr_uuid", srs.get(disk.vdi["SR"], {}).get("uuid", ""))]
            self._write_cfg(folder + "/vdi.cfg", disk.vdi, (
                "name_label", "name_description", "virtual_size", "type", "sharable", "read_only",
            ), more)
        vifs = self.xapi.records("VIF", vm["VIFs"]).values()
        uuids = {vif["device"]: vif["uuid"]
                 for vif in self.xapi.records("VIF", self.vm["VIFs"]).values()}
        networks = self.xapi.records("network", [vif["network"] for vif in vifs])
        if vifs:
            self._make_subfolder("VIFs")
        for vif in vifs:
            name = networks.get(vif["network"], {}).get("name_label", "")
            self._write_cfg(
                "VIFs/%s.cfg" % folder_name("vif-" + vif["device"]),
                dict(vif, network_name_label=name),
                ("device", "network_name_label", "MTU", "MAC", "other_config"),
                [("orig_uuid", uuids.get(vif["device"], vif["uuid"]))])

    def _fetch_ova(self):
        """The ova.xml of the VM's /export_metadata, indented."""
        from xml.dom import minidom

        query, data = {"ref": self.vm_ref, "export_snapshots": "false"}, bytearray()
        with Export(self.xapi, self.stop, "/export_metadata", query, self.choice.name) as export:
            pump(export.readinto, data.extend)
            export.verdict()
        if len(data) % 512 or not data.endswith(bytes(1024)):
            raise BackupError("/export_metadata was cut off")
        try:
            with tarfile.open(fileobj=io.BytesIO(data)) as archive:
                file: Any = archive.extractfile("ova.xml")
                return minidom.parseString(file.read()).toprettyxml("  ")  # noqa: S318
        except Exception as error:  # tarfile and expat raise nearly anything at other bytes
            raise BackupError("/export_metadata gave no ova.xml: %s" % describe(error)) from None


# ============================== what is chosen, and preview ==============================


def candidates(xapi):
    """{ref: record} of the pool's VMs that are neither template, snapshot nor control domain, in
    one call however many there are; the host filters where it can."""
    flags = ("is_a_template", "is_a_snapshot", "is_control_domain")
    records = xapi.where("VM", " and ".join('field "%s"="false"' % flag for flag in flags))
    if not records:  # no such filter on this host, or really no VM
        records = xapi.call("VM.get_all_records")
    return {ref: vm for ref, vm in records.items() if not any(vm.get(flag) for flag in flags)}


def choose(settings, vms, log):
    """Applies the rules to the candidates and logs upstream's block with what came of it. Adds to
    settings.warnings. Returns (Selection, number of chosen VMs that cannot be backed up)."""
    names = collections.defaultdict(list)
    for ref, vm in vms.items():
        names[vm["name_label"]].append(ref)
    with time_limit(REGEX_TIMEOUT, "ERROR - a regular expression of vm-, vdi-export or exclude"
                    " takes too long: nested repetitions like (a+)+ need exponential time"):
        selection = select(settings.rules, names)
    log("VmBackup.py running with these settings:")
    for key in ("backup_dir", "status_log", "compress", "max_backups", "vdi_export_format",
                "pool_db_backup"):
        log("  %-17s = %s" % (key, getattr(settings, key)))
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
    if settings.rules and not selection.choices:
        hint = "" if settings.config_file else " (and there is no config file of that name)"
        settings.warnings.append("***WARNING - no VM was chosen: nothing to back up" + hint)
    for line in settings.notes + settings.warnings:
        log(line)
    missing = [choice.name for choice in selection.choices if not choice.refs]
    twice = [choice.name for choice in selection.choices if len(choice.refs) > 1]
    if missing:
        log("ERROR - vm(s) List does not exist: %s" % " ".join(missing))
    for name in twice:
        log("*** ERROR: duplicate VM name found: %s" % name)
    return selection, len(missing) + len(twice)


def preview_vms(settings, xapi, vms, selection, log):
    """What a run would do with each VM, in a number of calls that does not depend on the pool.
    Adds to settings.warnings; returns the number of VMs that could not be backed up."""
    log("VMs-not-in-backup: %s" % ", ".join(selection.left))
    chosen = [choice for choice in selection.choices if len(choice.refs) == 1]
    if not chosen:
        return 0
    refs = [choice.refs[0] for choice in chosen]
    few, vbds = len(refs) <= 50, collections.defaultdict(list)
    wanted = [vbd for ref in refs for vbd in vms[ref]["VBDs"]]
    found = xapi.records("VBD", wanted) if few else xapi.call("VBD.get_all_records")
    for vbd in found.values():
        vbds[vbd["VM"]].append(vbd)
    used = [vbd["VDI"] for ref in refs for vbd in vbds[ref]]
    vdis = xapi.records("VDI", used) if few else xapi.call("VDI.get_all_records")
    pbds = xapi.call("PBD.get_all_records").values()
    plugged = {pbd["SR"] for pbd in pbds if pbd["currently_attached"]}
    bad = total = 0
    for choice, ref in zip(chosen, refs):
        for vbd in vbds[ref]:
            vdi = vdis.get(vbd["VDI"])
            if vbd["type"] == "CD" and vdi and vdi["SR"] not in plugged:
                settings.warnings.append(
                    "***WARNING - %s: the ISO %s in its drive is on a storage repository that is"
                    " not attached, so the export will fail: xe vm-cd-eject"
                    % (choice.name, vdi["name_label"]))
                log(settings.warnings[-1])
        try:
            total += _preview_vm(settings, choice, vms[ref], list_disks(vbds[ref], vdis), log)
        except (OSError, BackupError) as error:
            log("***ERROR - %s: %s" % (choice.name, describe(error)))
            bad += 1
    free = shutil.disk_usage(settings.backup_dir).free
    hint = "" if total <= free else ": the last ones may not fit"
    log("together about %s to expect, %s free%s" % (size_text(total), size_text(free), hint))
    return bad


def _preview_vm(settings, choice, vm, disks, log):
    """One VM's lines; returns the bytes to expect, raises what the run would."""
    vm_dir = os.path.join(settings.backup_dir, native(folder_name(choice.name)))
    patterns = [settings.backup_dir_pattern, DEFAULT_PATTERN]
    folders = list_folders(vm_dir, patterns) if os.path.isdir(vm_dir) else []
    keep = choice.keep or settings.max_backups
    doomed = expired(folders + [Folder("the new one", float("inf"), "success", False)], keep)
    last = last_size(vm_dir, folders, export_file(settings, choice))
    expected = expected_size(choice.kind, settings, disks, last)
    shown = []
    for disk in disks:
        size = size_text(int(disk.vdi["virtual_size"]))
        shown.append("%s %s%s" % (disk.label, size, " left out [NOBAK]" if disk.left_out else ""))
    simple = choice.rule.simple
    log("%s: %s, chosen by %s; %s; disks: %s; about %s to expect" % (
        choice.name, choice.kind, "its name" if simple else "%s=%s" % choice.rule[:2],
        vm["power_state"].lower(), ", ".join(shown) or "none", size_text(expected)))
    why = "the oldest beyond %d" % keep
    text = "would delete %s (%s)" % (", ".join(doomed), why) if doomed else "would delete none"
    log("%s: has %d backups, keeps %d, %s" % (choice.name, len(backups(folders)), keep, text))
    for item in folders:
        if item.created is not None and not item.marker and item.partial:
            log("%s: would remove the unfinished backup %s" % (choice.name, item.name))
    if not simple and choice.rule.name == choice.name:
        log("NOTE - %s: not a simple name but a regular expression, it may match others too"
            % choice.name)
    if choice.kind == "vdi-export" and (first_disk(disks) is None or first_disk(disks).left_out):
        raise BackupError("the VM has no first disk that may be exported")
    if os.path.islink(vm_dir):
        raise BackupError("%s is a symbolic link: refused" % vm_dir)
    if os.path.exists(vm_dir) and not os.path.isdir(vm_dir):
        raise BackupError("%s is not a folder" % vm_dir)
    if settings.space_check:
        check_space(settings.backup_dir, expected)
    return expected


# ============================== the run ==============================

POOL_DUMP = re.compile(r"pool_db_\d{8}-\d{6}\.dump(\.partial)?\Z")


def status_word(exit_status):
    """What the status log, mail and report_json call a run that ended so."""
    return {0: "SUCCESS", 1: "WARNING"}.get(exit_status, "ERROR")


def short_host_name():
    return socket.gethostname().split(".")[0]


class Run:
    """One run of the program, and what its VMs share; filled while it goes on, for the reports.

    log: function(text). status: function(program, *texts), the status log. progress: function(open
    Exports), called once a second.
    """

    def __init__(self, settings, log, status, progress):
        self.settings, self.log, self.status = settings, log, status
        self.stop = Stop()
        self.watch = Watch(self.stop, progress)
        self.patterns = list(dict.fromkeys([settings.backup_dir_pattern, DEFAULT_PATTERN]))
        self.start, self.begin = datetime.datetime.now(), time.monotonic()
        self.host = self.pool = ""
        self.exit_status, self.error, self.begun = 3, None, False
        self.outcomes = []
        self.reserved = {}  # bytes to expect of the VMs that are being exported

    def execute(self, hosts, credentials, preview):
        """Connects, chooses, and previews or backs up. Returns the exit status."""
        settings, log = self.settings, self.log
        new_xapi = functools.partial(Xapi, hosts, credentials, log)
        xapi = new_xapi()
        if not settings.tls_verify:
            log("***WARNING - tls_verify=False: the host's certificate is not checked")
        try:
            self.stop.waiting = xapi
            xapi.connect()
            self.stop.check()
            pool = next(iter(xapi.call("pool.get_all_records").values()))
            self.host, self.pool = str(xapi.endpoint), pool.get("name_label", "")
            vms = candidates(xapi)
            self.stop.check()
            selection, bad = choose(settings, vms, log)
            if not preview:
                return self._back_up(xapi, new_xapi, selection.choices)
            bad += preview_vms(settings, xapi, vms, selection, log)
            self.stop.check()
            if bad:
                log("ERROR preview parameters: %d VM(s) could not be backed up (see above)" % bad)
                return 2
            found = " - WARNINGS found (see above)" if settings.warnings else ""
            log("SUCCESS preview parameters" + found)
            return 1 if settings.warnings else 0
        except ConnectionLost:
            self.stop.check()  # perhaps it was a signal that broke it off
            raise
        finally:
            self.watch.end()
            xapi.close()

    def _back_up(self, xapi, new_xapi, choices):
        """Backs up the pool database if asked, then the VMs; outcomes in the order of choices."""
        self.stop.waiting = None
        check_writable(self.settings.backup_dir)
        self.log("VmBackup running on %s, pool %s, host %s"
                 % (short_host_name(), self.pool, self.host))
        self.begun = True
        self.watch.start()
        self.status("vmbackup.py", "begin")
        self.log("Space before backups: %s" % self._space())
        if self.settings.pool_db_backup:
            self.outcomes.append(self._back_up_pool_db(xapi))
        self._back_up_vms(xapi, new_xapi, choices)
        self.log("Space after backups: %s" % self._space())
        tally = "S:%d W:%d E:%d" % self.counts()
        self.status("vmbackup.py", "end", status_word(self._verdict()), tally)
        code = self._verdict()  # once more: that line too may have been the first that failed
        text = {0: "Success", 1: "**WARNING(s)**"}.get(code, "**ERRORS DETECTED**")
        self.log("VmBackup ended - %s - %s" % (text, tally))
        return code

    def _back_up_vms(self, xapi, new_xapi, choices):
        """Backs up the VMs, `parallel` at a time; tells of each what came of it at once, but in the
        order of choices."""
        idle = [new_xapi() for _ in range(self.settings.parallel - 1)] + [xapi]
        ended, untold, turn = {}, collections.deque(range(len(choices))), threading.Lock()

        def work(number):
            if self.stop.signum:
                return
            choice, mine = choices[number], idle.pop()
            self.status(choice.kind, "begin", choice.name)
            try:
                ended[number] = outcome = VmBackup(self, mine, choice).back_up()
            finally:
                idle.append(mine)
            self.status(choice.kind, "end", self._end_text(outcome))
            with turn:
                while untold and untold[0] in ended:
                    self._tell(ended[untold.popleft()])

        try:
            with ThreadPoolExecutor(len(idle)) as pool:
                futures = [pool.submit(work, number) for number in range(len(choices))]
                # Only this thread handles signals, and blocked for long it may sleep past one.
                while wait(futures, timeout=0.2).not_done:
                    pass
            for number in filter(ended.get, untold):  # after a VM that a signal left untouched
                self._tell(ended[number])
            for future in futures:
                future.result()
        finally:
            for each in idle:
                each.close()

    def _back_up_pool_db(self, xapi):
        """Dumps the pool's database to METADATA_SERVER/pool_db_YYYYMMDD-HHMMSS.dump and keeps the
        max_backups newest. Returns the Outcome."""
        outcome = Outcome("pool-db", "METADATA_" + short_host_name())
        backup_dir, own = self.settings.backup_dir, folder_name(outcome.name)
        folder = os.path.join(backup_dir, native(own))
        with outcome.recorded(), Lock(backup_dir, own):
            if os.path.islink(folder):
                raise BackupError("%s is a symbolic link: refused" % folder)
            with contextlib.suppress(FileExistsError):
                os.mkdir(folder, 0o700)
            moment, name = datetime.datetime.now(), ""
            while not name or os.path.lexists(os.path.join(folder, name)):
                name = moment.strftime("pool_db_%Y%m%d-%H%M%S.dump")
                moment += datetime.timedelta(seconds=1)
            dumps = [item for item in sorted(os.listdir(folder)) if POOL_DUMP.match(item)]
            for item in dumps:
                if item.endswith(".partial"):
                    os.unlink(os.path.join(folder, item))
            path = os.path.join(folder, name)
            export = Export(xapi, self.stop, "/pool/xmldbdump", {}, "database dump", 0,
                            xapi.master())
            try:
                saved = save(export, path + ".partial", DatabaseCheck())
                os.rename(path + ".partial", path)
            finally:
                with contextlib.suppress(OSError):
                    os.unlink(path + ".partial")
            sync_folder(folder)
            outcome.folder, outcome.file = folder, name
            outcome.bytes, outcome.checks = saved.size, saved.checks
            self.log("pool database saved: %s, %s" % (name, size_text(outcome.bytes)))
            dumps = [item for item in dumps if item.endswith(".dump")]
            for item in dumps[: max(len(dumps) + 1 - self.settings.max_backups, 0)]:
                os.unlink(os.path.join(folder, item))
                outcome.pruned.append(item)
        if outcome.error:
            self.log("***ERROR - pool database backup failed: %s" % outcome.error)
        return outcome

    def _end_text(self, outcome):
        """The last field of a VM's line in the status log."""
        if outcome.error:
            return "%s %s" % (outcome.status, outcome.name)
        return "%s %s,elapse:%d size:%dG" % (
            outcome.result, outcome.name, outcome.seconds // 60, outcome.bytes // (1 << 30))

    def _tell(self, outcome):
        self.outcomes.append(outcome)
        text = "***ERROR*** %s" % outcome.error
        if not outcome.error:
            word = "WARNING" if outcome.warnings else "Success"
            text = "***%s*** t:%d" % (word, outcome.seconds // 60)
        self.log("VmBackup %s %s - %s" % (outcome.kind, outcome.name, text))

    def _space(self):
        path = self.settings.backup_dir
        try:
            figures = tuple(map(size_text, shutil.disk_usage(path)))
        except OSError as error:
            return describe(error)
        return "%s total %s, used %s, free %s" % ((path,) + figures)

    def counts(self):
        """(S, W, E): E counts the pool database too."""
        failed = [item for item in self.outcomes if item.error]
        vms = [item for item in self.outcomes if not item.error and item.kind != "pool-db"]
        warned = [item for item in vms if item.warnings]
        return len(vms) - len(warned), len(warned), len(failed)

    def _verdict(self):
        """0 all good, 1 warnings, 2 errors, 4 if all that was to be done was locked, 128+n."""
        if self.stop.signum:
            return 128 + self.stop.signum
        if any(item.error for item in self.outcomes):
            return 4 if all(item.locked for item in self.outcomes) else 2
        return 1 if self.settings.warnings or any(item.warnings for item in self.outcomes) else 0


def check_writable(path):
    """Raises ConfigError unless a file can be made in backup_dir (it leaves none)."""
    import tempfile

    try:
        tempfile.TemporaryFile(dir=path, prefix=".vmbackup-").close()
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):  # that is for each VM to say
            raise ConfigError("ERROR - backup_dir is not writable: %s" % describe(error)) from None


# ============================== verify ==============================


def verify(top, only, log):
    """Proves every marked backup below `top` (backup_dir, a VM's folder or one backup) at rest:
    checksums, archive, metadata. Reads only. Returns 0, or 2 if one is damaged or none is there."""
    good = bad = 0
    for folder in marked_folders(top):
        vm = os.path.basename(os.path.dirname(folder))
        if only is not None and vm != native(folder_name(only)):
            continue
        label = "VmBackup verify %s/%s" % (vm, os.path.basename(folder))
        try:
            log("%s - ***Success*** %s" % (label, ", ".join(verify_folder(folder))))
            good += 1
        except (OSError, BackupError) as error:
            pruned = os.path.exists(os.path.join(folder, UNFINISHED))  # by a run, meanwhile
            if os.path.isdir(folder) and not pruned:
                log("%s - ***ERROR*** %s" % (label, describe(error)))
                bad += 1
    if not good + bad:
        log("ERROR - no marked backup%s in %s" % (" of %s" % only if only else "", top))
    fine = good and not bad
    text = "Success" if fine else "**ERRORS DETECTED**"
    log("VmBackup verify ended - %s - S:%d W:0 E:%d" % (text, good, bad))
    return 0 if fine else 2


def marked_folders(top, depth=2):
    """Paths of the folders with a marker, `top` itself or up to `depth` levels below, sorted; and
    of those that cannot be read, for whoever opens them to find out why."""
    # A VM may be called `success` too.
    if any(os.path.isfile(os.path.join(top, marker)) for marker in MARKERS):
        return [top]
    if not depth:
        return []
    try:
        with os.scandir(top) as entries:
            inner = [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
    except OSError as error:
        none = isinstance(error, FileNotFoundError) or os.path.basename(top) == "lost+found"
        return [] if none else [top]
    return sorted(itertools.chain(*[marked_folders(path, depth - 1) for path in inner]))


def verify_folder(folder):
    """Phrases that tell what was proved about one backup; raises ArchiveError or OSError."""
    exports = [name for name in os.listdir(folder) if EXPORT.match(name)]
    if len(exports) != 1:
        raise ArchiveError("%d exports in the folder, one belongs there" % len(exports))
    export, path = exports[0], os.path.join(folder, exports[0])
    sums = read_sums(os.path.join(folder, "SHA256SUMS"))
    ours = any(read_start(os.path.join(folder, marker), 8) == b"created=" for marker in MARKERS)
    if (sums or ours) and not {export, "vm.cfg"} <= set(sums):
        raise ArchiveError("SHA256SUMS does not list %s and vm.cfg" % export)
    size, proved = recorded_size(folder), []
    if size is None and export.endswith(".raw"):
        size, proved = os.path.getsize(path), ["NOT its size (no vdi.cfg tells it)"]
    checker, digest = make_checker(export, size), hashlib.sha256()
    with open(path, "rb", buffering=0) as file, contextlib.closing(checker):
        pump(file.readinto, digest.update, checker.feed)
        proved = checker.finish() + proved
    for name, value in sums.items():
        mine = digest.hexdigest() if name == export else file_sha256(os.path.join(folder, name))
        if mine != value:
            raise ArchiveError("%s does not match SHA256SUMS" % name)
    return ["sha256 of %d files" % len(sums) if sums else "NOT sha256 (no SHA256SUMS)"] + proved


def read_sums(path):
    """{file name: SHA-256} of a SHA256SUMS file, empty if there is none (3.25 wrote none)."""
    sums = {}
    with contextlib.suppress(FileNotFoundError), open(
            path, encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        for line in file:
            match = re.match(r"(\\?)([0-9a-f]{64}) [ *](.+)\n\Z", line)
            if not match:
                raise ArchiveError("SHA256SUMS is damaged")
            escaped, value, name = match.groups()
            sums[native(name.replace("\\\\", "\\") if escaped else name)] = value
    return sums


def file_sha256(path):
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


def recorded_size(folder):
    """virtual_size in bytes of the first disk as its vdi.cfg tells it, or None."""
    for label in ("xvda", "hda", "sda", "0"):
        path = os.path.join(folder, "DISK-" + label, "vdi.cfg")
        with contextlib.suppress(OSError), open(path, encoding="utf-8", errors="replace") as file:
            told = re.search(r"^virtual_size=(\d+)$", file.read(), re.MULTILINE)
            return int(told.group(1)) if told else None
    return None


# ============================== reporting ==============================


class Log:
    """Lines `YYYY-MM-DD-(HH:MM:SS) - text` on standard output, whole and in UTF-8 whatever the
    locale, from any thread; and on a terminal a progress line that rewrites itself."""

    def __init__(self, out, err, environment):
        self.lines = []
        self._out, self._err, self._lock = out, err, threading.Lock()
        self._shown, self._told = "", time.monotonic()
        rich = environment.get("TERM", "dumb") != "dumb" and not environment.get("NO_COLOR")
        self._colour = rich and is_terminal(out)
        self._live, self._plain = rich and is_terminal(err), not is_terminal(err)

    def __call__(self, text):
        stamp = datetime.datetime.now().strftime("%Y-%m-%d-(%H:%M:%S)")
        line = "%s - %s" % (stamp, printable(str(text)))
        with self._lock:
            self.lines.append(line)
            self._show("")
            colour = "31" if "ERROR" in line else "33" if "WARNING" in line else ""
            if self._colour and colour:
                line = "\x1b[%sm%s\x1b[0m" % (colour, line)
            write_text(self._out, line + "\n")

    def _show(self, text):
        if self._shown or text:
            write_text(self._err, "\r\x1b[K" + text)
            self._shown = text

    def close(self):
        """What can't be written any more is given up here, or Python would exit with 120 for it."""
        for stream in (self._out, self._err):
            try:
                stream.flush()
            except (OSError, ValueError, AttributeError):
                with contextlib.suppress(OSError, ValueError, AttributeError):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())

    def progress(self, exports):
        """Called once a second with the open Exports."""
        told = [self._progress_of(export) for export in exports]
        if self._live:
            with self._lock, contextlib.suppress(OSError):
                columns = os.get_terminal_size(self._err.fileno()).columns or 80
                self._show(fit("  |  ".join(told), columns - 1))
        elif self._plain and told and time.monotonic() - self._told > PROGRESS_EVERY:
            self._told = time.monotonic()
            for text in told:
                self("progress %s" % text)

    @staticmethod
    def _progress_of(export):
        rate = export.received / max(time.monotonic() - export.started, 0.001)
        expected = max(export.size, export.received)
        if export.progress > 0.02:
            expected = export.received / min(export.progress, 1)
        left = (expected - export.received) / rate if rate else 0
        return "%s: %d of about %d MiB, %.0f MB/s, %d:%02d left" % (
            printable(export.what), export.received // MIB, expected // MIB, rate / 1e6,
            left // 60, left % 60)


PROGRESS_EVERY = 300  # seconds between the progress lines where there is no terminal


def is_terminal(stream):
    return stream is not None and not stream.closed and stream.isatty()


def fit(text, columns):
    """As much of the beginning of a text as a terminal shows in so many columns."""
    for end, char in enumerate(text):
        columns -= 2 if unicodedata.east_asian_width(char) in "WF" else 1
        if columns < 0:
            return text[:end]
    return text


def write_text(stream, text):
    """Writes UTF-8 at once; a reader that went away stops no backup."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        getattr(stream, "buffer", stream).write(text.encode("utf-8"))
        stream.flush()


def make_status(path, log, warnings):
    """The function that appends a line to the status log (none if path is None) and flushes it.
    The first failure is logged and added to `warnings`."""
    lock, server, failed = threading.Lock(), short_host_name(), []

    def status(program, *texts):
        if path is None:
            return
        stamp = datetime.datetime.now().strftime("%Y/%m/%d %H:%M:%S")
        line = printable(",".join((stamp, program, server) + texts)) + "\n"
        try:
            with lock:
                append_shared(path, line.encode("utf-8"))
        except OSError as error:
            if not failed:
                failed.append("***WARNING - the status log cannot be written: %s" % describe(error))
                warnings.append(failed[0])
                log(failed[0])

    return status


def append_shared(path, data):
    """Adds to a file that monitors of other users read: 0644 when it is new, whatever the umask."""
    new = not os.path.exists(path)
    with open(path, "ab") as file:
        if new:
            os.fchmod(file.fileno(), 0o644)
        file.write(data)
        file.flush()
        sync(file.fileno())


def replace_file(path, data, shared=False):
    """Replaces a file, or makes it, by a rename; after an OSError it is what it was before. Its
    mode is 0600, or 0644 if it is shared."""
    import tempfile

    fd, temporary = tempfile.mkstemp(prefix=".vmbackup-", dir=os.path.dirname(path) or ".")
    try:
        with open(fd, "wb") as file:
            if shared:
                os.fchmod(fd, 0o644)
            file.write(data)
            file.flush()
            sync(fd)
        os.rename(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def report(run):
    """The object of report_json; the README describes it."""
    return {
        "version": __version__, "server": short_host_name(), "host": run.host, "pool": run.pool,
        "start": run.start.isoformat(), "end": datetime.datetime.now().isoformat(),
        "seconds": round(time.monotonic() - run.begin, 3),
        "status": status_word(run.exit_status), "exit_status": run.exit_status, "error": run.error,
        "counts": dict(zip(("success", "warning", "error"), run.counts())),
        "warnings": run.settings.warnings,
        "vms": [{
            "name": item.name, "uuid": item.uuid, "kind": item.kind, "status": item.result,
            "folder": item.folder, "file": item.file, "bytes": item.bytes,
            "seconds": round(item.seconds, 3),
            "mb_per_second": round(item.bytes / 1e6 / max(item.seconds, 0.001), 1),
            "checks": item.checks, "warnings": item.warnings, "error": item.error,
            "pruned": item.pruned,
        } for item in run.outcomes],
    }


def write_json(run):
    """Replaces report_json atomically."""
    text = json.dumps(report(run), indent=2, ensure_ascii=False) + "\n"
    # What stands for a path's bytes in an ASCII locale becomes those bytes again.
    data = text.encode("utf-8", "surrogateescape")
    replace_file(os.path.realpath(run.settings.report_json), data, shared=True)


def send_mail(run, lines):
    """Mails the report, in three tries. Raises OSError (smtplib's errors are) if it can't."""
    import smtplib
    from email.message import EmailMessage

    settings, message, word = run.settings, EmailMessage(), status_word(run.exit_status)
    server = socket.gethostname()  # as in upstream's subject, for those who filter by it
    message["Subject"] = printable("%s %s VmBackup.py, pool %s at %s"
                                   % (word, server, run.pool, run.host))
    message["From"], message["To"] = settings.mail_from, ", ".join(settings.mail_to)
    body = ["VmBackup on %s, pool %s, host %s" % (short_host_name(), run.pool, run.host)]
    body.append("%s - S:%d W:%d E:%d" % ((word,) + run.counts()))
    body += [run.error] if run.error else []
    failed = [item for item in run.outcomes if item.error]
    body += ["%s %s: %s" % (item.kind, item.name, item.error) for item in failed]
    message.set_content("\n".join([printable(line) for line in body] + [""] + lines) + "\n")
    context = ssl.create_default_context()
    if is_loopback(settings.smtp_server):
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    connect: Any = smtplib.SMTP
    if settings.smtp_port == 465:
        connect = functools.partial(smtplib.SMTP_SSL, context=context)
    for left in (2, 1, 0):
        try:
            with connect(settings.smtp_server, settings.smtp_port, timeout=60) as smtp:
                if settings.smtp_starttls:
                    smtp.starttls(context=context)
                if settings.smtp_user:
                    password = read_password_file(settings.smtp_password_file, plain=True)
                    smtp.login(settings.smtp_user, password)
                # Python 3.6's send_message tears names that are not ASCII.
                smtp.sendmail(settings.mail_from, settings.mail_to, message.as_string())
            return
        except OSError:
            if not left or run.stop.signum:
                raise
            run.stop.sleep(5)


def read_file(path):
    """The bytes of a config or password file: not many more than a config file may have."""
    try:
        with open(path, "rb") as file:
            return file.read(MIB + 1)
    except OSError as error:
        raise ConfigError("ERROR - cannot read %s" % describe(error)) from None


def read_password_file(path, plain=False):
    """The password in a file made by create-password-file; plain: or else the file's text."""
    data = read_file(path).strip()
    try:
        return base64.b64decode(data or b"-", validate=True).decode("utf-8")  # empty is none either
    except ValueError:
        if plain:
            return data.decode("utf-8", "replace")
        raise ConfigError("ERROR - %s is a file, but no password file: see create-password-file"
                          % path) from None


def send_reports(run):
    """Writes and mails what the settings ask for. A failure here is a warning, no more."""
    settings, log = run.settings, run.log
    mailing = settings.mail_to and settings.mail_from and settings.smtp_server
    when = {"always": True, "problems": run.exit_status != 0, "never": False}
    try:
        if settings.report_json:
            write_json(run)
    except OSError as error:
        log("***WARNING - report_json cannot be written: %s" % describe(error))
    try:
        if mailing and when[settings.mail_when]:
            send_mail(run, list(log.lines))
            log("mail sent to %s" % ", ".join(settings.mail_to))
    except Exception as error:  # the email package raises nearly anything at odd addresses
        log("***WARNING - the mail could not be sent: %s" % describe(error))


# ============================== the command line ==============================

USAGE = """\
Usage: vmbackup.py <password> <config-file|vm-selector> [preview] [name=value ...]
       vmbackup.py <password> create-password-file=FILE
       vmbackup.py verify <config-file|folder> [vm-name]
       vmbackup.py help | config | example | version
"""

HELP = USAGE + """
<password>     the password itself, or a file made by create-password-file, or
               - (one line of standard input, asked for on a terminal), or
               local (the XAPI socket of this dom0: no password at all)
<config-file>  the usual choice for cron; see: vmbackup.py config
<vm-selector>  one VM name or regular expression, vm-exported by default
    vm-export=SELECTOR   explicit vm-export
    vdi-export=SELECTOR  only the first disk
    SELECTOR:N           keep N backups instead of max_backups
preview        connects, checks and shows what a run would do; changes nothing
verify         proves every backup on disk again; no password, no network, changes nothing

name=value: these settings, in the config file or, overriding it, on the command line:

%s

Exit status: 0 all good, 1 warnings, 2 a VM (or the pool database) failed, 3 nothing was started,
4 another run holds the lock, 128+n stopped by signal n.
"""

CONFIG = """\
# Example config file for vmbackup.py: name=value lines, '#' comments.
# A setting that is not given has the default shown here.

#### settings ####

%s
#### which VMs ####
# Only letters, digits, space, '-' and '_': the name of one VM. Anything else is a regular
# expression, matched from the start of the name. ':N' at the end overrides max_backups.
# Simple names win over regular expressions, later lines over earlier ones, exclude over all.

# exclude selected VMs
#exclude=PROD-WinDomainController
#exclude=TEMP-.*

# vdi-export: only the first disk of a VM whose other disks are too large; see the README
#vdi-export=PROD-with-many-disks

# vm-export: whole VMs (an empty vm-export= means all)
#vm-export=my-vm-name
#vm-export=my-third-vm:3
#vm-export=PROD.*
#vm-export=DEV.*:2
"""

EXAMPLE = """\
# look first: what would be backed up, and where
  vmbackup.py - weekend.cfg preview

# make a password file once, then use it with a config file
  vmbackup.py - create-password-file=/root/vmbackup.pass
  vmbackup.py /root/vmbackup.pass weekend.cfg

# in dom0, without any password
  vmbackup.py local weekend.cfg

# one VM (names are case sensitive), a name with spaces, only its first disk
  vmbackup.py - DEV-mySql
  vmbackup.py - "DEV mySql"
  vmbackup.py - vdi-export=DEV-mySql

# all VMs whose names begin with DEV-my, all VMs of the pool keeping 2 backups of each
  vmbackup.py - 'DEV-my.*'
  vmbackup.py - '.*:2' compress=zstd backup_dir=/mnt/backup host=xen1.example.org

# prove all backups again
  vmbackup.py verify weekend.cfg
"""


def config_text():
    """What `config` prints and example.cfg holds."""
    import textwrap

    parts = []
    for item in SETTINGS:
        about = textwrap.fill(item.about, 96, initial_indent="# ", subsequent_indent="# ")
        parts.append("%s\n#%s=%s\n" % (about, item.name, item.default))
    return CONFIG % "\n".join(parts)


def help_text():
    import textwrap

    lines = []
    for item in SETTINGS:
        about = "%s (default: %s)" % (item.about, item.default or "none")
        first = "%-20s" % item.name
        lines += textwrap.wrap(about, 99, initial_indent=first, subsequent_indent=" " * 20)
    return HELP % "\n".join(lines)


TEXTS = {"help": help_text, "config": config_text, "example": lambda: EXAMPLE,
         "version": lambda: "vmbackup.py %s\n" % __version__}


def command(words, log):
    """Carries out a command line, and logs what goes wrong; returns the exit status."""
    try:
        return dispatch(words, log)
    except (Exception, KeyboardInterrupt) as problem:
        stopped = isinstance(problem, KeyboardInterrupt)
        error: Any = Interrupted(signal.SIGINT) if stopped else problem
        log_error(reason_of(error), log)
        return getattr(error, "exit_code", 2)


def dispatch(words, log):
    """Tells the kinds of command lines apart; returns the exit status. Raises BackupError."""
    first = words[0].lower() if words else ""
    if len(words) == 1 and first.lstrip("-") in TEXTS:
        write_text(sys.stdout, TEXTS[first.lstrip("-")]())
        return 0
    if first == "verify":
        return verify_command(words[1:], log)
    if len(words) < 2:
        write_text(sys.stderr, USAGE)
        return 3
    key, separator, value = words[1].partition("=")
    if key.lower() == "create-password-file" and separator:
        if len(words) > 2:
            raise ConfigError("ERROR - invalid parameter %s: create-password-file=FILE stands alone"
                              % words[2])
        return create_password_file(native(value), read_password(words[0], literal=True), log)
    settings, preview = parse_command(words[1], words[2:])
    if os.path.isfile(native(words[0])):
        settings.password_file = native(words[0])
    status = make_status(settings.status_log if settings.config_file else None, log,
                         settings.warnings)
    run = Run(settings, log, status, log.progress)
    try:
        log("VmBackup config loaded from: %s" % words[1] if settings.config_file else
            "VmBackup vm selector: %s (there is no config file of that name)" % words[1])
        check_report(settings)
        local = words[0] == "local"
        hosts = make_hosts(settings, local)
        run.host = ", ".join(map(str, hosts))
        check_packages()
        check_paths(settings)
        credentials = ("root", "") if local else (settings.username, read_password(words[0]))
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signum != signal.SIGHUP or signal.getsignal(signum) != signal.SIG_IGN:  # by nohup
                signal.signal(signum, run.stop.handler)
        run.exit_status = run.execute(hosts, credentials, preview)
    except Exception as error:
        code = getattr(error, "exit_code", 2)
        run.exit_status = 3 if code == 2 and not run.begun else code
        run.error = reason_of(error)
        log_error(run.error, log)
    finally:
        if not preview:
            send_reports(run)
    return run.exit_status


def log_error(text, log):
    for line in text.split("\n"):
        log(line if "ERROR" in line else "ERROR - " + line)


def parse_command(selector, words):
    """(Settings, preview) of the arguments after the password. Raises ConfigError."""
    config, path, pairs, preview = [], native(selector), [], False
    is_config = os.path.isfile(path)
    if is_config:
        config = read_config(read_file(path), path)
    else:
        key, separator, value = selector.partition("=")
        if not re.sub(r":[0-9]+\Z", "", selector).strip():
            raise ConfigError("ERROR - the VM selector is empty: give '.*' for all VMs")
        if separator and (key.lower() in KNOWN or key.lower() == "exclude"):
            raise ConfigError("ERROR - invalid parameter %s: the second argument is a config file"
                              " or a VM selector" % selector)
        explicit = separator and key.lower() in ("vm-export", "vdi-export")
        pair = (key.lower(), value) if explicit else ("vm-export", selector)
        pairs.append(pair + ("command line",))
    for word in words:
        key, separator, value = word.partition("=")
        if word.lower() == "preview":
            preview = True
        elif not separator or key.lower() in RULE_KEYS:
            allowed = "preview, or name=value with one of %s" % ", ".join(KNOWN)
            raise ConfigError("ERROR - invalid parameter %s: allowed are %s" % (word, allowed))
        else:
            pairs.append((key.lower(), value, "command line"))
    settings = make_settings(config, pairs)
    settings.config_file = path if is_config else None
    if not settings.rules and not settings.pool_db_backup:
        raise ConfigError("ERROR - no VMs loaded: %s has no vm-export= or vdi-export=" % selector)
    return settings, preview


def check_packages():
    """Raises ConfigError where one of the two packages is missing: in dom0 they may be."""
    for module in ("XenAPI", "requests"):
        if importlib.util.find_spec(module) is None:
            raise ConfigError("ERROR - the Python package %s is missing: pip install %s, or use"
                              " vmbackup.pyz, which carries it" % (module, module))


def check_paths(settings):
    """Raises ConfigError for a folder or file of the settings that cannot be used."""
    path = settings.backup_dir
    if not os.path.isdir(path):
        raise ConfigError("ERROR - backup_dir does not exist: %s (is the share mounted?)" % path)
    if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
        raise ConfigError("ERROR - backup_dir is not writable: %s" % path)
    for key in ("report_json", "status_log") if settings.config_file else ("report_json",):
        file = getattr(settings, key)
        if file and (os.path.isdir(file) or not os.path.isdir(os.path.dirname(file) or ".")):
            raise ConfigError("ERROR - %s=%s: give a file in a folder that exists" % (key, file))
    if settings.config_file:
        check_target(settings, "status_log", settings.status_log, "be written into")
    for key in ("tls_ca", "smtp_password_file"):
        file = getattr(settings, key)
        if file and not (os.path.isfile(file) and os.access(file, os.R_OK)):
            raise ConfigError("ERROR - %s=%s: there is no such file to read" % (key, file))
    if settings.tls_ca:
        try:
            ssl.create_default_context(cafile=settings.tls_ca)
        except (OSError, ValueError):
            raise ConfigError("ERROR - tls_ca=%s holds no certificate" % settings.tls_ca) from None


def check_report(settings):
    """Raises ConfigError if report_json would replace something else than a report; it is taken
    out of the settings then, or the report of just this error would."""
    path, settings.report_json = settings.report_json, None
    check_target(settings, "report_json", path, "replace")
    settings.report_json = path


def check_target(settings, key, path, doing):
    """Raises ConfigError if the file that `key` names serves for something else, or is none."""
    if not path:
        return
    for other in ("config_file", "password_file", "status_log", "tls_ca", "smtp_password_file"):
        file = getattr(settings, other)
        used = file and other != key and (other != "status_log" or settings.config_file)
        if used and os.path.realpath(path) == os.path.realpath(file):
            raise ConfigError("ERROR - %s=%s would %s the %s" % (key, path, doing, other))
    if not os.path.exists(path) or os.path.isfile(path):
        return
    if key != "status_log" or not stat.S_ISCHR(os.stat(path).st_mode):  # that may be /dev/null
        raise ConfigError("ERROR - %s=%s is no regular file" % (key, path))


def make_hosts(settings, local):
    """The Endpoints of host=. Raises ConfigError where it does not go with the password."""
    addresses = settings.host
    if local and addresses == KNOWN["host"].parse("localhost"):
        addresses = [Address("unix", "/var/lib/xcp/xapi", 0)]
    if any(local != (address.scheme == "unix") for address in addresses):
        raise ConfigError("ERROR - the password `local` and a socket path in host= go together")
    pins, ca = settings.tls_fingerprint, settings.tls_ca
    return [Endpoint(address, pins, ca, settings.tls_verify) for address in addresses]


@contextlib.contextmanager
def no_echo(stream):
    """Asks for the password where `stream` is a terminal, and shows nothing of what is typed. (The
    module getpass would decode it by the locale: in dom0's Python 3.6 often ASCII.)"""
    if not is_terminal(stream):
        yield
        return
    fd = stream.fileno()
    before = termios.tcgetattr(fd)
    hidden = before[:3] + [before[3] & ~termios.ECHO] + before[4:]
    termios.tcsetattr(fd, termios.TCSAFLUSH, hidden)  # it drops what was typed: first this
    try:
        write_text(sys.stderr, "Password: ")
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSAFLUSH, before)
        write_text(sys.stderr, "\n")


def read_password(word, literal=False):
    """The password that the first argument stands for. literal: a file of that name is not read."""
    if word == "-":
        with no_echo(sys.stdin):
            line = sys.stdin.buffer.readline() if sys.stdin else b""
        if not line:
            raise ConfigError("ERROR - no password was given on standard input")
        word = line.decode("utf-8", "surrogateescape").rstrip("\r\n")
    elif os.path.isfile(native(word)) and not literal:
        word = read_password_file(native(word))
    try:
        word.encode("utf-8")
    except UnicodeEncodeError:
        raise ConfigError("ERROR - the password is not UTF-8 text") from None
    return word


def create_password_file(path, password, log):
    """Writes a password file of mode 0600; of files that exist it replaces only such a one."""
    if not path:
        raise ConfigError("ERROR - create-password-file= needs the name of a file")
    if os.path.lexists(path):
        read_password_file(path)
    try:
        replace_file(path, base64.b64encode(password.encode("utf-8")))
    except OSError as error:
        raise ConfigError("ERROR - cannot write the password file: %s" % describe(error)) from None
    log("password file saved to: %s" % path)
    return 0


def verify_command(words, log):
    if not 1 <= len(words) <= 2:
        raise ConfigError("ERROR - usage: vmbackup.py verify <config-file|folder> [vm-name]")
    top = native(words[0])
    if os.path.isfile(top):
        config = read_config(read_file(top), top)
        given = [value for key, value, _ in config if key == "backup_dir" and value]
        top = native(given[-1]) if given else KNOWN["backup_dir"].default
    if not os.path.isdir(top):
        raise ConfigError("ERROR - there is no such config file or folder: %s" % top)
    return verify(os.path.abspath(top), words[1] if len(words) > 1 else None, log)


def main(argv=None) -> int:
    """Runs the program with these arguments (default: sys.argv's); returns the exit status."""
    os.umask(0o077)
    words = [from_argv(arg) for arg in (sys.argv[1:] if argv is None else argv)]
    with contextlib.closing(Log(sys.stdout, sys.stderr, os.environ)) as log:
        return command(words, log)


if __name__ == "__main__":
    sys.exit(main())

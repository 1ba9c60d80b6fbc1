# SPDX-License-Identifier: GPL-3.0-or-later
"""Everything that can be made to go wrong, and the settings.

A fault is a name and options.  It comes from the pool description ("faults": [{"name": ...}]), or
at run time from ``Simulator.fault(name, **options)``, which returns its number.  A name or an
option that is not below is refused.

OPTIONS OF ALL FAULTS
    times       how often it happens, then it is spent (default: every time; actions: once)
    skip        how many matching occasions pass untouched first (skip=2: the third call)
    host        only at the member of the pool with this index
    vm          only for this VM (name or uuid; its snapshots count as it)
    vdi         only for this disk (name or uuid; its snapshots count as it)

BODIES.  These concern /export unless ``path`` names another handler ("/export_metadata",
"/export_raw_vdi", "/pool/xmldbdump", "/import", "/import_raw_vdi", or "*").  ``after`` is a number
of bytes of the body, default 0; negative: that many before the end of an uncompressed
/export_raw_vdi or /pool/xmldbdump, for raw_cut of any body, and of a body that comes in.  It counts
bytes of the *archive*, before compression: the compressed stream is still ended properly, as
xapi's compressor does.  Those marked (wire) count bytes as the client gets them.

    export_cut          close after N bytes, nothing appended.  task="pending" (default), "vanish",
                        "failure" (with error_info) or "success"
    raw_cut             (wire) the same, cutting the compressed stream itself
    export_fail         after N bytes the task fails with error_info (default VDI_IO_ERROR) and the
                        text of an HTTP 500 follows in the body
    export_fail_silent  the same without the text
    export_fail_after_whole     the whole body, then the task fails; text=true appends the 500 text
    export_cancel       after N bytes the task is cancelled by an administrator (empty error_info),
                        with the 500 text
    export_reset        (wire) TCP reset after N bytes; the task fails (EPIPE)
    export_silence      (wire) nothing is sent for ``seconds`` at N bytes, or until it is cleared
    export_rate         (wire) not more than ``bytes`` a second
    export_slow_start   ``seconds`` between the headers and the first byte, or until it is cleared
    export_empty_reply  the task fails with error_info (default NO_HOSTS_AVAILABLE), the connection
                        closes without a byte
    export_401          as for an unknown session
    export_302          redirect to the member with index ``to`` ("next": the following one; with
                        times unlimited on all members that makes a circle), or to ``location``
    export_431, export_408      these answers, whatever the request's head
    export_500          the task fails with error_info, the answer is HTTP 500
    task_never_completes        the task stays pending though the body ends
    database_dummy      /pool/xmldbdump has no tables, as during a rolling pool upgrade
    slow_detach         the disk stays attached (VDI_IN_USE) ``seconds`` after the end

BODIES THAT COME IN (/import, /import_raw_vdi).  Of the above these work there too, with ``path``;
their bytes are those that came in: export_cut (xapi dies: nothing is cleared away), export_fail,
export_fail_silent, export_cancel, export_reset (the line breaks: xapi clears away and the task
fails), export_silence and export_rate (of reading), export_empty_reply, export_401, export_302,
export_431, export_408, export_500, task_never_completes, slow_detach.  And for /import:
    import_400          the answer is 400, the task fails with error_info (default
                        NOT_SUPPORTED_DURING_UPGRADE)
    import_slow_cleanup the clean-up after a failure takes ``seconds`` before anything goes
    import_leaves       the clean-up leaves records of the class ``cls`` (default VDI)
    import_slow_end     ``seconds`` pass between the last byte that is read and the task's end
    vdi_create_error    VDI.create (a call, or of an import) fails with error_info (default
                        SR_BACKEND_FAILURE_44)

ARCHIVES (/export, and format=tar of /export_raw_vdi).  ``vdi`` selects the disk (default: all);
``chunk`` is the index, or a list of them, in MiB of the disk; -1 (default) is the last.
    missing_chunk, missing_last_chunk, wrong_hash
    flip_bit            one bit of the chunk; ``byte`` is the offset in it (default 0)
    keepalive_members   zero-length members before the chunks ``chunk`` (default [1])
    restart_numbers     chunk numbers begin again at 0 after ``chunk``
    sha1_checksums      .checksum members, as before 2019
    zero_chunks         zero chunks are written too, as xapi >= 26 does for VHD
    no_end_blocks       the archive ends without its two zero blocks
    trailing_text       ``text`` (default "trailing") after the end, before compression
    joined_twice        the whole archive twice, one behind the other

CALLS.  ``method`` is e.g. "VM.snapshot" (its Async form counts as well), or "*" for any.
``moment`` is "before" (default) or "after" the call is executed; for Async, its work.
    rpc_error           fails with error_info; immediate=true also for Async, instead of in the task
    rpc_drop            the connection closes without an answer
    rpc_hang            waits ``seconds`` (default 3600), or until it is cleared
    rpc_http            answers HTTP ``code`` (default 503)
    login_error         session.login_with_password fails with error_info (default
                        SESSION_AUTHENTICATION_FAILED) after ``delay`` seconds
    host_still_booting  every call fails so (error_info for another code)
    snapshot_error      VM.snapshot and VDI.snapshot fail with error_info (default
                        SR_BACKEND_FAILURE_44)
    snapshot_slow       they take ``seconds``
    snapshot_wrong_ref  they are taken, but what is given as theirs is the reference of ``to``
    snapshot_no_ignore_vdis     VM.snapshot takes two arguments only, as before xapi 21.4
    vdi_in_use          VDI.destroy fails with VDI_IN_USE
    vm_destroy_error    VM.destroy fails with error_info
    vdi_destroy_error   VDI.destroy fails with error_info
    fields_missing      records of the class ``cls`` come without these ``fields`` (a list), as from
                        a host of another version
    where_empty         get_all_records_where finds nothing, in the class ``cls`` (default: in any)

ACTIONS happen at a moment: when a call of ``method`` comes ("GET /export" and the like are methods
too), ``moment`` as above; or at byte ``after`` of a body of ``path`` (wire); with neither, at once.
``times`` is 1 unless given.
    kill_client_at      send ``signal`` (default 9) to the process ``pid``
    session_lost        all sessions are invalid from now on
    xapi_restart        all sessions and tasks are gone, all connections are closed
    master_moves        the member with index ``to`` becomes the master
    vm_renamed          the VM ``target`` is called ``to``
    vm_deleted          the VM ``target`` and its disks are gone
    vm_stopped          the VM ``target`` is Halted
    task_vanish         all tasks are destroyed by somebody else
    tasks_cancelled     all pending tasks become cancelled at once
    host_down           the member with index ``member`` refuses connections

SETTINGS ("settings" of the description, or ``Simulator.setting(name=value)``)
    progress_interval   seconds between the moments when an export looks for task.cancel (10)
    head_timeout        seconds a request's head may stall (10)
    busy_wait           seconds /export waits for a busy VM before OTHER_OPERATION_IN_PROGRESS (0)
    queue_wait          seconds a VM operation queues on a busy VM (7200)
    operation_shape     "new" or "old": the parameters of OTHER_OPERATION_IN_PROGRESS
    bad_uuid            "failure" (xapi >= 24.34) or "pending": the task when uuid= is unknown
    first_id            the first number of Ref:N in archives (1)
    login_delay         seconds that a wrong password takes (0)
    session_limit       sessions of one originator (500)
    delay_ms            milliseconds that every call and request takes longer: a far host (0)
    archive_version     the xapi that archives claim to come from (1.20; this one is 24.19)
    round_disks         new disks are rounded up to blocks of 2 MiB, as storage of vhds does (true)
"""

import itertools
import threading

SETTINGS = {
    "progress_interval": 10.0, "head_timeout": 10.0, "busy_wait": 0.0, "queue_wait": 7200.0,
    "operation_shape": "new", "bad_uuid": "failure", "first_id": 1, "login_delay": 0.0,
    "session_limit": 500, "delay_ms": 0.0, "round_disks": True, "archive_version": "1.20",
}

_COMMON = {"times", "skip", "host", "vm", "vdi"}
_CALL = {"method", "moment"}
_BODY = {"path", "after"}

FAULTS = {
    "export_cut": _BODY | {"task", "error_info"},
    "raw_cut": _BODY | {"task", "error_info"},
    "export_fail": _BODY | {"error_info"},
    "export_fail_silent": _BODY | {"error_info"},
    "export_fail_after_whole": {"path", "error_info", "text"},
    "export_cancel": _BODY,
    "export_reset": _BODY,
    "export_silence": _BODY | {"seconds"},
    "export_rate": {"path", "bytes"},
    "export_slow_start": {"path", "seconds"},
    "export_empty_reply": {"path", "error_info"},
    "export_401": {"path"},
    "export_302": {"path", "to", "location"},
    "export_431": {"path"},
    "export_408": {"path"},
    "export_500": {"path", "error_info"},
    "task_never_completes": {"path"},
    "database_dummy": {"path"},
    "slow_detach": {"path", "seconds"},
    "missing_chunk": {"chunk"},
    "missing_last_chunk": set(),
    "wrong_hash": {"chunk"},
    "flip_bit": {"chunk", "byte"},
    "keepalive_members": {"chunk"},
    "restart_numbers": {"chunk"},
    "sha1_checksums": set(),
    "zero_chunks": set(),
    "no_end_blocks": set(),
    "trailing_text": {"text"},
    "joined_twice": set(),
    "import_400": {"path", "error_info"},
    "import_slow_cleanup": {"path", "seconds"},
    "import_leaves": {"path", "cls"},
    "import_slow_end": {"path", "seconds"},
    "vdi_create_error": {"error_info"},
    "rpc_error": _CALL | {"error_info", "immediate"},
    "rpc_drop": _CALL,
    "rpc_hang": _CALL | {"seconds"},
    "rpc_http": _CALL | {"code"},
    "login_error": {"error_info", "delay"},
    "host_still_booting": {"error_info"},
    "snapshot_error": {"error_info"},
    "snapshot_slow": {"seconds"},
    "snapshot_wrong_ref": {"to"},
    "snapshot_no_ignore_vdis": set(),
    "vdi_in_use": set(),
    "vm_destroy_error": {"error_info"},
    "vdi_destroy_error": {"error_info"},
    "fields_missing": {"cls", "fields"},
    "where_empty": {"cls"},
}
ACTIONS = {
    "kill_client_at": {"pid", "signal"},
    "session_lost": set(),
    "xapi_restart": set(),
    "master_moves": {"to"},
    "vm_renamed": {"target", "to"},
    "vm_deleted": {"target"},
    "vm_stopped": {"target"},
    "task_vanish": set(),
    "tasks_cancelled": set(),
    "host_down": {"member"},
}
_TAKES_PATH = {name for name, options in FAULTS.items() if "path" in options} | set(ACTIONS)


class Fault:
    """One fault that is set, and how often it may still happen."""

    def __init__(self, number, name, options):
        if name in FAULTS:
            allowed = FAULTS[name]
        elif name in ACTIONS:
            allowed = ACTIONS[name] | _CALL | _BODY
        else:
            raise ValueError("no such fault: %s" % name)
        unknown = set(options) - allowed - _COMMON
        if unknown:
            raise ValueError("%s takes no option %s" % (name, ", ".join(sorted(unknown))))
        self.number = number
        self.name = name
        self.options = options
        self.left = options.get("times", 1 if name in ACTIONS else None)
        self.skip = options.get("skip", 0)
        self.fired = 0

    def get(self, option, default=None):
        """An option's value."""
        return self.options.get(option, default)

    @property
    def immediate(self):
        """Whether it is an action that waits for nothing."""
        return self.name in ACTIONS and not {"method", "after"} & set(self.options)

    def matches(self, path=None, method=None, moment=None, host=None, vm=(), vdi=(), cls=None):
        """Whether it concerns this occasion."""
        options = self.options
        if self.left == 0:
            return False
        if "host" in options and options["host"] != host:
            return False
        if options.get("cls", cls) != cls:
            return False
        if "vm" in options and options["vm"] not in vm:
            return False
        if "vdi" in options and vdi is not None and options["vdi"] not in vdi:
            return False
        if path is not None and self.name in _TAKES_PATH:
            usual = "/import" if self.name.startswith("import_") else "/export"
            return options.get("path", usual) in (path, "*")
        if method is not None and ("method" in options or self.name.startswith("rpc_")):
            if moment is not None and options.get("moment", "before") != moment:
                return False
            wanted = options.get("method", "*")
            return wanted in ("*", method) or method == "Async." + wanted
        return True


class Faults:
    """All faults that are set."""

    def __init__(self):
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._faults = []

    def add(self, name, options):
        """Set a fault; returns it."""
        with self._lock:
            fault = Fault(next(self._numbers), name, options)
            self._faults.append(fault)
            return fault

    def clear(self, name=None):
        """Take away all faults, or those of a name or number."""
        with self._lock:
            self._faults = [fault for fault in self._faults
                            if name is not None and name not in (fault.name, fault.number)]

    def is_set(self, fault):
        """Whether it was not taken away yet."""
        with self._lock:
            return fault in self._faults

    def take_all(self, name, **occasion):
        """The faults of that name which happen on this occasion, each counted once."""
        taken = []
        with self._lock:
            for fault in self._faults:
                if fault.name == name and fault.matches(**occasion):
                    if fault.skip:
                        fault.skip -= 1
                        continue
                    fault.fired += 1
                    if fault.left is not None:
                        fault.left -= 1
                    taken.append(fault)
        return taken

    def spend(self, fault):
        """Count a fault that happens now."""
        with self._lock:
            fault.fired += 1
            fault.left = 0

    def take(self, name, **occasion):
        """The first of them, or None."""
        taken = self.take_all(name, **occasion)
        return taken[0] if taken else None

    def actions(self, trigger, **occasion):
        """The actions that happen now; trigger is the option they wait for."""
        found = []
        for name in ACTIONS:
            if any(fault.name == name and trigger in fault.options for fault in self._faults):
                found += [fault for fault in self.take_all(name, **occasion)
                          if trigger in fault.options]
        return found

    def describe(self):
        """All faults with how often they happened."""
        with self._lock:
            return [{"number": fault.number, "name": fault.name, "options": fault.options,
                     "fired": fault.fired, "left": fault.left} for fault in self._faults]

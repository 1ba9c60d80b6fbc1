# SPDX-License-Identifier: GPL-3.0-or-later
"""The calls of the XenAPI: what each takes, does and answers."""

import re
import threading
import time
import traceback

from . import dbfilter, disks, schema, world, xmlrpc
from .database import new_ref, now
from .schema import NULL


class XapiError(Exception):
    """A call failed: the error's code and its parameters, all text."""

    def __init__(self, *info):
        super().__init__(*info)
        self.info = [str(item) for item in info]

    def __str__(self):
        return "%s: [ %s ]" % (self.info[0], "; ".join(self.info[1:]))


class DropConnection(Exception):
    """The connection ends here, without another byte."""


class Call:
    """Who calls: from which member and socket, in which session."""

    def __init__(self, simulator, host, unix=False):
        self.simulator = simulator
        self.world = simulator.world
        self.db = simulator.world.db
        self.faults = simulator.faults
        self.host = host
        self.unix = unix
        self.session = None
        self.answered = None

    @property
    def on_slave(self):
        return self.host != self.world.master


class _Method:
    def __init__(self, name, parameters, function, is_async, session):
        self.name = name
        self.function = function
        self.is_async = is_async
        self.session = session
        self.parameters = []
        self.defaults = []
        for word in parameters.split():
            word, optional, _ = word.partition("=")
            (self.defaults if optional else self.parameters).append(word)


_METHODS = {}
_REMOVED = {"VM.snapshot_with_quiesce", "VM.csvm", "VM.get_cooperative"}
_EMPTY = {"set": list, "map": dict, "str": str}


def _method(name, parameters="", is_async=False, session=True):
    """Register a call; parameters are type words (``ref:VM str bool set map float int``), those
    that may be left out end in ``=``."""
    def register(function):
        _METHODS[name] = _Method(name, parameters, function, is_async, session)
        return function
    return register


def _convert(word, value):
    """A parameter as sent, as the type that the call expects."""
    kind, _, cls = word.partition(":")
    if kind == "bool":
        if not isinstance(value, bool):
            raise _wrong_type("bool", value)
        return value
    if kind in ("int", "float"):
        try:
            return {"int": int, "float": float}[kind](value)
        except (TypeError, ValueError):
            raise _wrong_type(kind, value) from None
    wanted = {"set": list, "map": dict}.get(kind, str)
    if not isinstance(value, wanted):
        raise _wrong_type({"set": "list", "map": "dict", "ref": "string"}.get(kind, kind), value)
    return value


def _wrong_type(kind, value):
    return XapiError("INTERNAL_ERROR", 'Failure("Expected %s, got %r")' % (kind, value))


class Dispatcher:
    """Executes calls and encodes their answers."""

    def __init__(self, simulator):
        self.simulator = simulator

    def answer(self, call, name, parameters):
        """The response body to a call."""
        try:
            value = xmlrpc.success(self._execute(call, name, parameters))
            call.answered = "Success"
            return value
        except XapiError as error:
            failed = error
        except Exception as error:
            traceback.print_exc()
            failed = XapiError("INTERNAL_ERROR", repr(error))
        call.answered = failed.info[0]
        return xmlrpc.failure(failed.info)

    def _execute(self, call, name, parameters):
        if call.on_slave and call.unix:
            call.host = call.world.master
        is_async = name.startswith("Async.")
        method = _find(name[6:] if is_async else name)
        if method is None or (is_async and not method.is_async):
            raise XapiError("MESSAGE_METHOD_UNKNOWN", name)
        booting = call.faults.take("host_still_booting", host=call.host)
        if booting:
            raise XapiError(*booting.get("error_info", ["HOST_STILL_BOOTING"]))
        arguments = self._arguments(call, method, name, parameters)
        if method.session:
            self._check_session(call, parameters[0])
        if method.name == "VM.snapshot" and len(parameters) > 3 and call.faults.take(
                "snapshot_no_ignore_vdis", host=call.host):
            raise XapiError("MESSAGE_PARAMETER_COUNT_MISMATCH", name, 2, len(parameters) - 1)
        if not is_async:
            return self._run(call, method, name, arguments)
        error = call.faults.take("rpc_error", method=name, moment="before", host=call.host)
        if error and error.get("immediate"):
            raise XapiError(*_error_info(error))
        task = call.db.insert(
            "task", name_label=name, created=now(),
            resident_on=call.world.hosts[call.world.master])
        self.simulator.task_sessions[task] = call.session
        threading.Thread(target=self._run_async, daemon=True,
                         args=(call, method, name, arguments, task, error)).start()
        return "<value>%s</value>" % task

    def _run(self, call, method, name, arguments, error=None):
        error = error or call.faults.take(
            "rpc_error", method=name, moment="before", host=call.host)
        if error:
            raise XapiError(*_error_info(error))
        value = method.function(call, *arguments)
        error = call.faults.take("rpc_error", method=name, moment="after", host=call.host)
        if error:
            raise XapiError(*_error_info(error))
        return "<value></value>" if value is None else value

    def _run_async(self, call, method, name, arguments, task, error):
        try:
            result = self._run(call, method, name, arguments, error)
        except XapiError as failed:
            self.simulator.complete_task(task, "failure", error_info=failed.info)
        except Exception as error:
            traceback.print_exc()
            self.simulator.complete_task(
                task, "failure", error_info=["INTERNAL_ERROR", repr(error)])
        else:
            self.simulator.complete_task(task, "success", result=result)
        self.simulator.act("method", method=name, moment="after", host=call.host)

    @staticmethod
    def _arguments(call, method, name, parameters):
        if method.name in _REMOVED:
            raise XapiError("MESSAGE_REMOVED")
        skip = 1 if method.session else 0
        given = parameters[skip:]
        least, most = len(method.parameters), len(method.parameters) + len(method.defaults)
        if len(parameters) < skip or not least <= len(given) <= most:
            raise XapiError("MESSAGE_PARAMETER_COUNT_MISMATCH", name, least, len(given))
        words = method.parameters + method.defaults
        arguments = [_convert(word, value) for word, value in zip(words, given)]
        arguments += [_EMPTY[word.partition(":")[0]]() for word in words[len(given):]]
        for word, value in zip(words, arguments):
            kind, _, cls = word.partition(":")
            if kind == "ref" and call.db.get(cls, value) is None:
                Dispatcher._check_session(call, parameters[0])
                raise XapiError("HANDLE_INVALID", cls, value)
        return arguments

    @staticmethod
    def _check_session(call, session):
        if call.on_slave:
            raise XapiError("HOST_IS_SLAVE", call.simulator.master_address(call.host))
        with call.db.lock:
            if not isinstance(session, str) or call.db.get("session", session) is None:
                raise XapiError("SESSION_INVALID", session)
            call.session = session
            call.db.get("session", session)["last_active"] = now()


def _error_info(fault):
    return fault.get("error_info", ["INTERNAL_ERROR", "simulated"])


# --- records of every class -----------------------------------------------------------------------

_GENERIC = re.compile(r"(\w+)\.(get_all|get_all_records|get_all_records_where|get_record|"
                      r"get_by_uuid|get_by_name_label|get_\w+|set_name_label|set_name_description|"
                      r"set_tags|add_tags|remove_tags|"
                      r"(?:add_to|remove_from|set)_other_config)$")
_generic_cache = {}


def _find(name):
    """The call of that name, made on demand for the getters that every class has, or None."""
    if name in _METHODS:
        return _METHODS[name]
    if name in _REMOVED:
        return _Method(name, "", None, False, True)
    if name not in _generic_cache:
        match = _GENERIC.match(name)
        method = None
        if match and match.group(1) in schema.TYPES:
            method = _generic(match.group(1), match.group(2))
        if method is None:
            return None
        _generic_cache[name] = _Method(name, method[0], method[1], False, True)
    return _generic_cache[name]


def _generic(cls, verb):
    """(parameters, function) of a call that works alike on all classes, or None."""
    types = schema.TYPES[cls]
    whole = {
        "get_all": ("", lambda call: _refs(call.db.tables[cls])),
        "get_all_records": ("", lambda call: _records(call, cls, None)),
        "get_all_records_where": ("str", lambda call, text: _records(call, cls, text)),
        "get_by_name_label": ("str", lambda call, label: _refs(
            ref for ref, record in call.db.tables[cls].items() if record["name_label"] == label)),
    }
    if verb in whole:
        if cls == "session" or (verb == "get_by_name_label" and "name_label" not in types):
            return None
        parameters, function = whole[verb]
        return parameters, _locked(function)
    if verb == "get_record":
        return "ref:" + cls, _locked(lambda call, ref: _encoder(call, cls)(cls, ref))
    if verb == "get_by_uuid":
        return "str", _locked(lambda call, uuid: _by_uuid(call, cls, uuid))
    action, _, field = verb.partition("_")
    if action == "get" and field in types:
        encode = xmlrpc.ENCODERS[types[field]]
        return "ref:" + cls, _locked(lambda call, ref: encode(call.db.get(cls, ref)[field]))
    if verb == "add_to_other_config" and "other_config" in types:
        return "ref:%s str str" % cls, _locked(_add_to_other_config(cls))
    if verb == "remove_from_other_config" and "other_config" in types:
        return "ref:%s str" % cls, _locked(_remove_from_other_config(cls))
    kinds = {"set_name_label": "str", "set_name_description": "str", "set_other_config": "map",
             "set_tags": "set"}
    if verb in kinds and verb[4:] in types:
        return ("ref:%s %s" % (cls, kinds[verb]),
                lambda call, ref, value: call.db.set(cls, ref, verb[4:], value))
    if verb in ("add_tags", "remove_tags") and "tags" in types:
        return "ref:%s str" % cls, _locked(_change_tags(cls, verb == "add_tags"))
    return None


def _locked(function):
    def locked(call, *arguments):
        with call.db.lock:
            return function(call, *arguments)
    return locked


def _refs(refs):
    return xmlrpc.array("<value>%s</value>" % ref for ref in refs)


def _records(call, cls, expression):
    test = None
    if expression is not None:
        try:
            test = dbfilter.compile_filter(cls, expression)
        except dbfilter.BadFilter as error:
            raise XapiError("INVALID_VALUE", "expr", "%s: %s" % (expression, error)) from None
        if call.faults.take("where_empty", cls=cls, host=call.host):
            return ["<value><struct></struct></value>"]
    parts = ["<value><struct>"]
    xml = _encoder(call, cls)
    for ref, record in call.db.tables[cls].items():
        if test is None or test(ref, record):
            parts += ("<member><name>", ref, "</name>", xml(cls, ref), "</member>")
    parts.append("</struct></value>")
    return parts


def _encoder(call, cls):
    """The function that encodes a record (class, reference), without the fields that are missing
    on this host."""
    fault = call.faults.take("fields_missing", cls=cls, host=call.host)
    if fault is None:
        return call.db.xml
    return lambda cls, ref: xmlrpc.record(cls, call.db.get(cls, ref), fault.get("fields"))


def _by_uuid(call, cls, uuid):
    ref = call.db.by_uuid(cls, uuid)
    if ref is None:
        raise XapiError("UUID_INVALID", cls, uuid)
    return "<value>%s</value>" % ref


def _add_to_other_config(cls):
    def add(call, ref, key, value):
        current = call.db.get(cls, ref)["other_config"]
        if key in current:
            raise XapiError("MAP_DUPLICATE_KEY", cls, "other_config", ref, key)
        call.db.set(cls, ref, "other_config", dict(current, **{key: value}))
    return add


def _remove_from_other_config(cls):
    def remove(call, ref, key):
        current = dict(call.db.get(cls, ref)["other_config"])
        current.pop(key, None)
        call.db.set(cls, ref, "other_config", current)
    return remove


def _change_tags(cls, add):
    def change(call, ref, tag):
        tags = [other for other in call.db.get(cls, ref)["tags"] if other != tag]
        call.db.set(cls, ref, "tags", tags + [tag] if add else tags)
    return change


# --- sessions -------------------------------------------------------------------------------------

@_method("session.login_with_password", "str str str= str=", session=False)
def _login(call, username, password, version, originator):
    simulator = call.simulator
    if not call.unix:
        if call.on_slave:
            raise XapiError("HOST_IS_SLAVE", simulator.master_address(call.host))
        fault = call.faults.take("login_error", host=call.host)
        if fault:
            time.sleep(fault.get("delay", 0))
            raise XapiError(*fault.get("error_info", [
                "SESSION_AUTHENTICATION_FAILED", username, "Authentication failure"]))
        if (username, password) != (call.world.username, call.world.password):
            time.sleep(simulator.settings["login_delay"])
            raise XapiError("SESSION_AUTHENTICATION_FAILED", username, "Authentication failure")
    return "<value>%s</value>" % new_session(call, username, originator)


def new_session(call, username, originator=""):
    """Make a session; too many of one originator push out the least recently active."""
    db = call.db
    with db.lock:
        same = [ref for ref, record in db.tables["session"].items()
                if record["originator"] == originator]
        limit = call.simulator.settings["session_limit"] if originator else 400
        pinned = {call.simulator.task_sessions.get(task)
                  for task, record in db.tables["task"].items() if record["status"] == "pending"}
        idle = sorted((ref for ref in same if ref not in pinned),
                      key=lambda ref: db.get("session", ref)["last_active"])
        for ref in idle[:max(0, len(same) - limit + 1)]:
            db.delete("session", ref)
        return db.insert(
            "session", this_host=call.world.hosts[call.host], last_active=now(),
            is_local_superuser=True, auth_user_name=username, validation_time=now(),
            originator=originator)


@_method("session.logout")
def _logout(call):
    with call.db.lock:
        call.db.delete("session", call.session)


# --- VMs ------------------------------------------------------------------------------------------

def _check_not_blocked(call, vm, operation):
    blocked = call.db.get("VM", vm)["blocked_operations"]
    if operation in blocked:
        raise XapiError("OPERATION_BLOCKED", vm, blocked[operation])


def _wait_until_free(call, vm, coexists=()):
    """Queue, as xapi does, while another operation is under way on the VM."""
    db = call.db
    deadline = time.monotonic() + call.simulator.settings["queue_wait"]
    with db.lock:
        while True:
            record = db.get("VM", vm)
            if record is None:
                raise XapiError("HANDLE_INVALID", "VM", vm)
            others = [(task, operation) for task, operation
                      in record["current_operations"].items() if operation not in coexists]
            if not others:
                return
            left = deadline - time.monotonic()
            if left <= 0:
                raise call.simulator.busy(vm, others)
            db.changed.wait(left)


@_method("VM.snapshot", "ref:VM str set=", is_async=True)
def _vm_snapshot(call, vm, name, ignored):
    simulator, db = call.simulator, call.db
    record = db.get("VM", vm)
    if record["is_a_snapshot"]:
        raise XapiError("VM_IS_SNAPSHOT", vm, "snapshot")
    if record["is_a_template"]:
        raise XapiError("VM_IS_TEMPLATE", vm, "snapshot")
    if record["is_control_domain"]:
        raise XapiError("OPERATION_NOT_ALLOWED", "The operation is not allowed on a control domain")
    _check_not_blocked(call, vm, "snapshot")
    _snapshot_faults(call, vm=simulator.names("VM", vm))
    _wait_until_free(call, vm, ("snapshot", "checkpoint"))
    with db.lock:
        if not call.world.hosts_for(vm):
            raise XapiError("NO_HOSTS_AVAILABLE")
        made = world.take_snapshot(
            call.world, vm, name, ignored, lambda vdi: _check_can_snapshot(call, vdi))
    return _made(call, made, "VM", vm=simulator.names("VM", vm))


def _made(call, ref, cls, **occasion):
    """The value of a snapshot's task: its reference, or that of something else."""
    wrong = call.faults.take("snapshot_wrong_ref", host=call.host, **occasion)
    return "<value>%s</value>" % (call.db.find(cls, wrong.get("to")) if wrong else ref)


def _snapshot_faults(call, **occasion):
    slow = call.faults.take("snapshot_slow", host=call.host, **occasion)
    if slow:
        time.sleep(slow.get("seconds", 5))
    error = call.faults.take("snapshot_error", host=call.host, **occasion)
    if error:
        raise XapiError(*error.get("error_info", [
            "SR_BACKEND_FAILURE_44", "", "There is insufficient space", ""]))


def _check_can_snapshot(call, vdi):
    record = call.db.get("VDI", vdi)
    if record["SR"] in call.db.no_snapshot:
        raise XapiError("SR_OPERATION_NOT_SUPPORTED", record["SR"])
    if record["sharable"]:
        raise XapiError("VDI_IS_SHARABLE", vdi)
    if record["on_boot"] == "reset":
        raise XapiError("VDI_ON_BOOT_MODE_INCOMPATIBLE_WITH_OPERATION")


@_method("VM.destroy", "ref:VM", is_async=True)
def _vm_destroy(call, vm):
    db = call.db
    _fail_on(call, "vm_destroy_error", vm=call.simulator.names("VM", vm))
    record = db.get("VM", vm)
    if record["is_default_template"]:
        raise XapiError("VM_CANNOT_DELETE_DEFAULT_TEMPLATE", vm)
    if record["is_control_domain"]:
        raise XapiError("OPERATION_NOT_ALLOWED", "The operation is not allowed on a control domain")
    _check_not_blocked(call, vm, "destroy")
    if record["power_state"] not in ("Halted", "Suspended"):
        raise XapiError("VM_BAD_POWER_STATE", vm, "halted, suspended",
                        record["power_state"].lower())
    _wait_until_free(call, vm)
    with db.lock:
        call.simulator.delete_vm(vm)


def _fail_on(call, name, **occasion):
    fault = call.faults.take(name, host=call.host, **occasion)
    if fault:
        raise XapiError(*_error_info(fault))


@_method("VM.start", "ref:VM bool bool", is_async=True)
def _vm_start(call, vm, paused, force):
    db = call.db
    _wait_until_free(call, vm)
    with db.lock:
        record = db.get("VM", vm)
        if record["is_a_template"] or record["is_a_snapshot"]:
            raise XapiError("VM_IS_TEMPLATE", vm, "start")
        _check_not_blocked(call, vm, "start")
        if record["power_state"] != "Halted":
            raise XapiError("VM_BAD_POWER_STATE", vm, "halted", record["power_state"].lower())
        hosts = call.world.hosts_for(vm)
        if not hosts:
            raise XapiError("NO_HOSTS_AVAILABLE")
        if record["guest_metrics"] in db.tables["VM_guest_metrics"]:
            db.delete("VM_guest_metrics", record["guest_metrics"])
        db.set("VM_metrics", record["metrics"], "start_time", now())
        for field, value in (("guest_metrics", NULL), ("resident_on", hosts[0]), ("domid", 7),
                             ("power_state", "Paused" if paused else "Running")):
            db.set("VM", vm, field, value)
        for vbd in record["VBDs"]:
            db.set("VBD", vbd, "currently_attached", True)
        for vif in record["VIFs"]:
            db.set("VIF", vif, "currently_attached", True)
        call.world.refresh_operations(vm)


@_method("VM.hard_shutdown", "ref:VM", is_async=True)
def _vm_hard_shutdown(call, vm):
    db = call.db
    with db.lock:
        record = db.get("VM", vm)
        if record["power_state"] == "Halted":
            raise XapiError("VM_BAD_POWER_STATE", vm, "paused, suspended, running", "halted")
        if record["suspend_VDI"] in db.tables["VDI"]:
            db.delete("VDI", record["suspend_VDI"])
        db.set("VM", vm, "suspend_VDI", NULL)
        call.simulator.halt_vm(vm)


@_method("VM.set_is_a_template", "ref:VM bool")
def _vm_set_is_a_template(call, vm, value):
    record = call.db.get("VM", vm)
    if value and record["power_state"] != "Halted":
        raise XapiError("VM_BAD_POWER_STATE", vm, "halted", record["power_state"].lower())
    with call.db.lock:
        call.db.set("VM", vm, "is_a_template", value)
        call.world.refresh_operations(vm)


@_method("VM.set_ha_restart_priority", "ref:VM str")
def _vm_set_ha_restart_priority(call, vm, value):
    if value not in ("restart", "best-effort", ""):
        raise XapiError("INVALID_VALUE", "ha_restart_priority", value)
    with call.db.lock:
        call.db.set("VM", vm, "ha_restart_priority", value)
        call.db.set("VM", vm, "ha_always_run", value == "restart")


@_method("VM.set_ha_always_run", "ref:VM bool")
def _vm_set_ha_always_run(call, vm, value):
    _vm_set_ha_restart_priority(call, vm, "restart" if value else "")


# --- disks ----------------------------------------------------------------------------------------

@_method("VDI.snapshot", "ref:VDI map=", is_async=True)
def _vdi_snapshot(call, vdi, parameters):
    _snapshot_faults(call, vdi=call.simulator.names("VDI", vdi))
    with call.db.lock:
        record = call.db.get("VDI", vdi)
        if not record["managed"]:
            raise XapiError("VDI_NOT_MANAGED", vdi)
        if not any(call.world.sees(host, record["SR"]) for host in call.world.hosts):
            raise XapiError("SR_HAS_NO_PBDS", record["SR"])
        _check_can_snapshot(call, vdi)
        made = world.take_vdi_snapshot(call.world, vdi)
        return _made(call, made, "VDI", vdi=call.simulator.names("VDI", vdi))


@_method("VDI.destroy", "ref:VDI", is_async=True)
def _vdi_destroy(call, vdi):
    db = call.db
    names = call.simulator.names("VDI", vdi)
    _fail_on(call, "vdi_destroy_error", vdi=names)
    with db.lock:
        record = db.get("VDI", vdi)
        if record is None:
            raise XapiError("HANDLE_INVALID", "VDI", vdi)
        attached = any(db.get("VBD", vbd)["currently_attached"] for vbd in record["VBDs"])
        if (attached or call.simulator.attached.get(vdi)
                or call.faults.take("vdi_in_use", host=call.host, vdi=names)):
            raise XapiError("VDI_IN_USE", vdi, "destroy")
        if db.get("SR", record["SR"])["content_type"] == "iso":
            raise XapiError("SR_OPERATION_NOT_SUPPORTED", record["SR"])
        call.world.forget_disk(vdi)


_NEEDED = {
    "VDI": ("name_label", "name_description", "SR", "virtual_size", "type", "sharable",
            "read_only", "other_config"),
    "VBD": ("VM", "VDI", "userdevice", "bootable", "mode", "type", "empty", "other_config",
            "qos_algorithm_type", "qos_algorithm_params"),
    "VIF": ("device", "network", "VM", "MAC", "MTU", "other_config", "qos_algorithm_type",
            "qos_algorithm_params"),
}


def _given_record(call, cls, given):
    """A record as a call's argument: all that has no default must be there."""
    record = schema.new_record(cls)
    for name in _NEEDED[cls]:
        if name not in given:
            raise XapiError("FIELD_TYPE_ERROR", "Field %s not present in rpc" % name)
    for name, value in given.items():
        kind = schema.TYPES[cls].get(name)
        if kind is not None:
            record[name] = _convert({"refs": "set", "date": "str"}.get(kind, kind), value)
            target = {"SR": "SR", "VM": "VM", "VDI": "VDI", "network": "network"}.get(name)
            if target and value != NULL and call.db.get(target, value) is None:
                raise XapiError("HANDLE_INVALID", target, value)
    record["uuid"] = ""
    return record


@_method("VDI.create", "map", is_async=True)
def _vdi_create(call, given):
    record = _given_record(call, "VDI", given)
    if record["type"] not in ("user", "system", "ephemeral", "suspend"):
        raise XapiError("VDI_INCOMPATIBLE_TYPE", NULL, record["type"])
    return "<value>%s</value>" % create_vdi(call, record=record)


def create_vdi(caller, record=None, sr=NULL, name="", size=0, **fields):
    """Make a disk, of a record or of its fields; rounds its size as storage of vhds does."""
    if record is None:
        record = schema.new_record(
            "VDI", SR=sr, name_label=name, virtual_size=size, type=fields.pop("type", "user"),
            **{key: value.copy() if hasattr(value, "copy") else value
               for key, value in fields.items()})
    db, simulator = caller.db, caller.simulator
    with db.lock:
        storage = db.get("SR", record["SR"])
        if storage is None:
            raise XapiError("HANDLE_INVALID", "SR", record["SR"])
        if storage["content_type"] == "iso":
            raise XapiError("SR_OPERATION_NOT_SUPPORTED", record["SR"])
        if not any(caller.world.sees(host, record["SR"]) for host in caller.world.hosts):
            raise XapiError("SR_HAS_NO_PBDS", record["SR"])
        fault = simulator.faults.take("vdi_create_error", host=caller.host)
        if fault:
            raise XapiError(*fault.get("error_info", _NO_SPACE))
        if simulator.settings["round_disks"]:
            record["virtual_size"] += -record["virtual_size"] % (2 << 20)
        if record["virtual_size"] > 2040 << 30:
            raise XapiError("SR_BACKEND_FAILURE_79", "", "VDI Invalid size", "")
        free = storage["physical_size"] - storage["physical_utilisation"]
        if storage["type"] in world.THICK and record["virtual_size"] > free:
            raise XapiError(*_NO_SPACE)
        record["allowed_operations"] = [
            "clone", "copy", "destroy", "snapshot", "update", "resize"]
        return caller.world.new_disk(record)


_NO_SPACE = ["SR_BACKEND_FAILURE_44", "", "There is insufficient space", ""]


@_method("VDI.resize", "ref:VDI int", is_async=True)
def _vdi_resize(call, vdi, size):
    with call.db.lock:
        record = call.db.get("VDI", vdi)
        if any(call.db.get("VBD", vbd)["currently_attached"] for vbd in record["VBDs"]):
            raise XapiError("VDI_IN_USE", vdi, "resize")
        if size < record["virtual_size"]:
            raise XapiError("SR_BACKEND_FAILURE_79", "", "VDI Invalid size: shrinking", "")
        content = call.world.content(vdi)
        if call.simulator.settings["round_disks"]:
            size += -size % (2 << 20)
        call.db.contents[vdi] = disks.Written(size, content)
        call.db.set("VDI", vdi, "virtual_size", size)


@_method("VBD.create", "map", is_async=True)
def _vbd_create(call, given):
    db = call.db
    record = _given_record(call, "VBD", given)
    with db.lock:
        vm = db.get("VM", record["VM"])
        if vm is None:
            raise XapiError("HANDLE_INVALID", "VM", record["VM"])
        used = {db.get("VBD", vbd)["userdevice"] for vbd in vm["VBDs"]}
        if record["userdevice"] == "autodetect":
            record["userdevice"] = next(str(k) for k in range(255) if str(k) not in used)
        if record["userdevice"] in used:
            raise XapiError("DEVICE_ALREADY_EXISTS", record["userdevice"])
        if record["type"] == "CD" and record["mode"] != "RO":
            raise XapiError("VBD_CDS_MUST_BE_READONLY")
        if record["type"] != "CD" and (record["empty"] or record["VDI"] == NULL):
            raise XapiError("VBD_NOT_REMOVABLE_MEDIA", NULL)
        if record["mode"] == "RW" and db.get("VDI", record["VDI"])["read_only"]:
            raise XapiError("VDI_READONLY", record["VDI"])
        return "<value>%s</value>" % db.insert("VBD", record)


@_method("VBD.destroy", "ref:VBD", is_async=True)
def _vbd_destroy(call, vbd):
    with call.db.lock:
        if call.db.get("VBD", vbd)["currently_attached"]:
            raise XapiError("OPERATION_NOT_ALLOWED", "VBD is still attached")
        call.db.delete("VBD", vbd)


# --- networks -------------------------------------------------------------------------------------

@_method("VIF.create", "map", is_async=True)
def _vif_create(call, given):
    record = _given_record(call, "VIF", given)
    with call.db.lock:
        used = {call.db.get("VIF", vif)["device"]
                for vif in call.db.get("VM", record["VM"])["VIFs"]}
        if record["device"] in used:
            raise XapiError("DEVICE_ALREADY_EXISTS", record["device"])
        return "<value>%s</value>" % call.db.insert("VIF", record)


@_method("VIF.destroy", "ref:VIF", is_async=True)
def _vif_destroy(call, vif):
    with call.db.lock:
        if call.db.get("VIF", vif)["currently_attached"]:
            raise XapiError("OPERATION_NOT_ALLOWED", "VIF is still attached")
        call.db.delete("VIF", vif)


@_method("PIF.forget", "ref:PIF", is_async=True)
def _pif_forget(call, pif):
    with call.db.lock:
        call.db.delete("PIF", pif)


@_method("network.destroy", "ref:network", is_async=True)
def _network_destroy(call, network):
    with call.db.lock:
        record = call.db.get("network", network)
        if record["VIFs"]:
            raise XapiError("NETWORK_CONTAINS_VIF", record["VIFs"][0])
        if record["PIFs"]:
            raise XapiError("NETWORK_CONTAINS_PIF", record["PIFs"][0])
        call.db.delete("network", network)


# --- tasks and events -----------------------------------------------------------------------------

@_method("task.create", "str str")
def _task_create(call, label, description):
    task = call.db.insert(
        "task", name_label=label, name_description=description, created=now(),
        allowed_operations=["cancel", "destroy"],
        resident_on=call.world.hosts[call.world.master])
    call.simulator.task_sessions[task] = call.session
    return "<value>%s</value>" % task


@_method("task.cancel", "ref:task")
def _task_cancel(call, task):
    with call.db.lock:
        if call.db.get("task", task)["status"] == "pending":
            call.simulator.cancelled.add(task)
            call.db.set("task", task, "current_operations", {new_ref(): "cancel"})


@_method("task.destroy", "ref:task")
def _task_destroy(call, task):
    with call.db.lock:
        if call.db.get("task", task)["status"] in ("pending", "cancelling"):
            call.simulator.doomed_tasks.add(task)
        else:
            call.db.delete("task", task)


@_method("task.set_progress", "ref:task float")
def _task_set_progress(call, task, value):
    call.db.set("task", task, "progress", value)


@_method("event.from", "set str float")
def _event_from(call, classes, token, timeout):
    db = call.db
    try:
        since = int(token.split(",")[0]) if token else -1
    except ValueError:
        raise XapiError("EVENT_FROM_TOKEN_PARSE_FAILURE", token) from None
    names = {name.lower() for name in classes}

    def wanted(cls, ref):
        return "*" in names or cls.lower() in names or "%s/%s" % (
            cls.lower(), ref.lower()) in names

    deadline = time.monotonic() + timeout
    with db.lock:
        if since < 0:
            events = [(db.generation, cls, ref, "add") for cls, table in db.tables.items()
                      if cls != "session" for ref in table if wanted(cls, ref)]
        else:
            events = db.changes_since(since, wanted)
        while not events and since >= 0:
            left = deadline - time.monotonic()
            if left <= 0:
                break
            db.changed.wait(left)
            _still_there(call)
            events = db.changes_since(since, wanted)
        encoded = xmlrpc.array(_event(db, *event) for event in events)
        counts = xmlrpc.struct([
            (cls.lower(), "<value><i4>%d</i4></value>" % len(table))
            for cls, table in db.tables.items() if cls != "session"])
        return xmlrpc.struct([
            ("events", encoded), ("valid_ref_counts", counts),
            ("token", "<value>%020d,%020d</value>" % (db.generation, db.generation))])


def _still_there(call):
    if call.db.get("session", call.session) is None:
        raise XapiError("SESSION_INVALID", call.session)


def _event(db, generation, cls, ref, operation):
    members = [
        ("id", "<value>%d</value>" % generation), ("timestamp", "<value>0.0</value>"),
        ("class", "<value>%s</value>" % cls.lower()),
        ("operation", "<value>%s</value>" % operation),
        ("ref", "<value>%s</value>" % ref)]
    if operation != "del":
        members.append(("snapshot", db.xml(cls, ref)))
    return xmlrpc.struct(members)


# --- hosts ----------------------------------------------------------------------------------------

@_method("host.get_server_certificate", "ref:host")
def _host_certificate(call, host):
    return "<value>%s</value>" % call.simulator.certificate_of(host)


@_method("host.get_servertime", "ref:host")
def _host_servertime(call, host):
    return "<value><dateTime.iso8601>%s</dateTime.iso8601></value>" % now()

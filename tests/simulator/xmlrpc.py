# SPDX-License-Identifier: GPL-3.0-or-later
"""XML-RPC as xapi speaks it: integers as untyped text, errors as a Status/ErrorDescription."""

import re
import xmlrpc.client

from . import schema

_SPECIAL = re.compile("[&<>\"'\x00-\x08\x0b\x0c\x0e-\x1f]")
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&apos;"}


def escape(text):
    """Text inside an element; control characters are dropped, as xapi does."""
    if _SPECIAL.search(text) is None:
        return text
    return _SPECIAL.sub(lambda match: _ENTITIES.get(match.group(), ""), text)


def _text(value):
    return "<value>%s</value>" % escape(str(value))


def _bool(value):
    return "<value><boolean>%d</boolean></value>" % bool(value)


def _float(value):
    return "<value><double>%.16g</double></value>" % value


def _date(value):
    return "<value><dateTime.iso8601>%s</dateTime.iso8601></value>" % value


def _set(value):
    return "<value><array><data>%s</data></array></value>" % "".join(map(_text, value))


def _map(value):
    return struct([(key, _text(item)) for key, item in value.items()])


def struct(members):
    """A struct of (name, encoded value) pairs."""
    return "<value><struct>%s</struct></value>" % "".join(
        "<member><name>%s</name>%s</member>" % (escape(name), value) for name, value in members)


def array(values):
    """An array of encoded values."""
    return "<value><array><data>%s</data></array></value>" % "".join(values)


ENCODERS = {
    "str": _text, "int": _text, "ref": _text, "bool": _bool, "float": _float, "date": _date,
    "set": _set, "refs": _set, "map": _map,
}



def _member(name, kind, value):
    return "<member><name>%s</name>%s</member>" % (name, ENCODERS[kind](value))


# Most fields have their default, of which the text is made once.
_RECORD_PARTS = {
    cls: [(name, kind, schema.DEFAULTS[cls][name], _member(name, kind, schema.DEFAULTS[cls][name]))
          for name, kind in types.items()]
    for cls, types in schema.TYPES.items()
}


def record(cls, fields, missing=()):
    """A whole record of the class, or one without the missing fields, encoded."""
    parts = ["<value><struct>"]
    for name, kind, default, text in _RECORD_PARTS[cls]:
        if name in missing:
            continue
        value = fields[name]
        parts.append(text if value == default else _member(name, kind, value))
    parts.append("</struct></value>")
    return "".join(parts)


_HEAD = '<?xml version="1.0"?><methodResponse><params><param><value><struct><member><name>'
_TAIL = "</member></struct></value></param></params></methodResponse>"


def success(value):
    """The response to a call that succeeded; value is encoded text, or a list of its parts."""
    parts = [_HEAD, "Status</name><value>Success</value></member><member><name>Value</name>"]
    parts += value if isinstance(value, list) else [value]
    parts.append(_TAIL)
    return "".join(parts).encode("utf-8")


def failure(error_info):
    """The response to a call that failed: the code, then its parameters."""
    return "".join((
        _HEAD, "Status</name><value>Failure</value></member><member><name>ErrorDescription</name>",
        _set(error_info), _TAIL,
    )).encode("utf-8")


def parse_call(body):
    """(method, parameters) of a request; raises ValueError when it is none."""
    try:
        parameters, method = xmlrpc.client.loads(body)
    except Exception as error:
        raise ValueError("not a method call: %s" % error) from None
    if method is None:
        raise ValueError("not a method call")
    return method, list(parameters)

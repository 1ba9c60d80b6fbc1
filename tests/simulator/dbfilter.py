# SPDX-License-Identifier: GPL-3.0-or-later
"""The filter language of ``get_all_records_where``."""

import re

from . import schema

_TOKEN = re.compile(r'\s*(?:(\(|\)|=)|"([^"]*)"|([a-z]+))')


class BadFilter(ValueError):
    """The expression is not one."""


def compile_filter(cls, expression):
    """A function (ref, record) -> bool; raises BadFilter."""
    parser = _Parser(cls, expression)
    test = parser.either()
    if parser.tokens:
        raise BadFilter(expression)
    return test


class _Parser:
    def __init__(self, cls, expression):
        self.cls = cls
        self.tokens = []
        position = 0
        expression = expression.strip()
        while position < len(expression):
            match = _TOKEN.match(expression, position)
            if match is None:
                raise BadFilter(expression)
            sign, literal, word = match.groups()
            kind = "literal" if literal is not None else sign or word
            self.tokens.append((kind, literal))
            position = match.end()

    def next(self, wanted=None):
        if not self.tokens or (wanted and self.tokens[0][0] != wanted):
            raise BadFilter("expected %s" % (wanted or "more"))
        return self.tokens.pop(0)

    def take(self, word):
        if self.tokens and self.tokens[0][0] == word:
            self.tokens.pop(0)
            return True
        return False

    def either(self):
        left = self.both()
        while self.take("or"):
            left = self._any(left, self.both())
        return left

    def both(self):
        left = self.single()
        while self.take("and"):
            left = self._all(left, self.single())
        return left

    @staticmethod
    def _any(left, right):
        return lambda ref, record: left(ref, record) or right(ref, record)

    @staticmethod
    def _all(left, right):
        return lambda ref, record: left(ref, record) and right(ref, record)

    def single(self):
        kind, _ = self.next()
        if kind == "not":
            inner = self.single()
            return lambda ref, record: not inner(ref, record)
        if kind == "(":
            inner = self.either()
            self.next(")")
            return inner
        if kind in ("true", "false"):
            return lambda ref, record: kind == "true"
        if kind == "field":
            return self.comparison()
        raise BadFilter(kind)

    def comparison(self):
        name = self.next("literal")[1]
        self.next("=")
        literal = self.next("literal")[1]
        if name in ("_ref", "ref"):
            return lambda ref, record: ref == literal
        field = schema.DB_NAMES[self.cls].get(name)
        if field is None:
            raise BadFilter("no field %s" % name)
        kind = schema.TYPES[self.cls][field]
        return lambda ref, record: schema.to_db(kind, record[field]) == literal

# SPDX-License-Identifier: GPL-3.0-or-later
"""Reads what `check` prints as strictly as the guidelines of monitoring plugins define it."""
import collections
import re

# value: a number; unit: s, B, ... or ""; warn, crit: ranges as texts, "" where there is none.
Figure = collections.namedtuple("Figure", "value unit warn crit")
STATES = {"OK": 0, "WARNING": 1, "CRITICAL": 2, "UNKNOWN": 3}
NUMBER = r"-?[0-9]+(?:\.[0-9]+)?"
RANGE = r"@?(?:(?:%s|~):)?(?:%s)?" % (NUMBER, NUMBER)
TOKEN = re.compile(r"('(?:[^'=|]|'')+'|[^'=| ]+)=(%s)(s|us|ms|%%|B|c|)"
                   r"(?:;(%s)(?:;(%s)(?:;(?:%s)?(?:;(?:%s)?)?)?)?)?" % (
                       NUMBER, RANGE, RANGE, NUMBER, NUMBER))


class Answer:
    """What a plugin said: state, text, figures {label: Figure}, more lines."""

    def __init__(self, result, name="VMBACKUP"):
        lines = result.out.split("\n")
        assert lines.pop() == "", "the last line has an end"
        match = re.match(r"%s (OK|WARNING|CRITICAL|UNKNOWN) - ([^|]+?)(?: \| ([^|]+))?\Z" % name,
                         lines[0])
        assert match, lines[0]
        assert not any("|" in line or re.search("[\x00-\x1f\x7f]", line) for line in lines[1:])
        assert len(lines[0].encode("utf-8")) < 4096
        self.state, self.text, self.more = match.group(1), match.group(2), lines[1:]
        assert STATES[self.state] == result.status, result
        assert result.err == ""
        self.figures = {}
        for token in (match.group(3) or "").split(" ") if match.group(3) else ():
            found = re.match(TOKEN.pattern + r"\Z", token)
            assert found, token
            label, value, unit, warn, crit = found.groups()
            assert label not in self.figures
            self.figures[label] = Figure(float(value), unit, warn or "", crit or "")

    def alerts(self):
        """{label: WARNING or CRITICAL} of the figures outside their ranges."""
        found = {}
        for label, figure in self.figures.items():
            if figure.crit and outside(figure.value, figure.crit):
                found[label] = "CRITICAL"
            elif figure.warn and outside(figure.value, figure.warn):
                found[label] = "WARNING"
        return found


def outside(value, text):
    """Whether a range (start:end, ~:end, start:, end, @ in front: inside) says that it alerts."""
    start, colon, end = text.lstrip("@").partition(":")
    if not colon:
        start, end = "", start
    low = float("-inf") if start == "~" else float(start or 0)
    high = float(end) if end else float("inf")
    assert low <= high
    return (low <= value <= high) == text.startswith("@")

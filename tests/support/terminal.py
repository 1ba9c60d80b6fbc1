# SPDX-License-Identifier: GPL-3.0-or-later
"""A pseudo terminal with a run in it; what it shows is worked out here.

The fixture `terminal` comes to the tests through conftest.py.
"""
import codecs
import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time

import pytest
from tools.environment import ROOT

from support.harness import LINE

DRIVER = """
import sys, time
import vmbackup
real, jump, constants = time.monotonic, sys.argv.pop(1), eval(sys.argv.pop(1))
if jump:  # a file that tells how many seconds this clock is ahead
    time.monotonic = lambda: real() + float(open(jump).read())
for name, value in constants.items():
    getattr(vmbackup, name)
    setattr(vmbackup, name, value)
sys.exit(vmbackup.main())
"""


def start(words, stdin, stdout, stderr, terminal=False, env=None, jump="", constants=None):
    """A run like that of the command line, with these constants and clock; with `terminal` standard
    input is the one that controls it."""
    clean = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "TZ": "UTC", "TERM": "xterm",
             "PYTHONPATH": str(ROOT)}
    clean.update(env or {})
    command = [sys.executable, "-c", DRIVER, str(jump), repr(constants or {})]
    return subprocess.Popen(
        command + [str(word) for word in words],
        env={key: value for key, value in clean.items() if value is not None},
        stdin=stdin, stdout=stdout, stderr=stderr, start_new_session=True,
        preexec_fn=(lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0)) if terminal else None)


class Terminal:
    """A terminal with a run in it.

    raw: all bytes that came. rows: the lines that scrolled away, as a screen shows them. row: the
    line with the cursor. erased: what stood in a line that was rewritten. colours: of each of
    `rows` the [(SGR parameters, text), ...].
    """

    def __init__(self, *words, columns=100, stdout=None, stderr=None, **options):
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.process = start(words, slave, stdout or slave, stderr or slave, True, **options)
        os.close(slave)
        self.raw, self.rows, self.erased, self.colours = b"", [], [], []
        self._cells, self._at, self._colour, self._left = [], 0, "", ""
        self._decoder = codecs.getincrementaldecoder("utf-8")()

    @property
    def row(self):
        return "".join(char for char, _ in self._cells)

    def echoes(self):
        return bool(termios.tcgetattr(self.master)[3] & termios.ECHO)

    def type(self, text):
        os.write(self.master, text.encode("utf-8"))

    def until(self, condition, seconds=30):
        """Reads on until something is shown; fails if it never is."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, (self.rows, self.row)
            if not self._read(0.1):
                assert condition(), (self.rows, self.row)
                return

    def end(self):
        """Reads to the end of the run; returns its exit status."""
        deadline = time.monotonic() + 60
        try:
            while self._read(1):
                assert time.monotonic() < deadline, (self.rows, self.row)
            return self.process.wait(30)
        finally:
            self.close()

    def close(self):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        if self.master is not None:
            os.close(self.master)
            self.master = None

    def asks(self):
        """Waits for the question for the password; what is typed then does not show."""
        self.until(lambda: "assword" in self.row)
        assert not self.echoes(), "asked before the echo was off"

    def hang_up(self):
        master, self.master = self.master, None
        os.close(master)

    def _read(self, seconds):
        if not select.select([self.master], [], [], seconds)[0]:
            return True
        try:
            data = os.read(self.master, 65536)
        except OSError:  # EIO: nobody has it open any more
            return False
        self.raw += data
        self._show(self._left + self._decoder.decode(data))
        return bool(data)

    def _show(self, text):
        self._left = ""
        while text:
            escape = re.match(r"\x1b\[([0-9;]*)([A-Za-z])", text)
            if escape:
                text = text[escape.end():]
                assert escape.group(2) in "mK", escape.group()
                if escape.group(2) == "m":
                    self._colour = escape.group(1).strip("0")
                else:
                    assert not escape.group(1)
                    self._erase()
            elif text[0] == "\x1b":
                assert len(text) < 10, text
                self._left, text = text, ""
            else:
                self._put(text[0])
                text = text[1:]

    def _erase(self):
        if self._cells and not self._at:
            self.erased.append(self.row)
        del self._cells[self._at:]

    def _put(self, char):
        if char == "\r":
            self._at = 0
        elif char == "\n":
            self.rows.append(self.row)
            runs = []
            for cell, colour in self._cells:
                if runs and runs[-1][0] == colour:
                    runs[-1] = (colour, runs[-1][1] + cell)
                else:
                    runs.append((colour, cell))
            self.colours.append(runs)
            self._cells, self._at = [], 0
        else:
            assert char.isprintable(), repr(char)
            self._cells[self._at:self._at + 1] = [(char, self._colour)]
            self._at += 1


@pytest.fixture
def terminal():
    """terminal(words..., options) is a Terminal, which ends with the test."""
    made = []

    def make(*words, **options):
        made.append(Terminal(*words, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


def assert_log(lines):
    """Each is one whole line of the log, nothing of a progress line in it."""
    for line in lines:
        assert LINE.match(line), line
        assert " of about " not in line and line.count(" - 20") == 0, line

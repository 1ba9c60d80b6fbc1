# SPDX-License-Identifier: GPL-3.0-or-later
"""A simulated XenServer / XCP-ng pool: XAPI over HTTPS, in a process of its own.

Start it with ``python3 tests/simulator --demo``; see ``__main__.py`` for the options, ``pool.py``
for describing pools, ``faults.py`` for everything that can be made to go wrong and ``client.py``
for driving it from a test.
"""

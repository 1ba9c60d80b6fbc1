# SPDX-License-Identifier: GPL-3.0-or-later
"""What is run around the tests: virtual environments, the benchmark, the build of vmbackup.pyz."""

# SPDX-License-Identifier: GPL-3.0-or-later
"""What the tests are made with: a user's site, a pool's world, servers, a disk that fails."""

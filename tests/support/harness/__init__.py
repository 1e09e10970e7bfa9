# SPDX-License-Identifier: Apache-2.0
"""What the tests of whole daemons share: processes, clients, guests, and models of disks."""

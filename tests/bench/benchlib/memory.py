# SPDX-License-Identifier: Apache-2.0
"""Memory of a process. Without other modules of ours: boot_run.py takes it into its emulated machine."""

import re


def resident_less_guest(pid, guest_bytes):
    """Resident bytes of all mappings but those of the guest's size or more."""
    total = 0
    size = 0
    with open(f"/proc/{pid}/smaps", encoding="ascii", errors="replace") as f:
        for line in f:
            head = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
            if head:
                size = int(head.group(2), 16) - int(head.group(1), 16)
            elif line.startswith("Rss:") and size < guest_bytes:
                total += int(line.split()[1]) * 1024
    return total

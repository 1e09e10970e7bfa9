# SPDX-License-Identifier: Apache-2.0
"""What tests with Debian's stock kernel share: where it comes from, and what runs it."""

import os
import re
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "support"))
# pylint: disable=wrong-import-position
from harness.daemon import minivmm
from harness.scene import Scene, run

from emulated_host import debian, qemu

# Kept between runs: a few downloads.
PACKAGES = os.environ.get("MINIVMM_PACKAGES", os.path.expanduser("~/.cache/minivmm/packages"))
os.environ["PATH"] += ":/usr/sbin:/sbin"


def hardware():
    """Whether this host's KVM runs any guest: what `check-host` says."""
    _, text = run([minivmm(), "check-host"])
    return re.search(r"(?m)^ok +kvm ", text) is not None


class StockKernel(Scene):
    """self.kernel and self.busybox, or the test is skipped and says why."""

    def can_run(self):
        return qemu()

    def setUp(self):
        super().setUp()
        if not self.can_run():
            self.skipTest("no qemu-system-x86_64 to emulate a machine that this one is not")
        try:
            self.kernel = debian.kernel(PACKAGES)
            self.busybox = debian.busybox(PACKAGES)
        except debian.NoPackage as e:
            self.skipTest(f"no stock kernel: {e}")

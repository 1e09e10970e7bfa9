#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What the options of a guest's disk do: errors of the host, snapshots, CD-ROMs, the old register
window; and which processors threads run on."""

import glob
import hashlib
import os
import re
import signal
import sys
import unittest

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "..", "support"))
from harness.daemon import SHELL
from harness.scene import MIB, SLOW, Scene, wait_until


class Errors(Scene):
    def faulty(self, op, errno, count, options):
        """A guest on a disk whose first `count` requests of a kind fail."""
        self.create("disk", MIB, "-f", "raw")
        return self.boot("--probe", "--disk", f"driver=fault,node-name=disk0,op={op},errno={errno},"
                                   f"count={count},file.driver=file,file.filename=disk{options}")

    def paused(self, vm):
        _, line = vm.errors.wait(lambda l: "the guest is paused" in l)
        self.assertIn(f"kill -USR2 {vm.pid}", line)
        return line

    def test_reported_unless_said_otherwise(self):
        vm = self.faulty("write", "ENOSPC", 1, "")
        vm.failed_job("write length=4096")
        vm.job("write length=4096")
        vm.job("verify length=4096")

    def test_ignored(self):
        vm = self.faulty("write", "EIO", 1, ",werror=ignore")
        vm.job("write length=4096 pattern=0x5a")
        # It was lost, and the log says so.
        vm.job("verify length=4096 pattern=zero")
        self.assertTrue(any("write of 4096 bytes at sector 0 failed" in l
                            for l in vm.errors.lines))

    def test_stopped_and_gone_on_with(self):
        for op, key, job in (("write", "werror", "write"), ("read", "rerror", "read"),
                             ("flush", "werror", "flush")):
            vm = self.faulty(op, "EIO", 2, f",{key}=stop")
            begun = vm.begin_job(job + ("" if op == "flush" else " length=4096"))
            self.assertIn("disk0: ", self.paused(vm))
            vm.send(signal.SIGUSR1)
            vm.errors.wait(lambda l: "guest: paused" in l)
            # The second failure pauses it again.
            vm.send(signal.SIGUSR2)
            vm.errors.wait(lambda l: "the guest goes on" in l)
            at = vm.errors.count()
            vm.errors.wait(lambda l: "the guest is paused" in l, at - 1)
            vm.send(signal.SIGUSR2)
            self.assertTrue(vm.job_result(begun)[0])
            self.assert_ended(vm, 0, signal.SIGTERM)

    def test_what_fails_again_at_once_pauses_again(self):
        # While the signal's thread is still letting the guest go on.
        times = 300
        vm = self.faulty("read", "EIO", times, ",rerror=stop")
        begun = vm.begin_job("read length=4096")
        at = -1
        for _ in range(times):
            at, _ = vm.errors.wait(lambda l: "the guest is paused" in l, at + 1)
            vm.send(signal.SIGUSR2)
        self.assertTrue(vm.job_result(begun)[0])

    def test_a_paused_guest_can_be_ended(self):
        vm = self.faulty("write", "EIO", 0, ",werror=stop")
        vm.begin_job("write length=64K bs=4096")
        self.paused(vm)
        vm.send(signal.SIGTERM)
        self.assertEqual(vm.wait(), 0, vm.errors.text())

    def test_only_no_space_stops(self):
        vm = self.faulty("write", "EIO", 1, ",werror=enospc")
        vm.failed_job("write length=4096")
        self.assert_ended(vm, 0, signal.SIGTERM)
        vm = self.faulty("write", "ENOSPC", 1, ",werror=enospc")
        begun = vm.begin_job("write length=4096")
        self.paused(vm)
        vm.send(signal.SIGUSR2)
        self.assertTrue(vm.job_result(begun)[0])
        vm.job("verify length=4096")

    def test_going_on_where_nothing_is_paused_does_nothing(self):
        self.create("disk", MIB, "-f", "raw")
        vm = self.boot("--disk", "disk,format=raw")
        vm.send(signal.SIGUSR2)
        vm.job("write length=4096")
        self.assert_ended(vm, 0, signal.SIGTERM)
        serve = self.daemon("serve", "--disk", "disk,format=raw,id=x,ro", "--nbd",
                            "nbd+unix:///?socket=m.sock", "--export", "x")
        serve.send(signal.SIGUSR2)
        self.assert_ended(serve, 0, signal.SIGTERM)


class Resets(Scene):
    def test_a_thousand_resets(self):
        self.create("disk", MIB, "-f", "qcow2")
        vm = self.boot("--disk", "disk,num-queues=4", "--io-threads", "2")
        for i in range(10):
            begun = [vm.begin_job("reset") for _ in range(100)]
            vm.output.wait(lambda l: l.startswith("probe: reset ok"), begun[-1][0], 60)
            vm.job(f"write length=64K pattern={i + 1}")
            vm.job(f"verify length=64K pattern={i + 1}")
        done = [l for l in vm.output.lines if l.startswith("probe: reset")]
        self.assertEqual(done, ["probe: reset ok disk=0"] * 1000)


class Hostile(Scene):
    def test_a_hostile_guest_hurts_nobody_else(self):
        self.create("disk", 4 * MIB, "-f", "qcow2")
        self.create("other", MIB, "-f", "raw")
        vm = self.boot("--disk", "disk,num-queues=4", "--disk", "other,format=raw,id=other",
                       "--io-threads", "2")
        vm.job("write disk=1")
        seed = self.random.randrange(1 << 32)
        print(f"hostile seed={seed}", flush=True)
        vm.job(f"hostile disk=0 seed={seed} count={2000 if SLOW else 200}", limit=300)
        vm.job("verify disk=1")
        vm.job("write disk=0")
        vm.job("verify disk=0")
        vm.type("exit")
        self.assert_ended(vm)
        self.check("disk")


class Kinds(Scene):
    def digest(self, name):
        with open(self.path(name), "rb") as f:
            return hashlib.sha256(f.read()).hexdigest()

    def test_a_snapshot_leaves_the_image_alone(self):
        self.create("raw", MIB, "-f", "raw")
        self.create("overlay", MIB, "-f", "qcow2", "-b", self.path("raw"), "-F", "raw")
        before = {name: self.digest(name) for name in ("raw", "overlay")}
        vm = self.boot("--disk", "overlay,snapshot=on,id=disk0",
                       "--disk", "driver=raw,node-name=disk1,snapshot=on,file.driver=file,"
                                 "file.filename=raw")
        for disk in (0, 1):
            vm.job(f"write disk={disk}")
            vm.job(f"verify disk={disk}")
        # Others may look at the image meanwhile.
        self.check("overlay")
        vm.type("exit")
        self.assert_ended(vm)
        self.assertEqual(before, {name: self.digest(name) for name in ("raw", "overlay")})
        self.assertEqual(sorted(os.listdir(self.dir)), ["overlay", "raw"])

    def test_a_cdrom_is_read_only_with_large_blocks(self):
        self.create("iso", MIB, "-f", "raw")
        vm = self.boot("--disk", "iso,format=raw,media=cdrom")
        vm.job("info")
        text = "\n".join(vm.output.lines)
        self.assertRegex(text, r" blk_size=2048 ")
        vm.failed_job("write length=4096")
        self.assertIn("cannot be written to",
                      self.refused("boot", "--disk", "driver=null,size=1M,media=cdrom,"
                                                     "read-only=off"))

    def test_an_encrypted_disk_is_opened_by_its_secret(self):
        secret = ("--object", "secret,id=s,data=password")
        for name, driver, create, opens in (
                ("luks", "luks", "key-secret=s,iter-time=10", "key-secret=s"),
                ("inside", "qcow2", "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10",
                 "encrypt.key-secret=s,encrypt.unlock-time=60"),
                ("aes", "qcow2", "encrypt.format=aes,encrypt.key-secret=s", "encrypt.key-secret=s")):
            self.create(name, MIB, *secret, "-f", driver, "-o", create)
            self.assertIn("key-secret' is required", self.refused("boot", "--disk", name))
            vm = self.boot(*secret, "--disk", f"{name},{opens}")
            vm.job("write offset=64K length=8K pattern=0x5a")
            vm.type("exit")
            self.assert_ended(vm)
            with open(self.path(name), "rb") as file:
                self.assertNotIn(b"\x5a" * 64, file.read())
            vm = self.boot(*secret, "--disk", f"{name},{opens}")
            vm.job("verify offset=64K length=8K pattern=0x5a")
        self.assertIn("options of its own", self.refused(
            "boot", *secret, "--disk", "aes,encrypt=s"))

    def test_threads_run_where_they_are_told(self):
        mine = sorted(os.sched_getaffinity(0))
        vm = self.boot("--disk", f"driver=memory,size={MIB}", "--io-threads", "2",
                       "--pin", f"vcpu0={mine[-1]}", "--pin", f"io1={mine[0]}")
        found = {}
        for task in glob.glob(f"/proc/{vm.pid}/task/*"):
            with open(task + "/comm", encoding="ascii") as comm:
                found[comm.read().strip()] = os.sched_getaffinity(int(os.path.basename(task)))
        self.assertEqual(found["vcpu0"], {mine[-1]}, found)
        io = {name: where for name, where in found.items() if re.search(r"io-?1$", name)}
        self.assertEqual(list(io.values()), [{mine[0]}], found)
        for pin, text in (("vcpu1=0", "the threads are vcpu0 to vcpu0"), ("vcpu0=1023", "processor"),
                          ("vcpu0", "THREAD=CPUS"), ("vcpu0=3-1", "THREAD=CPUS")):
            self.assertIn(text, self.refused("boot", "--pin", pin))


if __name__ == "__main__":
    unittest.main()

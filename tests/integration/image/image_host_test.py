# SPDX-License-Identifier: Apache-2.0
"""`minivmm check-host`, and the command's own help."""
import json
import os
import pty
import subprocess
import unittest

MINIVMM = os.environ.get("MINIVMM", "minivmm")


def run(*arguments):
    return subprocess.run([MINIVMM, *arguments], capture_output=True, text=True, timeout=60,
                          stdin=subprocess.DEVNULL)


def run_on_terminal(environment):
    main, side = pty.openpty()
    process = subprocess.Popen([MINIVMM, "check-host"], stdout=side, stderr=side,
                               stdin=subprocess.DEVNULL, env=environment)
    os.close(side)
    out = b""
    while True:
        try:
            piece = os.read(main, 4096)
        except OSError:  # the other side is closed
            break
        if not piece:
            break
        out += piece
    process.wait(timeout=60)
    os.close(main)
    return out


class CheckHost(unittest.TestCase):
    def test_json_says_what_the_exit_status_says(self):
        done = run("check-host", "--output=json")
        told = json.loads(done.stdout)
        items = {item["name"]: item for item in told["items"]}
        for name in ("kernel", "processors", "memory", "kvm", "io_uring", "fuse", "huge pages",
                     "nbd module"):
            self.assertIn(items[name]["state"], ("ok", "limited", "missing"))
            self.assertTrue(items[name]["text"], name)
        lacking = [i for i in told["items"] if i["needed"] and i["state"] == "missing"]
        self.assertEqual(told["can-run"], not lacking)
        self.assertEqual(done.returncode, 1 if lacking else 0)
        # What is lacking comes with what to do about it.
        for item in told["items"]:
            if item["state"] != "ok":
                self.assertTrue(item["advice"], item)

    def test_agrees_with_the_machine(self):
        items = {i["name"]: i for i in json.loads(run("check-host", "--output=json").stdout)["items"]}
        if not os.path.exists("/dev/kvm"):
            self.assertEqual(items["kvm"]["state"], "missing")
        if not os.path.exists("/dev/fuse"):
            self.assertEqual(items["fuse"]["state"], "missing")
        if os.path.exists("/sys/module/nbd"):
            self.assertEqual(items["nbd module"]["state"], "ok")
        self.assertIn(os.uname().release, items["kernel"]["text"])
        self.assertIn(f"{len(os.sched_getaffinity(0))} usable", items["processors"]["text"])

    def test_colour_only_on_a_terminal_and_only_if_wanted(self):
        self.assertNotIn("\033", run("check-host").stdout)
        wanted = {k: v for k, v in os.environ.items() if k != "NO_COLOR"}
        self.assertIn(b"\033[", run_on_terminal(wanted))
        self.assertNotIn(b"\033", run_on_terminal({**wanted, "NO_COLOR": "1"}))

    def test_refuses_what_it_does_not_know(self):
        for arguments in (["file"], ["--output=xml"], ["--nope"]):
            self.assertEqual(run("check-host", *arguments).returncode, 1)


class Help(unittest.TestCase):
    def test_every_command_teaches_by_example(self):
        image = [["image", name] for name in
                 ("amend", "bench", "bitmap", "check", "commit", "compare", "convert", "create", "dd", "info", "map",
                  "measure", "rebase", "resize")]
        for command in (*image, ["check-host"], ["image"]):
            done = run(*command, "--help")
            self.assertEqual(done.returncode, 0, command)
            self.assertIn("Usage: minivmm " + " ".join(command), done.stdout)
            self.assertIn("Examples:", done.stdout)

    def test_an_unknown_command_is_named(self):
        done = run("image", "nope")
        self.assertEqual(done.returncode, 1)
        self.assertIn("unknown command 'image nope'", done.stderr)



if __name__ == "__main__":
    unittest.main(verbosity=1)

#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The manual and the completion of the shells know the options that --help knows: each of them, and
no others. A new option that is not written down fails here."""

import os
import re
import shutil
import subprocess
import unittest

MINIVMM = os.environ["MINIVMM"]
MAN = os.environ["MINIVMM_MAN"]
COMPLETION = os.environ["MINIVMM_COMPLETION"]

UPDATE = os.environ["MINIVMM_UPDATE"]


def read(*path):
    with open(os.path.join(*path), encoding="utf-8") as f:
        return f.read()


def help_text(command):
    return subprocess.run([MINIVMM, *command.split(), "--help"], check=True, timeout=60,
                          stdout=subprocess.PIPE).stdout.decode()


def help_options(command):
    """The options in the tables of --help: lines such as `  -f [ --format ] FORMAT (=raw)`."""
    found = set()
    for line in help_text(command).splitlines():
        head = re.match(r" {2}(-[^ ]+(?: \[ --[a-z-]+ \])?)(?: |$)", line)
        if head:
            found.update(re.findall(r"--?[a-zA-Z][a-z-]*", head.group(1)))
    return found


def listed_commands(*command):
    text = help_text(" ".join(command)).split("Commands:\n", 1)[1].split("\n\n")[0]
    return re.findall(r"(?m)^  ([a-z-]+) {2,}", text)


# All of them, whichever there are; those of image and of nbd have one page.
GROUPS = ("image", "nbd")
PAGES = {name: (name,) for name in listed_commands() if name not in GROUPS}
for group in GROUPS:
    PAGES[group] = tuple(f"{group} {name}" for name in listed_commands(group))
COMMANDS = tuple(command for commands in PAGES.values() for command in commands)


def disk_keys():
    """The keys that --help names for --disk."""
    text = re.sub(r"\s+", " ", help_text("serve"))
    text = text[text.index("Keys: id=") + 6:text.index("A comma inside")]
    return {key.split("=")[0].strip() for key in re.split(r",(?![^(]*\))", text.rstrip(". "))} - {""}


class Help(unittest.TestCase):
    def test_the_tables_are_understood(self):
        # What the other tests stand on.
        self.assertIn("--disk", help_options("serve"))
        self.assertIn("--shared-memory", help_options("boot"))
        self.assertLessEqual({"-f", "--format", "-T", "-U", "--force-share"},
                             help_options("image check"))
        self.assertLessEqual({"id", "cache", "ro", "locking"}, {k.split()[0] for k in disk_keys()})


class Manual(unittest.TestCase):
    def page(self, name):
        return read(MAN, f"minivmm{'-' + name if name else ''}.1")

    def page_options(self, text):
        """The options that are headings: the line behind .TP or .TQ."""
        found = set()
        for line in re.findall(r"^\.T[PQ]\n(.*)$", text, re.M):
            # Shifts of the font end a word; the roff hyphen is a hyphen.
            words = re.sub(r"\\f.", " ", line.replace("\\-", "-"))
            found.update(re.findall(r"(?<![\w-])--?[a-zA-Z][a-z-]*(?![\w-])", words))
        return found

    def test_every_option_is_in_its_page_and_no_other(self):
        for name, commands in PAGES.items():
            with self.subTest(page=name):
                wanted = set().union(*(help_options(c) for c in commands))
                self.assertEqual(self.page_options(self.page(name)), wanted)

    def test_every_key_of_a_disk_is_in_the_pages(self):
        for name in ("boot", "serve"):
            text = self.page(name).replace("\\-", "-")
            for key in disk_keys():
                self.assertRegex(text, rf"(?m)^\.BI? .*\b{re.escape(key.split()[0])}\b|^\.BR .*\b{key}\b",
                                 f"{key} is not in the page of {name}")

    def test_every_command_is_in_the_first_page(self):
        text = self.page("").replace("\\-", "-")
        listed = listed_commands()
        self.assertIn("serve", listed)
        for command in listed:
            self.assertIn(f"\n.B {command}\n", text)

    @unittest.skipUnless(shutil.which("groff"), "groff is not installed")
    def test_the_pages_are_sound(self):
        for name in ("", *PAGES):
            page = os.path.join(MAN, f"minivmm{'-' + name if name else ''}.1")
            done = subprocess.run(["groff", "-man", "-Tutf8", "-ww", "-z", page], timeout=60,
                                  stdout=subprocess.PIPE, stderr=subprocess.PIPE, check=True)
            said = [l for l in done.stderr.decode().splitlines() if "cannot adjust line" not in l
                    and "can't break line" not in l and "cannot break line" not in l]
            self.assertEqual(said, [])
            self.assertNotIn("@", re.sub(r"\S+@\S+\.\S+", "", read(page)), "a place not filled in")


class Image(unittest.TestCase):
    def test_what_is_written_from_the_help_is_up_to_date(self):
        done = subprocess.run(["python3", UPDATE, MINIVMM, "--check"], timeout=60,
                              stdout=subprocess.PIPE, check=False)
        self.assertEqual((done.stdout.decode(), done.returncode), ("", 0))


class Bash(unittest.TestCase):
    FILE = os.path.join(COMPLETION, "minivmm.bash")

    def complete(self, line, cwd=None):
        """What bash would offer behind `line`."""
        script = ('source "$1"; COMP_LINE=$2 COMP_POINT=${#2}; _minivmm; '
                  'printf "%s\\n" "${COMPREPLY[@]}"')
        done = subprocess.run(["bash", "--norc", "-c", script, "bash", self.FILE, line], cwd=cwd,
                              timeout=60, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              check=True)
        self.assertEqual(done.stderr, b"")
        return set(done.stdout.decode().split("\n")) - {""}

    def test_every_option_is_offered_and_no_other(self):
        for command in COMMANDS:
            with self.subTest(command=command):
                self.assertEqual(self.complete(f"minivmm {command} -"), help_options(command))

    def test_commands(self):
        self.assertEqual(self.complete("minivmm "), set(listed_commands()))
        self.assertEqual(self.complete("minivmm se"), {"serve"})
        for group in GROUPS:
            self.assertEqual(self.complete(f"minivmm {group} "), set(listed_commands(group)))

    def test_keys_of_a_disk(self):
        offered = self.complete("minivmm serve --disk a.qcow2,id=x,")
        # Readline replaces only what follows the last '='.
        keys = {o.split(",")[-1].rstrip("=") for o in offered}
        self.assertLessEqual({k.split()[0] for k in disk_keys()}, keys)
        self.assertEqual(self.complete("minivmm serve --disk a.qcow2,form"), {"a.qcow2,format="})
        self.assertEqual(self.complete("minivmm serve --disk=a.qcow2,format=q"), {"qcow2"})

    def test_nodes_of_an_export(self):
        line = "minivmm boot --disk a,id=root --disk b --nbd systemd --export "
        self.assertEqual(self.complete(line), {"root", "disk1"})

    def test_values(self):
        self.assertEqual(self.complete("minivmm serve --io-backend "),
                         {"auto", "io_uring", "epoll"})
        self.assertEqual(self.complete("minivmm check-host --output=j"), {"json"})
        self.assertEqual(self.complete("minivmm image info --output=j"), {"json"})
        self.assertEqual(self.complete("minivmm image create -f q"), {"qcow2"})
        self.assertIn("manual_test.py", self.complete("minivmm boot --kernel man",
                                                      cwd=os.path.dirname(__file__)))


class Zsh(unittest.TestCase):
    FILE = os.path.join(COMPLETION, "_minivmm")

    def test_every_option_is_there_and_no_other(self):
        text = read(self.FILE)
        arrays = {}
        for name, body in re.findall(r"(?ms)^  (\w+)=\(\n(.*?)^  \)", text):
            words = re.sub(r"\[.*?\].*", "", body)  # descriptions and what follows
            words = re.sub(r"'\([^)]*\)'", "", words)  # what excludes each other
            arrays[name] = set(re.findall(r"--?[a-zA-Z][a-z-]*", words))
        arrays["help"] = {"-h", "--help"}
        for command in COMMANDS:
            with self.subTest(command=command):
                group, _, name = command.partition(" ")
                if group in GROUPS:
                    self.assertEqual(self.group_options(text, group, name), help_options(command))
                    continue
                line = re.search(rf"(?m)^ +{command.split()[-1]}\) _arguments (?:-s )?(.*)$", text)
                used = re.findall(r"\$(\w+)", line.group(1))
                self.assertEqual(set().union(*(arrays[a] for a in used)), help_options(command))

    def group_options(self, text, group, name):
        text = text[text.index(f"\n_minivmm_{group}() {{"):]
        body = re.search(rf"(?ms)^    {name}\) _arguments -s(.*?);;$", text).group(1)
        heads = re.findall(r"(?m)^ +'(?:\([^)]*\)'\{([^}]*)\}|\*?(-[^\[]*)\[)", body)
        return {name for head in heads for name in "".join(head).split(",")}

    @unittest.skipUnless(shutil.which("zsh"), "zsh is not installed")
    def test_syntax(self):
        subprocess.run(["zsh", "-n", self.FILE], check=True, timeout=60)


class Fish(unittest.TestCase):
    FILE = os.path.join(COMPLETION, "minivmm.fish")

    def test_every_option_is_there_and_no_other(self):
        offered = {command: set() for command in COMMANDS}
        for line in read(self.FILE).splitlines():
            if not line.startswith("complete -c minivmm"):
                continue
            where = re.search(r'-n "__minivmm_in ([^"]*)"', line)
            if where is None and "-n " in line and "not __minivmm_in_image" not in line:
                continue
            head = re.sub(r'-(?:n|d|a) "[^"]*"', "", line)
            options = {"--" + o for o in re.findall(r" -l ([a-z-]+)", head)}
            options |= {"-" + o for o in re.findall(r" -s ([a-zA-Z])", head)}
            for command, known in offered.items():
                if where is None and command.split()[0] in GROUPS:
                    continue
                if where is None or command.replace(" ", "-") in where.group(1).split():
                    known |= options
        for command in COMMANDS:
            with self.subTest(command=command):
                self.assertEqual(offered[command], help_options(command))

    @unittest.skipUnless(shutil.which("fish"), "fish is not installed")
    def test_syntax(self):
        subprocess.run(["fish", "-n", self.FILE], check=True, timeout=60)


if __name__ == "__main__":
    unittest.main(verbosity=2)

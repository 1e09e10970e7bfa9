# SPDX-License-Identifier: Apache-2.0
"""What servers and clients with TLS need: a key, or an authority and certificates. The file names
are those that QEMU, libnbd and nbdkit have in common."""

import os
import shutil

from . import processes

EC = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]


class Secret:
    """Made once for a workplace, in a directory there."""

    kind = ""
    _made = {}

    @classmethod
    def of(cls, workplace):
        if (workplace, cls) not in cls._made:
            directory = workplace.file(cls.kind)
            os.mkdir(directory, 0o700)
            cls._made[workplace, cls] = cls(directory)
        return cls._made[workplace, cls]

    def __init__(self, directory):
        self.directory = directory

    def qemu_object(self):
        return f"tls-creds-{self.kind},id=tls0,endpoint=server,dir={self.directory}"


class Keys(Secret):
    """A pre-shared key, alice's."""

    kind = "psk"

    def __init__(self, directory):
        super().__init__(directory)
        self.file = os.path.join(directory, "keys.psk")
        with open(self.file, "w", encoding="ascii") as f:
            f.write(f"alice:{os.urandom(32).hex()}\n")

    def uri(self, export, socket):
        return f"nbds+unix://alice@/{export}?socket={socket}&tls-psk-file={self.file}"

    def nbdkit_option(self):
        return f"--tls-psk={self.file}"


class Certificates(Secret):
    """An authority, and what it has signed for the server and for a client."""

    kind = "x509"

    def __init__(self, directory):
        super().__init__(directory)
        if not shutil.which("openssl"):
            raise processes.Failed("openssl is needed to make certificates")
        processes.run(["openssl", "req", "-x509", "-days", "2", "-subj", "/CN=authority", *EC,
                       "-keyout", self._file("ca-key"), "-out", self._file("ca-cert")], 30)
        for role in ("server", "client"):
            self._issue(role)

    def _file(self, name):
        return os.path.join(self.directory, f"{name}.pem")

    def _issue(self, role):
        names = os.path.join(self.directory, "names")
        with open(names, "w", encoding="ascii") as f:
            f.write("subjectAltName=IP:127.0.0.1,DNS:localhost\n")
        processes.run(["openssl", "req", *EC, "-subj", f"/CN={role}", "-keyout",
                       self._file(f"{role}-key"), "-out", self._file("request")], 30)
        processes.run(["openssl", "x509", "-req", "-days", "2", "-in", self._file("request"),
                       "-CA", self._file("ca-cert"), "-CAkey", self._file("ca-key"),
                       "-CAcreateserial", "-extfile", names, "-out",
                       self._file(f"{role}-cert")], 30)

    def uri(self, export, socket):
        return f"nbds+unix:///{export}?socket={socket}&tls-certificates={self.directory}"

    def nbdkit_option(self):
        return f"--tls-certificates={self.directory}"

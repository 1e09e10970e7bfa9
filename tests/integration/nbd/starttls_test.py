#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What was agreed on before STARTTLS is forgotten, nothing that was said in the clear is taken for
something that was said under TLS, and exports are for whom they are meant for."""

import os
import socket
import ssl
import struct
import subprocess
import sys
import time
import unittest

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "..", "support"))
from harness.scene import MIB, Scene, have

LIMIT = 20.0
IHAVEOPT = 0x49484156454F5054
LIST, STARTTLS, INFO, GO, STRUCTURED, LIST_META, SET_META, EXTENDED = 3, 5, 6, 7, 8, 9, 10, 11
ACK, SERVER, INFO_REPLY = 1, 2, 3
POLICY, INVALID, TLS_REQD, EXT_REQD = 0x80000002, 0x80000003, 0x80000005, 0x8000000A
SIMPLE, CHUNK = 0x67446698, 0x668E33EF
READ, STATUS, DISC = 0, 7, 2


def named(name):
    return struct.pack(">I", len(name)) + name.encode()


def go_data(name):
    return named(name) + struct.pack(">H", 0)


def contexts(name, *wanted):
    return named(name) + struct.pack(">I", len(wanted)) + b"".join(named(each) for each in wanted)


class Talk:
    """A client that says what it is told to, in the clear and then under TLS."""

    def __init__(self, case, path):
        self.socket = socket.socket(socket.AF_UNIX)
        case.addCleanup(lambda: self.socket.close())
        self.socket.settimeout(LIMIT)
        self.socket.connect(path)
        self.exactly(18)
        self.socket.sendall(struct.pack(">I", 3))

    def exactly(self, length):
        out = b""
        while len(out) < length:
            piece = self.socket.recv(length - len(out))
            if not piece:
                raise ConnectionResetError("the server closed the connection")
            out += piece
        return out

    @staticmethod
    def option_bytes(option, data=b""):
        return struct.pack(">QII", IHAVEOPT, option, len(data)) + data

    def answers(self):
        """[(type, data)] up to the final one."""
        out = []
        while True:
            _, _, kind, length = struct.unpack(">QIII", self.exactly(20))
            out.append((kind, self.exactly(length)))
            if kind == ACK or kind & 0x80000000:
                return out

    def option(self, option, data=b""):
        self.socket.sendall(self.option_bytes(option, data))
        return self.answers()

    def final(self, option, data=b""):
        return self.option(option, data)[-1][0]

    def wrap(self, directory=None, version=None):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        if version:
            context.set_ciphers("ALL:@SECLEVEL=0")  # or OpenSSL itself would refuse old ones
            context.minimum_version = context.maximum_version = version
        if directory:
            context.load_cert_chain(f"{directory}/client-cert.pem", f"{directory}/client-key.pem")
        self.socket = context.wrap_socket(self.socket, suppress_ragged_eofs=False)

    def start_tls(self, directory=None, version=None):
        if self.final(STARTTLS) != ACK:
            raise OSError("no TLS")
        self.wrap(directory, version)

    def request(self, kind, length=512):
        """Sends a request of the usual form; returns the answer's magic and error."""
        self.socket.sendall(struct.pack(">IHHQQI", 0x25609513, 0, kind, 77, 0, length))
        magic, = struct.unpack(">I", self.exactly(4))
        if magic == SIMPLE:
            error, cookie = struct.unpack(">IQ", self.exactly(12))
            self.exactly(length if kind == READ and error == 0 else 0)
        else:
            _, type_, cookie, size = struct.unpack(">HHQI", self.exactly(16))
            data = self.exactly(size)
            error = struct.unpack(">I", data[:4])[0] if type_ & 0x8000 else 0
        assert cookie == 77
        return magic, error

    def is_closed(self):
        try:
            return self.socket.recv(1) == b""
        except (ConnectionError, ssl.SSLError):
            return True


@unittest.skipUnless(have("openssl"), "openssl is not installed")
class StartTls(Scene):
    def setUp(self):
        super().setUp()
        self.make_certificates("pki", "/O=Example/CN=carol")
        self.create("disk", MIB, "-f", "raw")

    def make_certificates(self, name, client):
        """A server and a client of one authority."""
        directory = self.path(name)
        os.mkdir(directory)

        def openssl(*words):
            subprocess.run(["openssl", *words], cwd=directory, check=True,
                           stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        openssl("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
                "-keyout", "ca-key.pem", "-out", "ca-cert.pem", "-subj", "/CN=authority", "-days", "2")
        for who, subject in (("server", "/CN=localhost"), ("client", client)):
            openssl("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout",
                    f"{who}-key.pem", "-out", f"{who}.csr", "-subj", subject)
            openssl("x509", "-req", "-in", f"{who}.csr", "-CA", "ca-cert.pem", "-CAkey", "ca-key.pem",
                    "-CAcreateserial", "-out", f"{who}-cert.pem", "-days", "2")

    def serve(self, *more, tls="optional", **of_object):
        keys = "".join(f",{key.replace('_', '-')}={value}" for key, value in of_object.items())
        return self.daemon(
            "serve", "--disk", "disk,format=raw,id=disk",
            "--object", f"tls-creds-x509,id=t,endpoint=server,dir={self.path('pki')}{keys}",
            "--nbd", f"nbd+unix:///?socket={self.path('s')},tls-creds=t,tls={tls}",
            "--export", "disk,writable", *more)

    def test_what_was_agreed_on_before_is_forgotten(self):
        self.serve(verify_peer="off")
        # (before, after, magic of an answer to READ, error of BLOCK_STATUS)
        for before, after, magic, error in (
                ((STRUCTURED,), (), SIMPLE, 22),
                ((STRUCTURED, SET_META), (), SIMPLE, 22),
                ((EXTENDED, SET_META), (), SIMPLE, 22),
                ((STRUCTURED, SET_META), (STRUCTURED,), CHUNK, 22),
                ((STRUCTURED, SET_META), (STRUCTURED, SET_META), CHUNK, 0)):
            with self.subTest(before=before, after=after):
                talk = Talk(self, self.path("s"))
                data = {SET_META: contexts("disk", "base:allocation")}
                for option in before:
                    self.assertEqual(talk.final(option, data.get(option, b"")), ACK)
                talk.start_tls()
                if STRUCTURED not in after:
                    # The contexts need what is not agreed on any more.
                    self.assertEqual(talk.final(SET_META, data[SET_META]), INVALID)
                for option in after:
                    self.assertEqual(talk.final(option, data.get(option, b"")), ACK)
                self.assertEqual(talk.final(GO, go_data("disk")), ACK)
                self.assertEqual(talk.request(READ), (magic, 0))
                self.assertEqual(talk.request(STATUS)[1], error)

    def test_what_is_sent_behind_starttls_in_the_clear_is_not_taken(self):
        self.serve(verify_peer="off")
        for behind in (Talk.option_bytes(STRUCTURED), Talk.option_bytes(GO, go_data("disk")),
                       Talk.option_bytes(LIST) * 20, b"\0" * 300):
            talk = Talk(self, self.path("s"))
            talk.socket.sendall(Talk.option_bytes(STARTTLS) + behind)
            self.assertEqual(talk.answers(), [(ACK, b"")])
            talk.socket.shutdown(socket.SHUT_WR)
            rest = b""
            while piece := talk.socket.recv(4096):
                rest += piece
            # An alert of TLS at most: no answer to an option.
            self.assertNotIn(struct.pack(">Q", 0x3E889045565A9), rest)
            self.assertLess(len(rest), 64)

    def test_tls_is_started_once(self):
        self.serve(verify_peer="off")
        talk = Talk(self, self.path("s"))
        talk.start_tls()
        self.assertEqual(talk.final(STARTTLS), INVALID)
        self.assertEqual(talk.final(GO, go_data("disk")), ACK)
        self.assertEqual(talk.request(READ), (SIMPLE, 0))

    def test_tls_is_of_the_present(self):
        self.serve(verify_peer="off")
        for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
            talk = Talk(self, self.path("s"))
            talk.start_tls(version=version)
            self.assertEqual(talk.final(GO, go_data("disk")), ACK)
            self.assertEqual(talk.request(READ), (SIMPLE, 0))
        for version in (ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1):
            talk = Talk(self, self.path("s"))
            with self.assertRaises((OSError, ssl.SSLError)):
                talk.start_tls(version=version)

    def test_tls_is_shut_down_before_the_connection(self):
        """The end of the connection alone could be an attacker's."""
        self.serve(verify_peer="off")
        for last in (Talk.option_bytes(2), None):
            with self.subTest(last=last):
                talk = Talk(self, self.path("s"))
                talk.start_tls()
                if last:
                    self.assertEqual(talk.final(2), ACK)
                else:
                    self.assertEqual(talk.final(GO, go_data("disk")), ACK)
                    self.assertEqual(talk.request(READ), (SIMPLE, 0))
                    talk.socket.sendall(struct.pack(">IHHQQI", 0x25609513, 0, DISC, 78, 0, 0))
                self.assertEqual(talk.socket.recv(1), b"")

    def test_exports_for_those_who_proved_to_be_somebody(self):
        self.serve("--blockdev", "driver=memory,node-name=hers,size=1M",
                   "--export", "hers,allow=CN=carol,,O=Example;O=Example,,CN=carol",
                   "--blockdev", "driver=memory,node-name=his,size=1M",
                   "--export", "his,allow=CN=dave",
                   "--blockdev", "driver=memory,node-name=known,size=1M",
                   "--export", "known,allow=*", tls="required")
        talk = Talk(self, self.path("s"))
        self.assertEqual(talk.final(LIST), TLS_REQD)
        talk.start_tls(self.path("pki"))
        names = [data[4:].decode() for kind, data in talk.option(LIST) if kind == SERVER]
        self.assertEqual(sorted(names), ["disk", "hers", "known"])
        self.assertEqual(talk.final(GO, go_data("his")), POLICY)
        self.assertEqual(talk.final(INFO, go_data("his")), POLICY)
        self.assertEqual(talk.final(STRUCTURED), ACK)
        for option in (LIST_META, SET_META):
            self.assertEqual(talk.final(option, contexts("his", "base:allocation")), POLICY)
        self.assertEqual(talk.final(GO, go_data("hers")), ACK)
        # EXPORT_NAME knows no errors.
        talk = Talk(self, self.path("s"))
        talk.start_tls(self.path("pki"))
        talk.socket.sendall(Talk.option_bytes(1, b"his"))
        self.assertTrue(talk.is_closed())

    def test_who_shows_nothing_is_nobody(self):
        """Without verify-peer a certificate is not asked for: whoever comes has proved nothing."""
        self.serve("--blockdev", "driver=memory,node-name=known,size=1M", "--export", "known,allow=*",
                   verify_peer="off")
        talk = Talk(self, self.path("s"))
        talk.start_tls(self.path("pki"))
        self.assertEqual(talk.final(GO, go_data("known")), POLICY)
        self.assertEqual(talk.final(GO, go_data("disk")), ACK)

    def test_no_certificate_or_another_authoritys(self):
        self.serve(tls="required")
        self.make_certificates("other", "/O=Example/CN=carol")
        for directory in (None, self.path("other")):
            talk = Talk(self, self.path("s"))
            with self.assertRaises((OSError, ssl.SSLError)):
                talk.start_tls(directory)
                # TLS 1.3 tells a client afterwards.
                if talk.final(GO, go_data("disk")) == ACK:
                    self.fail("it was let in")

    def test_a_client_that_does_not_go_on_is_cut_off(self):
        self.daemon("serve", "--disk", "disk,format=raw,id=disk", "--object",
                    f"tls-creds-x509,id=t,endpoint=server,dir={self.path('pki')}", "--export", "disk",
                    "--nbd", f"nbd+unix:///?socket={self.path('s')},tls-creds=t,handshake-timeout=1")
        begin = time.monotonic()
        waiting = []
        for said in (b"", b"\x16\x03\x01\x02\x00\x01", None):
            talk = Talk(self, self.path("s"))
            if said is not None:
                self.assertEqual(talk.final(STARTTLS), ACK)
                talk.socket.sendall(said)
            waiting.append(talk)
        for talk in waiting:
            self.assertTrue(talk.is_closed())
        self.assertGreater(time.monotonic() - begin, 0.9)
        self.assertLess(time.monotonic() - begin, 10)


if __name__ == "__main__":
    unittest.main()

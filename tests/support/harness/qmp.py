# SPDX-License-Identifier: Apache-2.0
"""A small QMP client."""

import json
import socket
import time

from .nbd import NbdClient
from .scene import Scene


class QmpError(Exception):
    def __init__(self, error):
        super().__init__(f"{error['class']}: {error['desc']}")
        self.error_class = error["class"]
        self.desc = error["desc"]


class Qmp:
    def __init__(self, path, negotiate=True, limit=30.0):
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(limit)
        self.socket.connect(path)
        self._waiting = b""
        self.events = []
        self.greeting = self.receive()
        if negotiate:
            self.command("qmp_capabilities")

    def receive(self):
        """The next message; None at the end."""
        while b"\n" not in self._waiting:
            piece = self.socket.recv(65536)
            if not piece:
                return None
            self._waiting += piece
        line, self._waiting = self._waiting.split(b"\n", 1)
        return json.loads(line)

    def send(self, data):
        self.socket.sendall(data if isinstance(data, bytes) else data.encode())

    def begin(self, name, /, **arguments):
        """Argument names with '-' are written with '_'."""
        message = {"execute": name}
        if arguments:
            message["arguments"] = {k.replace("_", "-"): v for k, v in arguments.items()}
        self.send(json.dumps(message))

    def answer(self):
        """The next message that is no event."""
        while True:
            message = self.receive()
            if message is None:
                raise ConnectionResetError("the control socket was closed")
            if "event" not in message:
                return message
            self.events.append(message)

    def command(self, name, /, **arguments):
        self.begin(name, **arguments)
        message = self.answer()
        if "error" in message:
            raise QmpError(message["error"])
        return message["return"]

    def event(self, name, limit=30.0):
        """Waits for an event of this name; returns its data."""
        until = time.monotonic() + limit
        while True:
            for message in self.events:
                if message["event"] == name:
                    self.events.remove(message)
                    return message.get("data", {})
            if time.monotonic() > until:
                raise TimeoutError(f"no event {name} within {limit} s")
            message = self.receive()
            if message is None:
                raise ConnectionResetError(f"the control socket was closed before {name}")
            self.events.append(message)

    def close(self):
        self.socket.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class ControlScene(Scene):
    """A test with one daemon whose control socket is c.sock and whose NBD socket is m.sock."""

    def connect(self):
        self.qmp = Qmp(self.path("c.sock"))
        self.addCleanup(self.qmp.close)

    def refuses(self, text, name, /, **arguments):
        with self.assertRaises(QmpError) as caught:
            self.qmp.command(name, **arguments)
        self.assertIn(text, caught.exception.desc)

    def nbd(self, export="disk0"):
        client = NbdClient(self.path("m.sock"), export)
        self.addCleanup(client.close)
        return client

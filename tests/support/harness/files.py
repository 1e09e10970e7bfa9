# SPDX-License-Identifier: Apache-2.0
"""A disk as a file of the FUSE mount, with the calls that Python's os module lacks."""

import ctypes
import os

FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE = 1, 2, 16

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


def fallocate(fd, mode, offset, length):
    if _libc.fallocate(fd, mode, offset, length) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


class FuseDisk:
    """The same methods as NbdClient's."""

    def __init__(self, path, flags=0):
        self.fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | flags)
        self.size = os.fstat(self.fd).st_size

    def read(self, offset, length):
        data = os.pread(self.fd, length, offset)
        if len(data) != length:
            raise OSError(5, f"short read of {len(data)} of {length}")
        return data

    def write(self, offset, data, fua=False):
        done = 0
        while done < len(data):
            done += os.pwrite(self.fd, data[done:], offset + done)
        if fua:
            os.fsync(self.fd)

    def zero(self, offset, length, fua=False, no_hole=False):
        mode = FALLOC_FL_ZERO_RANGE if no_hole else FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
        fallocate(self.fd, mode, offset, length)
        if fua:
            os.fsync(self.fd)

    def flush(self):
        os.fsync(self.fd)

    def close(self):
        try:
            os.close(self.fd)
        except OSError:
            pass  # the server is gone; the descriptor is closed all the same

"""Messages between the two processes of a job: JSON after 4 bytes of length (big endian)."""

import json
import os
import struct
from typing import Any

MAX_MESSAGE = 16 << 20
"""Bytes of one message: the arguments or the result of a call."""


class Gone(BaseException):
    """The other process ended, or said what no peer says. Not an Exception: a test or program cannot catch it by
    that.
    """


class TooLarge(ValueError):
    """A value does not fit in a message."""


_to_json = json.JSONEncoder(separators=(",", ":"), check_circular=False).encode
_from_json = json.JSONDecoder().raw_decode


def send_frame(descriptor: int, message: Any) -> None:
    """Writes one message. Raises TooLarge."""
    data = _to_json(message).encode()
    if len(data) > MAX_MESSAGE:
        raise TooLarge(f"a value of {len(data):,} bytes; at most {MAX_MESSAGE:,} pass between program and test")
    data = struct.pack(">I", len(data)) + data
    written = os.write(descriptor, data)
    if written < len(data):
        view = memoryview(data)[written:]
        while view:
            view = view[os.write(descriptor, view) :]


class Frames:
    """The messages that arrive on a descriptor."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.rest = b""

    def next(self) -> Any:
        """Raises EOFError at the end of the stream, ValueError for what is no message."""
        data = self._at_least(self.rest, 4)
        (length,) = struct.unpack_from(">I", data)
        if length > MAX_MESSAGE:
            raise ValueError(f"a message of {length} bytes")
        data = self._at_least(data, 4 + length)
        self.rest = data[4 + length :]
        return _from_json(data[4 : 4 + length].decode())[0]

    def _at_least(self, data: bytes, count: int) -> bytes:
        if len(data) >= count:
            return data
        parts, held = [data], len(data)
        while held < count:
            part = os.read(self.descriptor, 1 << 16)
            if not part:
                raise EOFError
            parts.append(part)
            held += len(part)
        return b"".join(parts)


def read_all(descriptor: int) -> bytes:
    """A file's data from its beginning."""
    size = os.fstat(descriptor).st_size
    return b"".join(iter(lambda: os.read(descriptor, size), b"")) if size else b""

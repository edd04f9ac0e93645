"""A strict reader of zips of stored entries: every byte belongs to one entry or record.

The entries lie end to end from the first byte, the central directory right behind them, its end
record (with the zip64 one where one is needed) last, and both descriptions of an entry agree
(PKWARE APPNOTE 6.3.10, sections 4.3 to 4.5). Python's zipfile is lenient in all of that.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from .strict_json import IngotError

_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_END = struct.Struct("<4s4H2IH")
_END64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR = struct.Struct("<4sIQI")
_FULL = 0xFFFFFFFF  # the value is in the zip64 extra field
_ZIP64 = 1
_UTF8 = 0x800
_MAX_NAME = 256


@dataclass(frozen=True)
class Member:
    """One stored file: `size` bytes from `offset` of the zip."""

    name: str
    offset: int
    size: int


def read_members(data: memoryview, most: int) -> Iterator[Member]:
    """The entries of a zip, at most `most`; IngotError for anything but plain stored entries."""
    count, start, end = _directory(data)
    if count > most:
        raise IngotError(f"zip: expected at most {most} entries, found {count}")
    at, expected = start, 0
    for _ in range(count):
        if at + _CENTRAL.size > end:
            raise IngotError(f"zip: expected {count} entries in its directory, found fewer")
        head = _CENTRAL.unpack_from(data, at)
        signature, _, _, flags, method, _, _, _, packed, size, *rest = head
        name_bytes, extra_bytes, comment_bytes, _, _, _, offset = rest
        if signature != b"PK\x01\x02":
            raise IngotError(f"zip: expected an entry of the directory at {at}, found none")
        behind = at + _CENTRAL.size + name_bytes
        name = _name(data, at + _CENTRAL.size, name_bytes, end)
        extra = data[behind : min(behind + extra_bytes, end)]
        size, packed, offset = _wide(name, extra, [size, packed, offset])
        _check_plain(name, flags, method, size, packed)
        if offset != expected:
            raise IngotError(f"zip: {name}: expected it at byte {expected}, found it at {offset}")
        begin = _local(data, name, offset, size)
        yield Member(name, begin, size)
        expected = begin + size
        at = behind + extra_bytes + comment_bytes
    if at != end or expected != start:
        raise IngotError(f"zip: expected its directory at byte {expected}, found it at {start}")


def _directory(data: memoryview) -> tuple[int, int, int]:
    """Entries, first byte and end of the central directory."""
    at = len(data) - _END.size
    if at < 0 or bytes(data[at : at + 4]) != b"PK\x05\x06":
        raise IngotError("zip: expected a zip without a comment, found none (cut short, perhaps)")
    _, disk, first, here, count, size, start, _ = _END.unpack_from(data, at)
    if (disk, first) != (0, 0) or here != count:
        raise IngotError("zip: expected one volume, found several")
    end = at
    locator = at - _LOCATOR.size
    if locator >= 0 and bytes(data[locator : locator + 4]) == b"PK\x06\x07":
        short = (count, size, start)
        count, size, start, end = _directory64(data, locator)
        if short != (min(count, 0xFFFF), min(size, _FULL), min(start, _FULL)):
            raise IngotError("zip: expected two end records that agree, found two that do not")
    if start + size != end:
        raise IngotError(f"zip: expected its directory to end at {end}, found {start + size}")
    return count, start, end


def _directory64(data: memoryview, locator: int) -> tuple[int, int, int, int]:
    """Entries, bytes, first byte and end of the directory, by the record before `locator`."""
    at = locator - _END64.size
    if at < 0:
        raise IngotError("zip: expected a zip64 end record, found none")
    _, disk, where, disks = _LOCATOR.unpack_from(data, locator)
    mark, length, _, _, number, first, here, count, size, start = _END64.unpack_from(data, at)
    if mark != b"PK\x06\x06" or where != at or length != 44:
        raise IngotError("zip: expected a zip64 end record before the end, found none")
    if (disk, number, first) != (0, 0, 0) or disks != 1 or here != count:
        raise IngotError("zip: expected one volume, found several")
    return count, size, start, at


def _name(data: memoryview, at: int, length: int, end: int) -> str:
    if not 0 < length <= _MAX_NAME or at + length > end:
        raise IngotError(f"zip: expected names of 1 to {_MAX_NAME} bytes, found {length}")
    name = bytes(data[at : at + length])
    if not name.isascii() or not name.decode("ascii").isprintable():
        raise IngotError(f"zip: expected names of printable ASCII, found {name!r:.90}")
    return name.decode("ascii")


def _wide(name: str, extra: memoryview, values: list[int]) -> list[int]:
    """`values` with those that are full taken from the zip64 extra field, in their order."""
    at = 0
    wide: list[int] | None = None
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        if at + 4 + length > len(extra):
            raise IngotError(f"zip: {name}: expected whole extra fields, found one cut short")
        if kind == _ZIP64:
            if wide is not None or length % 8:
                raise IngotError(f"zip: {name}: expected one zip64 field, found another")
            wide = list(struct.unpack_from(f"<{length // 8}Q", extra, at + 4))
        at += 4 + length
    found = list(values)
    for i, value in enumerate(values):
        if value == _FULL:
            if not wide:
                raise IngotError(f"zip: {name}: expected a zip64 field for its sizes, found none")
            found[i] = wide.pop(0)
    return found


def _check_plain(name: str, flags: int, method: int, size: int, packed: int) -> None:
    if flags & ~_UTF8:
        raise IngotError(f"zip: {name}: expected no flags, found {flags:#x} (encrypted, streamed)")
    if method or size != packed:
        raise IngotError(
            f"zip: {name}: expected a stored entry, found method {method}, {packed} of {size} bytes"
        )


def _local(data: memoryview, name: str, offset: int, size: int) -> int:
    """The first byte of the content, by the entry's own header, which must agree."""
    if offset + _LOCAL.size > len(data):
        raise IngotError(f"zip: {name}: expected its header at {offset}, found the end")
    head = _LOCAL.unpack_from(data, offset)
    signature, _, flags, method, _, _, _, packed, own, name_bytes, extra_bytes = head
    at = offset + _LOCAL.size
    begin = at + name_bytes + extra_bytes
    if signature != b"PK\x03\x04" or bytes(data[at : at + name_bytes]) != name.encode():
        raise IngotError(f"zip: {name}: expected its header at {offset}, found another")
    extra = data[at + name_bytes : begin]
    own, packed = _wide(name, extra, [own, packed])
    _check_plain(name, flags, method, own, packed)
    if own != size or begin + size > len(data):
        raise IngotError(f"zip: {name}: expected {size} bytes, found {own}")
    return begin

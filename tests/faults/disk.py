"""The disk as a power loss leaves it, made from a record of the changes.

Simulated: data of a file that was not synced since it was written is there, is not, is there in part, or reads as
zeros, each write for itself; a name that was not synced with its folder was made or not, according to a `Journal`. A
process that is killed loses nothing: the disk is as it was at that moment. Not simulated: bad sectors (see damage.py),
disks that lie about syncing, modes and dates.
"""

import enum
import itertools
import os
import struct
from typing import NamedTuple

HEADER = struct.Struct("<IIIIq")


class Op(enum.IntEnum):
    """Changes of a disk; their numbers are those of shim.c."""

    CREATE = 0
    TRUNCATE = 1
    WRITE = 2
    SYNC = 3
    RENAME = 4
    LINK = 5
    UNLINK = 6
    MKDIR = 7
    RMDIR = 8
    MARK = 9


class Journal(enum.Enum):
    """Which of the names that were not synced survive."""

    ALL = "all of them, as if each folder was synced"  # only data is lost
    ORDERED = "those up to a moment, the same for all folders"
    FOLDERS = "in each folder, those up to a moment of its own"
    ANY = "each, or not"


class Change(NamedTuple):
    """One change: of the path, or of the path to another; data at an offset."""

    op: Op
    path: str
    other: str
    offset: int
    data: bytes


def read_record(path, root):
    """Return the changes in a record; their paths are relative to the root."""
    content, changes, i = path.read_bytes(), [], 0
    while i < len(content):
        op, path_size, other_size, data_size, offset = HEADER.unpack_from(content, i)
        ends = [i := i + HEADER.size, i := i + path_size, i := i + other_size, i := i + data_size]
        name, other, data = (content[a:b] for a, b in itertools.pairwise(ends))
        if op != Op.MARK:
            name, other = (os.path.relpath(os.fsdecode(x), root) if x else "" for x in (name, other))
        else:
            name, other = name.decode(), ""
        changes.append(Change(Op(op), name, other, offset, data))
    return changes


class _File:
    def __init__(self, content=b""):
        self.synced = content  # for sure on disk
        self.pending = []  # changes of its data since then

    def apply(self, content, change):
        if change.op is Op.TRUNCATE:
            del content[change.offset :]
        content.extend(bytes(max(change.offset - len(content), 0)))
        content[change.offset : change.offset + len(change.data)] = change.data

    def sync(self):
        self.synced, self.pending = self.now(), []

    def now(self):
        content = bytearray(self.synced)
        for change in self.pending:
            self.apply(content, change)
        return bytes(content)

    def after_power_loss(self, rng):
        """The content, of which each change since the last sync is a matter of chance."""
        content = bytearray(self.synced)
        for change in self.pending:
            fate = rng.choice(["kept", "kept", "dropped", "torn", "zeros"])
            if fate == "dropped":
                continue
            if fate == "torn" and change.data:
                size = rng.randrange(len(change.data))
                change = change._replace(data=change.data[:size])
            elif fate == "zeros":
                change = change._replace(data=bytes(len(change.data)))
            self.apply(content, change)
        return bytes(content)


class _Folder:
    def __init__(self):
        self.names = {}


class _Naming(NamedTuple):
    """A change of names: in these folders, those get these files, or None."""

    entries: list[tuple[_Folder, str, "_File | _Folder | None"]]


class Disk:
    """A folder, to which changes are applied, and which then can lose its power."""

    def __init__(self):
        self.root = _Folder()
        self.namings = []  # all of them, of which some are on disk for sure
        self.synced = []  # for each of them, whether it is
        self.marks = []

    def apply(self, change):
        op, path, other = change.op, change.path, change.other
        if op is Op.MARK:
            self.marks.append(path)
        elif op in (Op.CREATE, Op.MKDIR):
            self._name((path, _File() if op is Op.CREATE else _Folder()))
        elif op in (Op.UNLINK, Op.RMDIR):
            self._name((path, None))
        elif op is Op.RENAME:
            self._name((path, None), (other, self._find(path)))
        elif op is Op.LINK:
            self._name((other, self._find(path)))
        elif op is Op.SYNC:
            self._sync(self._find(path))
        else:
            self._find(path).pending.append(change)

    def _find(self, path):
        found = self.root
        for name in path.split("/") if path != "." else ():
            found = found.names[name]
        return found

    def _name(self, *changes):
        entries = []
        for path, target in changes:
            parent, _, name = path.rpartition("/")
            entries.append((self._find(parent or "."), name, target))
        self.namings.append(_Naming(entries))
        self.synced.append(False)
        _rename(entries)

    def _sync(self, found):
        if isinstance(found, _File):
            found.sync()
            return
        for i, naming in enumerate(self.namings):
            self.synced[i] |= any(folder is found for folder, _, _ in naming.entries)

    def write(self, target):
        """Write the disk as it is into a new folder."""
        _write(self.root, target, _File.now)

    def write_after_power_loss(self, target, rng, journal):
        """Write the disk as a power loss may leave it into a new folder."""
        kept = self._kept(rng, journal)
        names = {}  # of each folder, as they are on disk
        for naming in (x for x, is_kept in zip(self.namings, kept, strict=True) if is_kept):
            for folder, name, found in naming.entries:
                of_folder = names.setdefault(id(folder), {})
                of_folder.pop(name, None)
                if found is not None:
                    of_folder[name] = found
        _write(self.root, target, lambda file: file.after_power_loss(rng), lambda folder: names.get(id(folder), {}))

    def _kept(self, rng, journal):
        """Return for each change of names whether it is on disk."""
        count = len(self.namings)
        if journal is Journal.ALL:
            return [True] * count
        if journal is Journal.ANY:
            return [synced or rng.random() < 0.5 for synced in self.synced]
        last = max((i for i, synced in enumerate(self.synced) if synced), default=-1)
        if journal is Journal.ORDERED:
            end = rng.randint(last + 1, count)
            return [i < end for i in range(count)]
        # A change in two folders is kept if the folder that gets the name keeps it.
        ends = {}
        owners = [id(naming.entries[-1][0]) for naming in self.namings]
        for owner in dict.fromkeys(owners):
            own = [i for i, x in enumerate(owners) if x == owner]
            synced = [n for n, i in enumerate(own, start=1) if self.synced[i]]
            ends[owner] = own[: rng.randint(max(synced, default=0), len(own))]
        return [i in ends[owner] for i, owner in enumerate(owners)]


def _rename(entries):
    for folder, name, found in entries:
        folder.names.pop(name, None)
        if found is not None:
            folder.names[name] = found


def _write(folder, target, content_of, names_of=lambda folder: folder.names):
    target.mkdir()
    for name, found in names_of(folder).items():
        if isinstance(found, _Folder):
            _write(found, target / name, content_of, names_of)
        else:
            (target / name).write_bytes(content_of(found))

"""Damage to a file that is on disk: bits that flip, blocks that are gone, files that are cut off or mixed up.

Each function damages the file `path`; `others` are further files of the run.
"""

import os
import shutil


def flip(path, others, rng):
    """Flip one bit."""
    content = bytearray(path.read_bytes())
    bit = rng.randrange(8 * len(content))
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def truncate(path, others, rng):
    """Cut the file off, perhaps at its start."""
    os.truncate(path, rng.choice([0, rng.randrange(path.stat().st_size)]))


def zero(path, others, rng):
    """Let a range read as zeros."""
    content = bytearray(path.read_bytes())
    start = rng.choice([0, rng.randrange(len(content))])
    end = rng.randint(start + 1, len(content))
    content[start:end] = bytes(end - start)
    path.write_bytes(content)


def extend(path, others, rng):
    """Add bytes at the end."""
    with path.open("ab") as file:
        file.write(rng.randbytes(rng.randint(1, 50)))


def remove(path, others, rng):
    """Remove the file."""
    path.unlink()


def swap(path, others, rng):
    """Put another file in its place, most often one of the same name."""
    alike = [x for x in others if x.name == path.name]
    shutil.copyfile(rng.choice(alike if alike and rng.random() < 0.7 else others), path)


def make_folder(path, others, rng):
    """Put a folder in its place."""
    path.unlink()
    path.mkdir()


def remove_folder(path, others, rng):
    """Remove its folder, if that is one within a step of a checkpoint, else the file."""
    if any(parent.name.isdigit() for parent in path.parent.parents):
        shutil.rmtree(path.parent)
    else:
        path.unlink()


KINDS = (flip, flip, flip, truncate, zero, extend, remove, swap, make_folder, remove_folder)

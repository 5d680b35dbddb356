"""Checkpoints of a training run: parameters, optimizer state and step, written by orbax.

A step is on disk completely or not at all, even if the process dies or the machine loses power while it is written. It
records its optimizer, the path, shape, dtype and digest of every array, and the digest of every file. `restore`
compares these and raises if they differ: nothing is cast, and no damaged step is restored.
"""

from adamjax.checkpoint._restore import Checkpoint as Checkpoint
from adamjax.checkpoint._restore import restore as restore
from adamjax.checkpoint._save import save as save
from adamjax.checkpoint._step_folder import steps as steps

"""A fault injector: disks that fail and tear writes, power that goes, processes that are killed, files that rot."""

"""Faults of adamjax that are known, and avoided here until they are mended: then their line goes, and what reads it.

`python tests/inject_faults.py --known` does not avoid them.
"""

import os

_AVOIDED = "ADAMJAX_FAULTS_KNOWN" not in os.environ

# A save that fails leaves tensorstore's threads to print "RuntimeError: Event loop is closed" beside the message.
THREADS_PRINT_TRACEBACKS = _AVOIDED
# A tuning that a signal stops before its first trial has ended is not always resumed: `--resume` ends with an error.
EARLY_STOPS_ARE_REFUSED = _AVOIDED

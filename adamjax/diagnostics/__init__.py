"""Diagnostics for Adam: measure steps in numbers, and explain problems in words."""

from adamjax.diagnostics._coordinates import CoordinateCheck as CoordinateCheck
from adamjax.diagnostics._coordinates import coordinate_check as coordinate_check
from adamjax.diagnostics._explain import Finding as Finding
from adamjax.diagnostics._explain import explain as explain
from adamjax.diagnostics._history import History as History
from adamjax.diagnostics._history import LogWriter as LogWriter
from adamjax.diagnostics._history import scalars as scalars
from adamjax.diagnostics._measure import AdamStats as AdamStats
from adamjax.diagnostics._measure import LeafStats as LeafStats
from adamjax.diagnostics._measure import measure as measure

"""Courses and states of other libraries, for the tests to compare with."""

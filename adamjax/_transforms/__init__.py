"""Gradient transformations: the rule of one array, and what carries it over a tree."""

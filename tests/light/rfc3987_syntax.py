"""Stands before the real one, a grammar that takes each process a second to build.

`jsonschema`, which nbformat asks, does without it: it would check addresses by it.
"""

raise ImportError

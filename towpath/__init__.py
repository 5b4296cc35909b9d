"""Towpath: container networking for plain Linux hosts."""

__version__ = "0.1.0"

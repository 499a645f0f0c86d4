"""Scorers that need no download: rules and small networks from PyPI packages."""

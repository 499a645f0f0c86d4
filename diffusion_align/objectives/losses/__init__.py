"""Preference losses by kind of data: pure functions, which register themselves in tables."""

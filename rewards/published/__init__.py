"""Scorers with published weights, one file each; the factory opens them by name."""

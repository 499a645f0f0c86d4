"""Measurements behind every figure in README and docs: ``python -m benchmarks NAME``, results as JSON."""

"""What comes with the package, measured: pipelines against the oracle, packed weights against their originals."""

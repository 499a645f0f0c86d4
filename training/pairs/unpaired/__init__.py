"""Learning from labelled pictures without pairs: KTO and BCO."""

"""Learning from other data than pairs: ranked lists, and labelled pictures (KTO, BCO)."""

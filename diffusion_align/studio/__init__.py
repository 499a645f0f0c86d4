"""``diffusion-align studio``: label, compare, watch and browse in a browser on one's own machine.

The server imports no torch: one spawned process (``drawing/``) draws and scores.
"""

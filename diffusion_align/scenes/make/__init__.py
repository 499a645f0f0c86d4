"""Data sets of the embedded world, each made by ``python -m diffusion_align.scenes.make.NAME OUT``."""

"""How the shipped pipelines were made: ``python -m diffusion_align.scenes.pretrain STAGE``.

Stages, in order: ``data``, ``vae``, ``sdxl``, ``sd`` (warm-started from sdxl), ``inpaint`` (from sd). Training from
nothing is no alignment method, so it does not use the alignment loop.
"""

"""How the shipped pipelines were made: ``python -m diffusion_align.scenes.pretrain STAGE``.

Stages, in order: ``data``, ``vae``, ``sdxl``, ``sd``, ``inpaint``, ``pairs``. Training from nothing is no alignment
method, so it does not use the alignment loop; each stage resumes from what the previous one left in the work folder.
"""

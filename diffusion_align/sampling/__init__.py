"""How images are made: the sampler and DDIM inversion."""

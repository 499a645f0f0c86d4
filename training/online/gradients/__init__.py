"""Reward gradients: back through the scorer, the VAE and a few steps of the model."""

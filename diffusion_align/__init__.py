"""diffusion-align."""

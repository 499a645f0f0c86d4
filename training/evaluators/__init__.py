"""Training the latent evaluators that dynamic guidance asks."""

"""What all methods that train a diffusion model share: settings, the policy, its validation and its memory."""

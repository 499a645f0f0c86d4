"""What judges latents: evaluators trained here and published ones. ``judge.load_judge`` opens them by name."""

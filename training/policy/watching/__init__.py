"""What a run that trains a diffusion model is watched for: rules, figures by timestep, divergence, report."""

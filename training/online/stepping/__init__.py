"""Sampling steps that draw fresh noise: which do, by which kind, and how far their ratios move."""

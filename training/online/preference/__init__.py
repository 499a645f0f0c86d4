"""Preference learning from own pictures, round after round."""

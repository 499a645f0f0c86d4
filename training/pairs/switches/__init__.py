"""Switches of the pair methods that go with any loss: a moving reference, a curriculum, timesteps and safeguards."""

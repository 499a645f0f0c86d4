"""One module per command of ``diffusion-align``; ``options`` holds their flags and imports nothing heavy."""

"""Methods that draw their own pictures and learn from a scorer's reward of them."""

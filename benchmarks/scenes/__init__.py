"""What was measured on the embedded world."""

"""Training scorers on judged pairs or ratings."""

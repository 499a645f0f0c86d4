"""Scorers that ``train reward`` makes, opened by the kind in their scorer.json."""

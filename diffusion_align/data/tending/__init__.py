"""Looking after data sets of pairs: exports, checks, duplicates, splits, and figures."""

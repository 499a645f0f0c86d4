"""Published preference sets and folders of other programs, read as they are and written in Pick-a-Pic's columns."""

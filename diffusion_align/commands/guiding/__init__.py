"""Options and tables of the commands that compare ways to guide."""

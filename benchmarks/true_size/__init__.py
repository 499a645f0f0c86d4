"""Models of true size, used as a user would: by the command line, from each layout, with memory watched."""

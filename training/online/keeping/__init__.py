"""Which of a prompt's pictures RAFT learns from."""

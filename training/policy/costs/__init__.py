"""What a run will need: memory, operations, disk and time, worked out without weights."""

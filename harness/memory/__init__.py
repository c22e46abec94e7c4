"""What a run will keep in memory, worked out before anything is loaded."""

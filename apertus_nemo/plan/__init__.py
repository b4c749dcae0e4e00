"""What a run will need and do, before the queue."""

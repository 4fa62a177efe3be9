"""Released checkpoints, read and written."""

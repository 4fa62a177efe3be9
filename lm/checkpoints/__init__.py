"""What a run and a model are on disk."""

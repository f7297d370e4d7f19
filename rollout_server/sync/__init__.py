"""A weight sync, from the trainer's side."""

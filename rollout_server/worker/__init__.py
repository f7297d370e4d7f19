"""What runs in the engine's process. Nothing here is imported by the trainer's."""

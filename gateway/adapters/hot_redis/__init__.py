"""What the processes of a fleet share in Redis: soft state that may be lost."""

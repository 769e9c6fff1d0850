"""SQL storage, written once for every engine."""

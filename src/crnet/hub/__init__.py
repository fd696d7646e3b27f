"""What other programs read of a checkpoint, as plain text and JSON: no transformers is imported."""

"""Robot demonstrations as batches for training."""

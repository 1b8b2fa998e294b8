"""From sources of pairs to batches of pixels and tokens."""

"""The operations that cost time: a plain PyTorch reference first in each file."""

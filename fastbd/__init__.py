"""fastbd: plant a backdoor in a CLIP-style model, pre-train, clean, and see whether it went away."""

__version__ = "0.1.0"

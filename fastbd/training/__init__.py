"""One run: what is trained, how, and the folder that it fills."""

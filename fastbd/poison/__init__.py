"""Backdoors: what is put on an image, and which pairs get it."""

"""Leaves that every room may use; the light ones import no torch."""

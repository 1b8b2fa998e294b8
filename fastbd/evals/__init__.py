"""Evaluation: zero-shot accuracy and attack success."""

"""Cleaning methods: each is what it does to the model before training, and the objective it trains with."""

from __future__ import annotations

from fastbd.cleaning import cleanclip, finetune

METHODS = {"finetune": finetune, "cleanclip": cleanclip}

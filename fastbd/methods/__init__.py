"""Cleaning methods, defences of pre-training, and objectives; config/cards.py says where each is."""

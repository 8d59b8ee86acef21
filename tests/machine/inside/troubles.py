"""Situations of an operator at three in the morning."""

"""Rows of the penalties."""

PENALTIES = []

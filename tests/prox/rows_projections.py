"""Rows of the projections."""

PROJECTIONS = []

"""Moments, reductions and what differs between backends."""

"""Compilation through XLA, and the programs that fits and attacks run."""

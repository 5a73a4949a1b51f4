"""Keeping what a model knew: closed-form fits and distillation."""

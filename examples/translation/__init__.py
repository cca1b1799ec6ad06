"""Multilingual translation with and without gradient surgery: ``python -m examples.translation``."""

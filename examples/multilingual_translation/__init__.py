"""Gradient Vaccine on multilingual translation, and the loss geometry behind it."""

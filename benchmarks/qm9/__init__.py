"""Eleven properties of real molecules with one small model: what each rule does to their errors, and what it costs."""

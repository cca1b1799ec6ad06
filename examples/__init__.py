"""Examples: complete programs on public imports only."""

"""What a rule costs on a model: ``python -m gradsurgery bench``. The repository's benchmarks measure with the same code."""

"""The two-dimensional problem on which the field compares its rules: where each rule ends, from five starts."""

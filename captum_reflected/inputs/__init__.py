"""The request: what a caller hands in, checked once, and how its rows are run."""

"""Runs over whole datasets: shared by many processes, durable, reported."""

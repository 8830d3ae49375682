"""Checks the arguments of a call, and runs batches of images through the model."""

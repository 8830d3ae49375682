"""Computes masks from relevance, and scores masked images with the model."""

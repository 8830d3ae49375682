"""Attention as the model computes it: recorded, told apart, and proved."""

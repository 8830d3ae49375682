"""Computes the relevance matrix R among tokens from recorded attention."""

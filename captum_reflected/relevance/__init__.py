"""From recorded attention to the relevance matrix R among tokens."""

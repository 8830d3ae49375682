"""Records a model's attention, finds its token layout, and verifies both."""

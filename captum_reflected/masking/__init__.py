"""From relevance to masks, and from masks to the model's scores of masked images."""

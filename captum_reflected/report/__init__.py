"""From the rows of a benchmark to tables, figures and a page."""

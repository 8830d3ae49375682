"""Runs attribution methods over a data set of images and reports how they compare."""

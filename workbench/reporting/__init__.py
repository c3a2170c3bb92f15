"""Telling it: the notebook runner and the plots. Knows files and DataFrames, never models."""

"""Putting a model on a runtime: export, and any model as a callable session."""

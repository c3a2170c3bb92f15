"""Several methods together: steps and stages, and which layer gets which number format."""

"""What is compressed: data, models, and their training."""

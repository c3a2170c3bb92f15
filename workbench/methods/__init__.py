"""One way of compressing a file. Each returns a new model; no method imports another."""

"""Compression workbench: prune, distil, deploy and measure neural networks, reproducibly.

The rooms, in the order a model passes through them:

    subjects     data, models, training: what is compressed
    methods      one way of compressing a file; each returns a new model and leaves the caller's as it was
    deployment   export to ONNX; any model as a callable session
    measures     accuracy, cost, equivalence, latency, retrieval, sensitivity: each a DataFrame or a verdict with its limit
    reporting    runs the notebooks, draws DataFrames

Beneath them stand `layers` (name, capture and replace a model's layers), `coupling` (channels that only go together),
`files` (atomic writes, checksums, progress) and `machine` (what this computer is). Importing the package imports
nothing else; import the rooms that you need:

    from workbench.subjects import data, models
"""

__version__ = "0.1.0"

"""Compression workbench: prune, distil, deploy and measure neural networks, reproducibly.

The rooms, in the order a model passes through them:

    numbers      grids, quantisers, histograms, entropy coding
    graph        a traced model: its layers by name, what follows a layer, running it node by node,
                 which channels go together
    subjects     tasks and objectives, data, models, training: what is compressed
    methods      one way of compressing a file; each returns a new model and leaves the caller's as
                 it was
    deployment   export to ONNX; any model as a session with named inputs, outputs and state
    measures     accuracy, cost, equivalence, latency, retrieval, sensitivity: each a DataFrame or a
                 verdict with its limit
    plans        several methods together: steps and stages, one model from end to end
    reporting    runs the notebooks, draws DataFrames

Beneath them stand `batches` (what a model reads and answers), `errors`, `files` (atomic writes,
checksums, progress) and `machine` (what this computer is). Importing the package imports nothing
else; import the rooms that you need:

    from workbench.subjects import data, models

Nothing is sent anywhere: ONNX Runtime reports its sessions to its maker from 1.29 on, unless it is
told not to, as it is here (ORT_DISABLE_TELEMETRY; set it to 0 yourself, and it stays so).
"""

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read once, when ONNX Runtime is imported
__version__ = "0.1.0"

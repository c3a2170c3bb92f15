"""What notebooks import, imported once: the process that loads this module is copied for each notebook of a longer run.

Nothing here may compute or start threads, which copies would not have.
"""

import os
import warnings

warnings.simplefilter("ignore")  # tqdm's, for want of a notebook here
os.environ.setdefault("MPLBACKEND", "module://matplotlib_inline.backend_inline")  # read once, when matplotlib is imported

# ruff: noqa: F401, E402, I001
import workbench.reporting.execution  # before papermill
import ipykernel.ipkernel
import ipykernel.kernelapp
import matplotlib.pyplot
import nbconvert
import onnxruntime
import onnxscript.rewriter
import pandas
import papermill
import torch._dynamo
import torch.onnx._internal.exporter._core
import torchvision
import transformers.models.bert.modeling_bert

import workbench.plans.compress
import workbench.plans.search
import workbench.reporting.plots
import workbench.subjects.data
import workbench.subjects.models
from workbench.deployment import capture

capture.table_of_operators()

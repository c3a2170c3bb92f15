"""Imported by name where a process is to be ready to export: the exporter, and the table of
operators that it builds."""

import torch.onnx._internal.exporter._core  # noqa: F401

from workbench.deployment import capture

capture.table_of_operators()

"""Pictures of converted models, and a page that holds all there is to say of one. Needs matplotlib: the extra plot.

Read in this order:

    figures    an empty figure, and how one becomes a PNG
    kernels    the kernel of a layer, its tiles, and what each edge adds
    layers     every layer of a model: tiles in use, outputs in use, rounding, errors of calibration
    fields     effective receptive fields
    speed      the times that a benchmark has measured
    page       report.html: inspection, comparison, tables, pictures, certificate
"""

from sw_transplant.report.fields import plot_receptive_field
from sw_transplant.report.kernels import plot_kernel
from sw_transplant.report.layers import plot_calibration, plot_rounding, plot_sparsity, plot_utilisation
from sw_transplant.report.page import write_report
from sw_transplant.report.speed import plot_throughput

__all__ = [
    "plot_calibration",
    "plot_kernel",
    "plot_receptive_field",
    "plot_rounding",
    "plot_sparsity",
    "plot_throughput",
    "plot_utilisation",
    "write_report",
]

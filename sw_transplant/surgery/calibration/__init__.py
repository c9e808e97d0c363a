"""Calibration: the paper's module fitted to what a trained network answers on a handful of unlabelled images.

docs/transplanting.md has the mathematics and the measurements. Read in this order:

    calibrate       the whole of it: layer after layer, in the order of execution
    options         what may be said beside the images, and the report
    images          what users give as images
    synthetic       images where there are none
    responses       running both networks side by side, looking at layers inside
    paused          forward passes that wait at each layer, so that one pass is enough
    moments         second moments of a layer's input over the taps of strips, without making shifted maps
    sums            these over all runs, for maps of any sizes
    layer           from the sums to the module
    channels        some of a layer's channels at a time, on all cores
    assembly        the taps that banks make, and normal equations from that
    fit             the least squares: bank, scales of the branches, bias
    orders          choosing the orders of the tiles
    swaps           exchanges of places, tried by the normal equations that they change
    sensitivity     what errors of channels cost downstream
    ghosts          which channels bypass a module
    budget          how many of each layer, where one budget is for all
    compensation    all channels of a layer together, making up for each other
    statistics      BatchNorm statistics, so that train mode starts from the same function
    refit           linear layers behind a module
    progress        how far it is
"""

from sw_transplant.surgery.calibration.options import Calibration, CalibrationReport, LayerReport
from sw_transplant.surgery.calibration.statistics import set_statistics

__all__ = ["Calibration", "CalibrationReport", "LayerReport", "set_statistics"]

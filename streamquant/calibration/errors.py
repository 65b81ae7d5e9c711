"""What can be wrong with a calibration."""

from __future__ import annotations

from streamquant.errors import StreamquantError


class CalibrationError(StreamquantError):
    """A calibration file is not one, is damaged, or does not fit: the layer, the other file, or the model."""

    exit_code = 10

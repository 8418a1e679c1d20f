"""From a dense model to experts: finding FFNs, reading calibration data, grouping neurons."""

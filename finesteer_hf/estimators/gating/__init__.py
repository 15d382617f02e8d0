"""Estimators of gates: scores, forms of gates, and their calibration."""

"""Estimators of gates: scores, gate functions, and their calibration."""

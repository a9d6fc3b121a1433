"""Experiments: wave scripts, presets and results; `lab` is the code that runs and judges the waves."""

from data.missing_packages import explain_missing_packages

explain_missing_packages()

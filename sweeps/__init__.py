"""Experiments: wave scripts, presets and results; `lab` is the code that runs and judges the waves."""

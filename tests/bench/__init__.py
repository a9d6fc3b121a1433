"""Benchmarks of train_gpt.py and trials of whole runs. They print numbers; pytest does not collect them."""

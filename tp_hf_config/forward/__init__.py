"""Run a class: make inputs, find the results that count as outputs, see how heads are split."""

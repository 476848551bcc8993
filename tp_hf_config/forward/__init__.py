"""Run a class: make inputs, choose the results that count as outputs, see how heads are split."""

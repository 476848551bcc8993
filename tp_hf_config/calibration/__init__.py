"""What a model's channels carry on real data, and what that is good for.

One pass over data measures what every weight reads (``calibrate``). From that come importances, and
the refit of the weights that read pruned channels, so that a pruned model needs no training to go
on speaking.
"""

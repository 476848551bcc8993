"""Measure what a model's weights read on real data, for importances and for refits."""

"""Learn which config field sets which tensor dimension, as exact expressions of the fields."""

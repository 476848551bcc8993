"""Learn which config fields set which tensor dims, as exact expressions of the fields."""

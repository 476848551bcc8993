"""Find the values of config fields from the shapes of tensors."""

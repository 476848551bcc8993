"""Find by experiments on a tiny model which tensor dims lose the same units, and prove it."""

"""How tiny-shapes was trained and how good it is; none of it ships with the package."""

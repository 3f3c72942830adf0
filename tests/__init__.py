"""A regular package, or a package `tests` that some dependency installed would be found in its place."""

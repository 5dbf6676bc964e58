"""Studies: many runs that differ in a few settings, planned, made, collected, fitted and reported."""

"""Closed-form stand-ins that the tests and benchmarks measure estimators against."""

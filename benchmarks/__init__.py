"""Benchmarks of the operator: a registry of cases, one timer, one report. Run: make bench."""

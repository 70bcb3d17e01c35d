"""Benchmarks: a registry of cases, one timer, one report. Run: involution bench."""

"""Benchmarks: registered subjects, one interleaved timer, one report. Run: involution bench."""

"""What benchmarks.sample_efficiency makes of the suite's trials: numbers, and a page."""

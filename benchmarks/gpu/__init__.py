"""What one GPU reaches with this project's own code, beside what it should: `make gpu` writes `benchmarks/gpu.md`."""

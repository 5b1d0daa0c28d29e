"""What a run loses when everything around it fails now and then: `python -m benchmarks.chaos`."""

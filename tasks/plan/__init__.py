"""What a run will take before anything runs: work by closed formulas, time and money by a cluster's stated figures."""

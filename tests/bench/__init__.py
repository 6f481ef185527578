"""`make bench`: the numbers that lrm promises, measured on real processes; docs/benchmarks.md says what and how."""

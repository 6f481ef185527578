"""What a fleet's machines and CMLs measure: read in batches, told as gauges, written to status when it matters."""

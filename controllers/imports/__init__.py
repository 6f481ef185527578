"""LabWorkerImports: existing EC2 instances become LabWorkers, many at once."""

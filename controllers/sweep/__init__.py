"""The sweep: finds EC2 instances of this installation that no LabWorker claims, and ends them where it is told to."""

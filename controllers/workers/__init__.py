"""LabWorkers: CML on EC2 hosts, from a wish to a serving machine and back."""

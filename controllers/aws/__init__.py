"""AWS as the controllers see it (`ec2`, `cloudwatch`), in which account (`accounts`), and simulated (`simulator`)."""

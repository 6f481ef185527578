"""EC2 as the controllers see it (`ec2`), what can go wrong there (`errors`), and a simulated one (`simulator`)."""

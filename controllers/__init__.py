"""What a worker, a pool, a lab instance and a lab record are, and what is done about them."""

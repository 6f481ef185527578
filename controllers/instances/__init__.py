"""Lab instances: scheduled, placed, run in containers or on CML, timed out, cleaned up."""

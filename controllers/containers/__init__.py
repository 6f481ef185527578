"""Lab instances in containers, on a Docker engine or whatever answers as one."""

"""Cisco Modeling Labs: the client, its models, and a simulator to develop and test against."""

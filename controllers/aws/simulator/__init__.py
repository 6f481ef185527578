"""A simulated AWS for development and tests: EC2's instances played exactly, the rest by moto."""

from controllers.aws.simulator.moto import DEMO_AMI, DEMO_KEY
from controllers.aws.simulator.server import AwsShim, ShimOptions

__all__ = ["DEMO_AMI", "DEMO_KEY", "AwsShim", "ShimOptions"]

"""A simulated Cisco Modeling Labs: a real HTTP server that behaves as CML does, for development and tests.

Read `machine` for what one CML is, `labs` and `licensing` for how its states move, `server` for how a request comes
in, `faults` for how it goes wrong, `control` for the surface that is not CML's. One process serves many machines, at
`/{instance_id}/api/v0/…`, and one at the root. It is not shipped to production and holds nothing on disk.
"""

from controllers.cml.simulator.command import main
from controllers.cml.simulator.faults import Fault, Faults
from controllers.cml.simulator.fleet import ROOT
from controllers.cml.simulator.machine import Machine
from controllers.cml.simulator.options import Account, Options
from controllers.cml.simulator.server import Simulator, serve

__all__ = ["ROOT", "Account", "Fault", "Faults", "Machine", "Options", "Simulator", "main", "serve"]

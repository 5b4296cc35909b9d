"""The CNI plug-ins: what a runtime's call means, from environment and stdin to exit status and stdout.

env, conf, section   read the call        network, pieces   keys → records        results   every version's form
wires, chain, mesos  one handler each     delegate          other plug-ins        server    the way of one call
"""

from .server import HANDLERS, routes, serve_cni

__all__ = ["HANDLERS", "routes", "serve_cni"]

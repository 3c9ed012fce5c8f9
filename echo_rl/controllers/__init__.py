"""Decision rules behind one interface, `echo_rl.contracts.Controller`; made by name with `make`."""

from echo_rl.controllers.registry import make, names

__all__ = ["make", "names"]

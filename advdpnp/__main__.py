"""The command `advdpnp` as a module, for `torchrun`, which starts modules."""
from advdpnp.cli import app

app(prog_name="advdpnp")

"""The quickstart's server."""

from flwr.server import ServerApp
from quickstart.server_app import server_fn

app = ServerApp(server_fn=server_fn)

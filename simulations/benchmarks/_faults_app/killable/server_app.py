"""The quickstart's server."""

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from quickstart.server_app import server_side

from hsplit_flwr.flower.apps import message_strategy

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """The run that the run config describes."""
    message_strategy(server_side(context)).start(grid)

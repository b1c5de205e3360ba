"""The server: the whole model, the shared tail, evaluation on held-out meaning representations, results."""

from flwr.app import Context
from flwr.server import ServerApp, ServerAppComponents

from hsplit_flwr.apps import server_app_components
from hsplit_flwr.model_files import ModelFiles
from hsplit_flwr.restaurants import restaurant_examples
from hsplit_flwr.run_config import read_settings
from hsplit_flwr.run_output import Sample
from hsplit_flwr.text_data import prompt_text
from quickstart.task import FOLDER, MODEL, batches

CENTRAL_EXAMPLES = 200
SAMPLES = 2


def server_fn(context: Context) -> ServerAppComponents:
    """The run that the run config describes."""
    _, held_out = restaurant_examples()
    chosen = held_out[:: max(1, len(held_out) // SAMPLES)][:SAMPLES]
    return server_app_components(
        "simulations/quickstart",
        context.run_config,
        read_settings(context.run_config, FOLDER),
        MODEL,
        ModelFiles.resolve(MODEL),
        eval_batches=batches(held_out[:CENTRAL_EXAMPLES], context.run_config, shuffle=False),
        samples=[Sample(prompt_text(e.mr), e.ref) for e in chosen],
    )


app = ServerApp(server_fn=server_fn)

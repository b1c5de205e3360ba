"""The server: the whole model, the shared tail, evaluation on held-out meaning representations, results."""

from flwr.app import Context
from flwr.server import ServerApp, ServerAppComponents

from hsplit_flwr.data.restaurants import restaurant_examples
from hsplit_flwr.data.row_batches import spread
from hsplit_flwr.data.text_batches import prompt_text
from hsplit_flwr.federation.sample_texts import Sample
from hsplit_flwr.flower.apps import ServerSide, legacy_components
from hsplit_flwr.flower.run_config import read_settings
from hsplit_flwr.models.files import ModelFiles
from quickstart.task import FOLDER, MODEL, batches, check_data

CENTRAL_EXAMPLES = 200
SAMPLES, PROMPTS = 2, 40


def server_side(context: Context) -> ServerSide:
    """What the run config describes, whichever face of Flower it is for."""
    run_config = context.run_config
    _, held_out = restaurant_examples()
    return ServerSide(
        app="simulations/quickstart",
        run_config=run_config,
        run_id=context.run_id,
        settings=read_settings(run_config, FOLDER),
        model_name=MODEL,
        files=ModelFiles.resolve(MODEL),
        eval_batches=batches(held_out[:CENTRAL_EXAMPLES], run_config, shuffle=False),
        samples=[Sample(prompt_text(e.mr), e.ref) for e in spread(held_out, SAMPLES)],
        prompts=[prompt_text(e.mr) for e in spread(held_out, PROMPTS)],
        check_data=lambda: check_data(run_config),
    )


def server_fn(context: Context) -> ServerAppComponents:
    """The run that the run config describes."""
    return legacy_components(server_side(context))


app = ServerApp(server_fn=server_fn)

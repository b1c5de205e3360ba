"""The server: the whole model, the shared tail, evaluation on valid.csv, results. On Flower's Message API."""

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from e2e_nlg.task import FOLDER, batches, check_data, model_name
from hsplit_flwr.data.e2e import validation_examples
from hsplit_flwr.data.row_batches import spread
from hsplit_flwr.data.text_batches import prompt_text
from hsplit_flwr.federation.sample_texts import Sample
from hsplit_flwr.flower.apps import ServerSide, message_strategy
from hsplit_flwr.flower.client_settings import get
from hsplit_flwr.flower.run_config import read_settings
from hsplit_flwr.models.files import ModelFiles

SAMPLES, PROMPTS = 2, 8

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """The run that the run config describes."""
    run_config = context.run_config
    name = model_name(run_config)
    held_out = validation_examples(get(run_config, "data", ""))
    central = spread(held_out, get(run_config, "central-examples", 0))
    strategy = message_strategy(
        ServerSide(
            app="simulations/e2e-nlg",
            run_config=run_config,
            run_id=context.run_id,
            settings=read_settings(run_config, FOLDER),
            model_name=name,
            files=ModelFiles.resolve(name),
            eval_batches=batches(central, run_config, shuffle=False),
            samples=[Sample(prompt_text(e.mr), e.ref) for e in spread(held_out, SAMPLES)],
            prompts=[prompt_text(e.mr) for e in spread(held_out, PROMPTS)],
            check_data=lambda: check_data(run_config),
        )
    )
    strategy.start(grid)

"""The server: the whole model, the shared tail, evaluation on what is held out, results. On Flower's Message API."""

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from hsplit_flwr.data.forms import Example
from hsplit_flwr.data.own_data import OwnData
from hsplit_flwr.data.row_batches import spread
from hsplit_flwr.federation.sample_texts import MAX_NEW_TOKENS, Sample
from hsplit_flwr.flower.apps import ServerSide, message_strategy
from hsplit_flwr.flower.client_settings import RunConfig, count_clients, get
from hsplit_flwr.flower.finetune.data import EMBEDDED, model_name, server_data
from hsplit_flwr.flower.run_config import read_settings
from hsplit_flwr.models.files import ModelFiles

SAMPLES = 3


def finetune_server(app: str, folder: Path) -> ServerApp:
    """The ServerApp of an app.

    Args:
        app: what people run, for the command in the results.
        folder: of the app's code, where its profile file may lie.
    """
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        message_strategy(server_side(app, folder, context.run_config, context.run_id)).start(grid)

    return server


def server_side(app: str, folder: Path, run_config: RunConfig, run_id: int = 0) -> ServerSide:
    """Model, data and settings that the run config names; `run_id` is Flower's, the rest as in `finetune_server`."""
    name = model_name(run_config)
    files = ModelFiles.resolve(name)
    data = server_data(run_config)
    held_out = spread(data.held_out, get(run_config, "eval-examples", 64)) if data else []
    return ServerSide(
        app=app,
        run_config=run_config,
        run_id=run_id,
        settings=read_settings(run_config, folder),
        # What is converted from GGUF goes by the converted folder, so that PEFT finds the base of the adapter.
        model_name=str(files.folder) if name.endswith(".gguf") else name,
        files=files,
        eval_batches=data.scoring_batches(held_out) or None if data else None,
        samples=samples(data, held_out) if data else (),
        check_data=lambda: check_data(folder, run_config, data),
    )


def samples(data: OwnData, held_out: list[Example]) -> list[Sample]:
    """A few held-out prompts to answer, of those that leave room for an answer."""
    room = data.settings.fit.max_length - MAX_NEW_TOKENS
    return [Sample(asked.prompt, asked.answer) for asked in data.asked(spread(held_out, SAMPLES), longest=room)]


def check_data(folder: Path, run_config: RunConfig, data: OwnData | None) -> None:
    """What every client would find out by itself; how many clients there are is known where profiles or cuts say so.

    Raises:
        ConfigError: see `OwnData.check`.
    """
    if data and get(run_config, "data", EMBEDDED):
        known = get(run_config, "cuts", "") or get(run_config, "profiles", "")
        data.check(count_clients(run_config, {}, folder) if known else None)

"""The model card of a run's adapter or merged model: what it is, how it was made, what it scored, how to repeat it."""

import json
from pathlib import Path
from typing import Literal

from hsplit_flwr.common.tables import describe_ranks, format_number
from hsplit_flwr.errors import ConfigError
from hsplit_flwr.models.quantized import QUANTIZATION_FILE, Quantization
from hsplit_flwr.reports.records import RunSummary
from hsplit_flwr.reports.run_tables import round_table, summary_table

CARD = "README.md"
TAGS = ["federated-learning", "split-learning", "lora", "flower", "hsplit_flwr"]
PAPER = "arxiv:2505.02795"
"""HSplitLoRA; as a tag it links to the paper on the hub"""
Kind = Literal["adapter", "merged model"]
_LIBRARIES: dict[Kind, str] = {"adapter": "peft", "merged model": "transformers"}


def write_card(
    folder: Path, kind: Kind, base_model: str, summary: RunSummary, quantization: Quantization | None = None
) -> None:
    """Write `CARD` into `folder`, which holds what the run made; a card that is there is replaced."""
    (folder / CARD).write_text(model_card(kind, base_model, summary, quantization), encoding="utf-8")


def model_card(kind: Kind, base_model: str, summary: RunSummary, quantization: Quantization | None = None) -> str:
    """The card as Markdown with the hub's metadata.

    Args:
        kind: what lies beside it.
        base_model: hub name or folder of the base; a folder is no name on the hub, and stays out of the metadata.
        summary: of the run.
        quantization: of the base that an adapter was trained on; None: none.
    """
    sections = {
        "How it was trained": _method(summary),
        "What it scores": _scores(summary),
        "How to load it": _loading(kind, base_model, quantization),
        "The run": f"{summary_table(summary, markdown=True)}\n\n{round_table(summary.history, markdown=True)}",
        "How to repeat it": f"```bash\n{_command(summary)}\n```",
    }
    parts = [f"## {title}\n\n{body}" for title, body in sections.items()]
    head = f"{_metadata(kind, base_model)}\n# {_title(kind, base_model)}"
    return "\n\n".join([head, *parts]) + "\n"


def push(folder: Path, repository: str, *, private: bool = False) -> str:
    """Upload an adapter or a merged model with its card to the hub; returns its address.

    Args:
        folder: `adapter`, `merged_model` or `best/round-NNNN/adapter` (which has no card) of a run.
        repository: ``user/name``; made where it does not exist.
        private: whoever it is shown to, of a repository that is made.

    Raises:
        ConfigError: `folder` holds no result, or the hub refuses it.
    """
    if not (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise ConfigError(
            f"Expected an adapter or a merged model in {folder}, found neither adapter_config.json nor config.json. "
            "Give a run's adapter or merged_model folder."
        )
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload by hsplit_flwr"))
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OSError) as error:
        raise ConfigError(
            f"Expected the hub to take {folder} as {repository!r}, found: {str(error).splitlines()[0]:.300}. "
            "Log in (hf auth login) or set HF_TOKEN, and give the repository as user/name."
        ) from error


def _metadata(kind: Kind, base_model: str) -> str:
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        base_model=None if _is_local(base_model) else base_model,
        library_name=_LIBRARIES[kind],
        pipeline_tag="text-generation",
        tags=[*TAGS, PAPER],
    )
    return f"---\n{data.to_yaml()}\n---\n"


def _title(kind: Kind, base_model: str) -> str:
    what = "LoRA adapter for" if kind == "adapter" else "Fine-tuned"
    return f"{what} {_name(base_model)}"


def _method(summary: RunSummary) -> str:
    clients = {client.client_id for record in summary.history for client in record.clients}
    cuts = sorted({client.cut for record in summary.history for client in record.clients})
    ranks = sorted({client.ranks for record in summary.history for client in record.clients})
    shared = (
        f"Federated split learning with HSplitLoRA ({PAPER}) by hsplit_flwr: {len(clients)} clients trained LoRA "
        f"adapters on their first {_either(cuts)} blocks, of ranks {_either(ranks)}, in {len(summary.history)} rounds, "
        "and sent activations to a server that trained the rest. Their data stayed with them; adapters of unequal "
        "ranks were summed without error."
    )
    settings = {key: _named(value) for key, value in sorted(summary.config.items()) if value not in ("", 0)}
    return f"{shared}\n\n```json\n{json.dumps(settings, indent=2, default=str)}\n```" if settings else shared


def _scores(summary: RunSummary) -> str:
    before, after = format_number(summary.initial_perplexity), format_number(summary.final_perplexity)
    lines = [f"Perplexity on data that were held out: {before} before training, {after} after it."]
    if summary.adapter is not None:
        exact = "equals what was trained" if summary.adapter["exact"] else "approximates what was trained"
        lines.append(
            f"The adapter {exact}: relative error {summary.adapter['relative_error']:.2g}, "
            f"ranks {describe_ranks(summary.adapter['ranks'].values())}."
        )
        if lost := summary.adapter.get("delta_error"):
            lines.append(
                f"What stands beside the quantised base lacks {lost:.2g} of what was trained (relative error)."
            )
    if summary.status == "failed":
        lines.append(f"**The run failed** after {len(summary.history)} rounds: {summary.reason}")
    return "\n\n".join(lines)


def _loading(kind: Kind, base_model: str, quantization: Quantization | None) -> str:
    if kind == "merged model":
        code = 'AutoModelForCausalLM.from_pretrained("PATH")'
        return f"```python\nfrom transformers import AutoModelForCausalLM\n\nmodel = {code}\n```"
    if quantization:
        return _loading_beside(base_model, quantization)
    return (
        "```python\nfrom peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
        f'base = AutoModelForCausalLM.from_pretrained("{_name(base_model)}")\n'
        'model = PeftModel.from_pretrained(base, "PATH")\n```'
    )


def _loading_beside(base_model: str, quantization: Quantization) -> str:
    return (
        f"It was trained on this base quantised by bitsandbytes ({quantization.method}), as `{QUANTIZATION_FILE}` "
        "says, and is for that: beside other weights, or merged into these, it is another model.\n\n"
        "```python\nimport json\n\nfrom peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM, BitsAndBytesConfig\n\n"
        f'quantized = BitsAndBytesConfig.from_dict(json.load(open("PATH/{QUANTIZATION_FILE}")))\n'
        f'base = AutoModelForCausalLM.from_pretrained("{_name(base_model)}", quantization_config=quantized)\n'
        'model = PeftModel.from_pretrained(base, "PATH")\n```'
    )


def _either(values: list[int] | list[str]) -> str:
    return " or ".join(map(str, values)) or "no"


def _command(summary: RunSummary) -> str:
    command = summary.command
    for value in summary.config.values():
        command = command.replace(str(value), str(_named(value))) if value else command
    return command


def _named(value: object) -> object:
    return _name(value) if isinstance(value, str) and value else value


def _is_local(base_model: str) -> bool:
    """A path is of the machine that trained: nobody else's, and none of their business."""
    return base_model.startswith(("/", ".", "~", "\\")) or Path(base_model).exists()


def _name(name: str) -> str:
    return Path(name).name if _is_local(name) else name

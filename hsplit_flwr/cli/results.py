"""``hsplit-flwr generate`` and ``hsplit-flwr evaluate``: a result is tried and scored, without a line of Python.

Both take a run's ``merged_model``, its ``adapter``, or any base model to compare with.
"""

import argparse
import sys
from pathlib import Path

from hsplit_flwr.cli.parsing import OneLineParser, asking_command, number


def declare(commands: "argparse._SubParsersAction[OneLineParser]") -> None:
    """Add both commands and their options."""
    generate = asking_command(commands, "generate", "what a model answers", "Ask a model, greedily.")
    generate.add_argument("--prompt", required=True, nargs="+", metavar="TEXT", help="questions, answered one by one")
    generate.add_argument("--raw", action="store_true", help="prompts are texts to continue, not messages of a user")
    number(generate, "--max-new-tokens", 128, "tokens of an answer")
    generate.set_defaults(run=run_generate)

    summary = "perplexity, answers, or tasks of lm-evaluation-harness"
    evaluate = asking_command(commands, "evaluate", summary, "Score a model on held-out examples, or on tasks.")
    source = "a .jsonl, .json, .csv or .parquet file, a folder or a name on the hub, as in docs/data.md"
    what = evaluate.add_mutually_exclusive_group(required=True)
    what.add_argument("--data", metavar="FILE", help=source)
    what.add_argument("--tasks", nargs="+", metavar="NAME", help="of lm-evaluation-harness, see `lm_eval ls tasks`")
    evaluate.add_argument("--data-split", default="train", metavar="NAME", help="of a folder or a name on the hub")
    evaluate.add_argument("--loss-on", default="", help="all, completion or assistant (default: by the form of data)")
    number(evaluate, "--max-length", 1024, "tokens of the longest row; longer ones are cut")
    number(evaluate, "--batch-size", 8, "rows or requests at a time")
    number(evaluate, "--examples", 0, "how many, evenly spaced (of a task the first ones); 0: all")
    number(evaluate, "--max-new-tokens", 64, "tokens of an answer; 0: no answers, which is faster")
    metrics = "also BLEU, NIST, METEOR, ROUGE-L and CIDEr of the answers (extra evidence)"
    evaluate.add_argument("--text-scores", action="store_true", help=metrics)
    evaluate.add_argument("--include-path", type=Path, metavar="DIR", help="YAML files of tasks of your own")
    evaluate.add_argument("--fewshot", type=int, metavar="N", help="examples in a task's prompt (default: its own)")
    evaluate.add_argument("--chat", action="store_true", help="a task's prompts are messages of a user")
    evaluate.add_argument("--json", type=Path, metavar="FILE", help="also write the score there")
    evaluate.set_defaults(run=run_evaluate)


def run_generate(options: argparse.Namespace) -> int:
    """Print an answer for every prompt."""
    from hsplit_flwr.data.chat_template import chat_template
    from hsplit_flwr.models.generation import generate_texts
    from hsplit_flwr.models.trained import load_trained

    model, tokenizer = load_trained(options.model, base=options.base)
    template = None if options.raw else chat_template(tokenizer, options.chat_template)
    prompts: list[str | list[int]] = list(options.prompt)
    if template:
        prompts = [template.ids([{"role": "user", "content": said}], to_answer=True) for said in options.prompt]
    texts = generate_texts(model, tokenizer, prompts, max_new_tokens=options.max_new_tokens)
    for said, text in zip(options.prompt, texts, strict=True):
        print(f"> {said}\n{text}\n")
    return 0


def run_evaluate(options: argparse.Namespace) -> int:
    """Print the score, and write it where asked for."""
    return _run_tasks(options) if options.tasks else _run_held_out(options)


def _run_tasks(options: argparse.Namespace) -> int:
    from hsplit_flwr.data.chat_template import chat_template
    from hsplit_flwr.models.trained import load_trained
    from hsplit_flwr.reports.harness import save_scores, score_tasks, task_table

    model, tokenizer = load_trained(options.model, base=options.base)
    if options.chat_template:
        template = chat_template(tokenizer, options.chat_template)
        tokenizer.chat_template = template.source if template else None
    scores = score_tasks(
        *(model, tokenizer, options.tasks),
        include_path=options.include_path,
        batch_size=options.batch_size,
        examples=options.examples,
        fewshot=options.fewshot,
        chat=options.chat,
    )
    print(task_table(scores))
    if options.json:
        save_scores(scores, options.json)
    return 0


def _run_held_out(options: argparse.Namespace) -> int:
    from hsplit_flwr.data.fitting import Fit
    from hsplit_flwr.data.own_data import DataSettings, OwnData
    from hsplit_flwr.data.partitions import Partition
    from hsplit_flwr.data.row_batches import spread
    from hsplit_flwr.models.trained import load_trained
    from hsplit_flwr.reports.held_out import score_held_out

    model, tokenizer = load_trained(options.model, base=options.base)
    settings = DataSettings(
        source=options.data,
        split=options.data_split,
        validation_share=0.0,
        loss_on=options.loss_on,
        chat_template=options.chat_template,
        fit=Fit(options.max_length),
        partition=Partition(),
        batch_size=options.batch_size,
    )
    data = OwnData(settings, tokenizer)
    examples = spread(data.train, options.examples)
    print(f"{data.describe_form()}, {len(examples)} of {len(data.train)} examples")
    new = options.max_new_tokens
    score = score_held_out(
        *(model, tokenizer, data, examples), max_new_tokens=new, text_scores=options.text_scores, progress=_progress
    )
    print(score.table())
    if options.json:
        score.save(options.json)
    return 0


def _progress(done: int, total: int) -> None:
    print(f"{done} of {total} answers", file=sys.stderr)

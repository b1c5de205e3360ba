"""Does a model compute the same when it is cut? Tried on its miniature before the model is first used.

The blocks of a segment see the hidden states and what the model makes of the attention mask. A model whose blocks
read more (Zamba2's read the first embeddings again, Gemma 3n's the keys of earlier blocks) would train on wrong
numbers without a word. So all blocks run one by one, cut before each of them as between head and tail, and logits and
gradients must be those of transformers' own pass. Nor may a token depend on later ones or on padding: the activations
of what nothing depends on do not travel (`exchange/positions.py`).
"""

import inspect
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter
from transformers import PretrainedConfig, PreTrainedModel

from hsplit_flwr.errors import UnsupportedModelError
from hsplit_flwr.models.block_layout import BlockLayout
from hsplit_flwr.models.failures import first_line
from hsplit_flwr.models.segments import Segment
from hsplit_flwr.models.trial import config_key, trial_batch, tried_model

LOGITS_TOLERANCE = 1e-4
"""largest difference of logits, in units of the largest one; rounding stays far below"""
GRADIENT_TOLERANCE = 1e-3
"""largest difference in the gradient of one parameter, in units of its largest entry"""
NOISE = 1e-5
"""in units of the largest gradient of all: below it is rounding (the gradients of key biases cancel, say)"""
HIDDEN = "hidden_states"
KNOWN = 4
"""tokens of a row whose logits must not depend on the others"""
Gradients = dict[str, Tensor]
_FAULTS: dict[str, str | None] = {}
"""what was found for the configs of this process"""


def require_cuttable(config: PretrainedConfig) -> None:
    """Refuses a model whose head and tail together are not the model.

    The first look at a config takes some tenths of a second, and no weights; the answer is kept for the process. The
    global random number generator stays as it was.

    Raises:
        UnsupportedModelError: logits or gradients differ, or the model cannot be cut, or not be tried; says which.
    """
    key = config_key(config)
    if key not in _FAULTS:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            _FAULTS[key] = _fault(config)
    if fault := _FAULTS[key]:
        raise UnsupportedModelError(fault)


def _fault(config: PretrainedConfig) -> str | None:
    """Why a model of this config is refused; None if it is not."""
    try:
        model, layout = tried_model(config)
        found = _finding(model, layout)
    except UnsupportedModelError as error:
        return str(error)
    return found and (
        f"Expected head and tail of a {config.model_type!r} model to compute and train what it does in one piece, "
        f"found {found}. Choose a model whose blocks use nothing but the hidden states, such as GPT-2 or LLaMA."
    )


def _finding(model: PreTrainedModel, layout: BlockLayout) -> str | None:
    """What is wrong when the model is cut, and what its blocks read besides if that is why; None if nothing is."""
    try:
        found = _difference(model, layout)
    except UnsupportedModelError:
        raise
    # Whatever the model's own code raises here, it would raise in the middle of a run.
    except Exception as error:
        further = further_inputs(model, layout)
        return f"that its blocks also read {further}, which depend on the tokens" if further else stops(error)
    if found and (further := further_inputs(model, layout)):
        return f"{found}: its blocks also read {further}, which depend on the tokens"
    return found


def stops(error: Exception) -> str:
    """What a model's own code says that runs as a whole, and not in parts."""
    return f"that it stops when it is cut: {first_line(error)}"


def _difference(model: PreTrainedModel, layout: BlockLayout) -> str | None:
    """What differs between the model's own pass and one that is cut before every block; None if nothing does."""
    batch = trial_batch(model.config)
    seen = batch["attention_mask"].bool()
    expected = model(**batch, use_cache=False).logits
    # Any loss will do: a weighted sum of the logits of all tokens.
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2)) * seen[..., None]
    expected_gradients = _backward(model, [], expected, weights)

    segment = Segment(model, layout, 0, layout.num_blocks)
    found, cuts = _pass_in_pieces(segment, batch["input_ids"], batch["attention_mask"])
    far = float(((found - expected)[seen].abs().max() / expected[seen].abs().max()).detach())
    if not far <= LOGITS_TOLERANCE:  # NaN is not
        return f"logits that differ by {far:.2g} of the largest one"
    if segment.num_blocks > 1 and (ahead := _looks_ahead(segment, batch, expected)):
        return ahead
    return _gradient_difference(expected_gradients, _backward(model, cuts, found, weights))


def _looks_ahead(segment: Segment, batch: dict[str, Tensor], expected: Tensor) -> str | None:
    """Logits that change where zeros take the place of padding and of all tokens that come later."""
    mask = batch["attention_mask"]
    known = mask.bool()
    known[:, KNOWN:] = False
    with torch.no_grad():
        hidden = segment(batch["input_ids"], mask.clone(), until=1)
        logits = segment(hidden * known[..., None], mask.clone(), entry=1)
    far = float(((logits - expected)[known].abs().max() / expected[known].abs().max()).detach())
    if far <= LOGITS_TOLERANCE:
        return None
    return f"logits that depend on later tokens or on padding (they differ by {far:.2g} of the largest one)"


def further_inputs(model: PreTrainedModel, layout: BlockLayout) -> str:
    """Names of what the blocks are given beside hidden states that depends on the tokens; empty if nothing does."""
    first, second = (_arguments(model, layout, seed) for seed in (1, 2))
    differing = {name for name, tensor in first.items() if not torch.equal(tensor, second[name])}
    return ", ".join(sorted(differing - {HIDDEN}))


def _arguments(model: PreTrainedModel, layout: BlockLayout, seed: int) -> dict[str, Tensor]:
    """Argument -> all tensors that the blocks are given by it in a pass over random tokens, as one (float64)."""
    given: dict[str, list[Tensor]] = defaultdict(list)

    def note(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments = inspect.signature(block.forward).bind(*args, **kwargs).arguments
        named = {**arguments, **arguments.pop("kwargs", {})}
        for position, (name, value) in enumerate(named.items()):
            given[HIDDEN if position == 0 else name] += [t for t in tree_iter(value) if isinstance(t, Tensor)]

    blocks = model.get_submodule(layout.blocks).children()
    hooks = [block.register_forward_pre_hook(note, with_kwargs=True) for block in blocks]
    try:
        with torch.no_grad():
            model(**trial_batch(model.config, seed), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return {
        name: torch.cat([t.flatten().double() for t in tensors]) if tensors else torch.zeros(0)
        for name, tensors in given.items()
    }


def _pass_in_pieces(segment: Segment, ids: Tensor, mask: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """The logits, and of every cut what left the block before it and the leaf that entered the block after it.

    As between head and tail no padding travels: zeros are put in its place.
    """
    cuts = []
    seen = mask.bool()[..., None]
    hidden = segment(ids, mask.clone(), until=1)
    for block in range(1, segment.num_blocks):
        sent = hidden.where(seen, 0)
        entering = sent.detach().requires_grad_()
        cuts.append((sent, entering))
        hidden = segment(entering, mask.clone(), entry=block, until=block + 1)
    return hidden, cuts


def _backward(model: PreTrainedModel, cuts: list[tuple[Tensor, Tensor]], logits: Tensor, weights: Tensor) -> Gradients:
    """Gradients of the model's parameters; at each cut that of the activations is passed on, as the tail does."""
    model.zero_grad(set_to_none=True)
    torch.autograd.backward(logits, weights)
    for left, entered in reversed(cuts):
        torch.autograd.backward(left, entered.grad)
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _gradient_difference(expected: Gradients, found: Gradients) -> str | None:
    if expected.keys() != found.keys():
        return f"no gradient of {sorted(expected.keys() ^ found.keys())[0]}"
    noise = NOISE * max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        largest = float(gradient.abs().max())
        far = float((found[name] - gradient).abs().max())
        if not far <= GRADIENT_TOLERANCE * largest + noise:
            return f"a gradient of {name} that differs by {far / max(largest, noise):.2g} of its largest entry"
    return None

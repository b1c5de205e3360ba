"""LoRA adapters on a segment, through PEFT: put in, restart, read out."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from hsplit_flwr.common.seeds import derive_seed
from hsplit_flwr.common.state import State
from hsplit_flwr.errors import ConfigError, UnsupportedModelError
from hsplit_flwr.lora.dropout import LayerDropout, PassDropout
from hsplit_flwr.lora.factors import LoraFactors, init_lora_A
from hsplit_flwr.lora.spec import LoraSpec
from hsplit_flwr.models.block_layout import PATCHING
from hsplit_flwr.models.segments import Segment, linear_shape

ADAPTER = "default"
Pairs = Mapping[str, Sequence[nn.Parameter]]
"""A and B by whole-model module name"""


class SegmentAdapters:
    """The LoRA adapters of one segment. Everything else in the segment is frozen.

    Args:
        segment: receives the adapters (PEFT replaces its linear layers in place).
        spec: ranks and alphas per module.
        module_names: whole-model names that may get an adapter; default: every linear layer of the segment.

    Raises:
        ConfigError: a target matches nothing, or a rank is above what its matrix can use.
        UnsupportedModelError: PEFT knows that adapters do not work in this architecture (Mamba).
    """

    def __init__(self, segment: Segment, spec: LoraSpec, module_names: Iterable[str] | None = None) -> None:
        linears = segment.linear_modules()
        names = spec.targets(linears if module_names is None else module_names)
        for name in names:
            limit = min(*linear_shape(linears[name]))
            if spec.rank(name) > limit:
                raise ConfigError(
                    f"Expected a rank of at most {limit} for {name}, found {spec.rank(name)}. Lower r or rank_pattern."
                )
        self._segment = segment
        self._layers = _inject(segment, spec, names) if names else {}
        self._seed = 0
        self._dropout = PassDropout()
        for name, layer in self._layers.items():
            layer.get_submodule("lora_dropout").add_module(ADAPTER, LayerDropout(name, self._dropout))

    @property
    def module_names(self) -> list[str]:
        """Whole-model names of the adapted modules, in the order of the model."""
        return list(self._layers)

    def parameters(self, names: Iterable[str] | None = None) -> list[nn.Parameter]:
        """The trainable tensors: A and B of every module, in the order of `names` (default: `module_names`)."""
        return [p for name in (self._layers if names is None else names) for p in _pair(self._layers[name])]

    def reset(self, seed: int, names: Iterable[str] | None = None) -> None:
        """Restart: B = 0, A by `seed` and the module's name (so that it does not depend on who holds what).

        Args:
            seed: of A; and of the masks of dropout from now on.
            names: of the modules that do; default: all.
        """
        self._seed = seed
        for name in self._layers if names is None else names:
            A, B = _pair(self._layers[name])
            A.data.copy_(init_lora_A(A.shape[0], A.shape[1], derive_seed(seed, name)))
            B.data.zero_()
            A.grad = B.grad = None

    def set(self, factors: Mapping[str, LoraFactors]) -> None:
        """Go on from `factors`, one for every adapted module, of its rank; ``scaling * B @ A`` stays what it was."""
        for name, layer in self._layers.items():
            A, B = _pair(layer)
            A.data.copy_(factors[name].A)
            B.data.copy_(factors[name].B * (factors[name].scaling / _scaling(layer)))
            A.grad = B.grad = None

    def adopt(self, parameters: Pairs) -> None:
        """Train these tensors from now on: A and B by module, as `parameters` of others of its rank gave them."""
        for name, (A, B) in parameters.items():
            self._layers[name].lora_A[ADAPTER].weight = A  # type: ignore[index, union-attr]
            self._layers[name].lora_B[ADAPTER].weight = B  # type: ignore[index, union-attr]

    def copies(self) -> Pairs:
        """Trainable copies of A and B by module, as they are now."""
        return {
            name: tuple(nn.Parameter(factor.detach().clone()) for factor in _pair(layer))
            for name, layer in self._layers.items()
        }

    @contextmanager
    def standing_in(self, copies: Pairs) -> Iterator[None]:
        """`copies` are what the segment computes with inside; afterwards the adapters are what they were."""
        own = {name: _pair(layer) for name, layer in self._layers.items()}
        self.adopt(copies)
        try:
            yield
        finally:
            self.adopt(own)

    def dropping_out(self, share: float, *which: object) -> AbstractContextManager[None]:
        """Inside, `share` of what each adapter is given is dropped; by the seed of `reset` and `which` pass it is.

        Around the backward pass, too, if blocks are computed again in it.
        """
        return self._dropout.during(share, derive_seed(self._seed, *which))

    def take_gradients(self, copies: Pairs) -> None:
        """Make the gradients of `copies` those of the adapters."""
        for name, layer in self._layers.items():
            for factor, copy in zip(_pair(layer), copies[name], strict=True):
                factor.grad = copy.grad

    def remove(self) -> None:
        """Give the segment its plain linear layers back (to save the model)."""
        for name, layer in self._layers.items():
            self._segment.model.set_submodule(self._segment.local_name(name), layer.get_base_layer())  # type: ignore[operator]
        if self._layers:
            del self._segment.model.peft_config  # PEFT would take the next adapters for additional ones
        self._layers = {}

    def factors(self) -> dict[str, LoraFactors]:
        """Copies of the adapters by module name, float32 on the CPU."""
        return {
            name: LoraFactors(_copy(A), _copy(B), _scaling(layer))
            for name, layer in self._layers.items()
            for A, B in [_pair(layer)]
        }

    def state(self) -> State:
        """Module name -> copies of ``A`` (r, d_in) and ``B`` (d_out, r), float32, and their ``scaling``."""
        return {name: {"A": f.A, "B": f.B, "scaling": f.scaling} for name, f in self.factors().items()}

    def load_state(self, state: State) -> None:
        """Go on from what `state` gave, bit for bit.

        Raises:
            ConfigError: it is of other modules, ranks or scalings.
        """
        saved = {name: LoraFactors(pair["A"], pair["B"], pair["scaling"]) for name, pair in state.items()}
        expected, found = _forms(self.factors()), _forms(saved)
        if differing := sorted(n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n)):
            name = differing[0]
            raise ConfigError(
                f"Expected the state of adapters as they are here, found {len(differing)} others: "
                f"{name} has {expected.get(name, 'no adapter')} here and {found.get(name, 'none')} there. "
                "Resume with the plans that it was saved with."
            )
        self.set(saved)


def _inject(segment: Segment, spec: LoraSpec, names: list[str]) -> dict[str, nn.Module]:
    import peft  # 2.4 s to import: only processes that train pay for it

    local = {segment.local_name(name): name for name in names}
    config = peft.LoraConfig(
        r=1,
        lora_alpha=1,
        target_modules=list(local),
        rank_pattern={f"^{_literal(key)}": spec.rank(name) for key, name in local.items()},
        alpha_pattern={f"^{_literal(key)}": spec.scaling(name) * spec.rank(name) for key, name in local.items()},
        fan_in_fan_out=not all(isinstance(layer, nn.Linear) for layer in segment.linear_modules().values()),
    )
    try:
        with PATCHING:
            peft.inject_adapter_in_model(config, segment.model, adapter_name=ADAPTER)
    except ValueError as error:
        raise UnsupportedModelError(
            f"Expected linear layers of {segment.config.model_type!r} that can carry adapters, found that PEFT refuses "
            f"them: {error} Choose another architecture."
        ) from error
    layers = {name: segment.model.get_submodule(key) for key, name in local.items()}
    for layer in layers.values():
        for parameter in _pair(layer):
            parameter.data = parameter.data.float()
    return layers


def _forms(factors: Mapping[str, LoraFactors]) -> dict[str, str]:
    return {n: f"A {tuple(f.A.shape)}, B {tuple(f.B.shape)}, scaling {f.scaling}" for n, f in factors.items()}


def _literal(name: str) -> str:
    return name.replace(".", r"\.")


def _pair(layer: nn.Module) -> tuple[nn.Parameter, nn.Parameter]:
    return layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight  # type: ignore[index, union-attr]


def _scaling(layer: nn.Module) -> float:
    return float(layer.scaling[ADAPTER])  # type: ignore[index]


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32, copy=True)

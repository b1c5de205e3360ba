"""A global model whose adapters are carried from round to round instead of merged."""

from collections.abc import Mapping

from hsplit_flwr.federation.global_model import GlobalModel
from hsplit_flwr.lora.factors import LoraFactors
from hsplit_flwr.lora.segment_adapters import SegmentAdapters
from hsplit_flwr.lora.spec import LoraSpec
from hsplit_flwr.models.segments import Segment, segment_from_model


def adapted(model: GlobalModel, factors: Mapping[str, LoraFactors]) -> Segment:
    """The whole model with `factors` as its adapters; shares the tensors of `model`, which stays as it is."""
    whole = segment_from_model(model.segment.model)
    spec = LoraSpec.of_scaling({name: pair.rank for name, pair in factors.items()}, 1.0)
    SegmentAdapters(whole, spec).set(factors)
    return whole

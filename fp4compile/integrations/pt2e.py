"""PT2E: ``prepare_pt2e(exported, fp4compile.FP4Quantizer(...))``, calibrate, ``convert_pt2e``.

torchao's flow inserts an observer before every annotated linear and lets it rewrite the graph at
the end. Ours keeps what ``fp4compile.quantize`` keeps of an activation, decides by the same search,
and puts an FP4 weight where the weight was: the linear then is the ``fp4::`` ops, no
quantize-dequantize pair for a backend to match. Loaded when ``fp4compile.FP4Quantizer`` is asked
for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torchao.quantization import PerTensor
from torchao.quantization.pt2e.observer import AffineQuantizedObserverBase
from torchao.quantization.pt2e.quantizer import (
    QuantizationAnnotation,
    QuantizationSpec,
    Quantizer,
)
from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY
from torchao.quantization.quant_primitives import MappingType

from fp4compile.errors import CalibrationDataError, SelectionError
from fp4compile.observers import ActivationObserver
from fp4compile.passes.swap_weights import fp4_weight
from fp4compile.qparams import SAMPLE_TOKENS, QuantSpec
from fp4compile.search import GroupProblem, by_method
from fp4compile.selection import as_spec

LINEAR = torch.ops.aten.linear.default
# A view of a parameter that exporting may leave between it and its use.
_VIEWS = frozenset({torch.ops.aten.detach.default, torch.ops.aten.alias.default})


class FP4Quantizer(Quantizer):
    """Annotates every linear with a constant weight for FP4.

    Args:
        spec, method: as in ``fp4compile.quantize``. Exponent shifts are not folded into what comes
            before: PT2E shows one linear at a time.

    Raises:
        SpecError: no such spec or method.
    """

    def __init__(self, spec: str | QuantSpec = "w4a4", method: str = "fpq") -> None:
        by_method(method)
        self.spec, self.method = as_spec(spec), method

    def annotate(self, model: fx.GraphModule) -> fx.GraphModule:
        """Ask for an observer before each linear; those that share an input share it."""
        for linear in model.graph.find_nodes(op="call_function", target=LINEAR):
            if _weight_name(linear) is not None:
                linear.meta[Q_ANNOTATION_KEY] = QuantizationAnnotation(
                    input_qspec_map={linear.args[0]: self._observed()}, _annotated=True
                )
        return model

    def validate(self, model: fx.GraphModule) -> None:
        """Whether anything was annotated.

        Raises:
            SelectionError: the graph has no linear with a constant weight.
        """
        if not any(Q_ANNOTATION_KEY in node.meta for node in model.graph.nodes):
            raise SelectionError(
                "the graph has no aten.linear with a weight of its own, so there is nothing to "
                "quantize; give prepare_pt2e torch.export.export(model, inputs).module()"
            )

    def _observed(self) -> QuantizationSpec:
        observer = FP4Observer.with_args(spec=self.spec, method=self.method)
        return QuantizationSpec(torch.uint8, observer)


class FP4Observer(AffineQuantizedObserverBase):
    """Sees one activation while the model is calibrated, then rewrites the linears that read it."""

    def __init__(self, spec: QuantSpec, method: str, **_: Any) -> None:
        # The base class describes affine quantization, which this is not; convert() is what counts.
        super().__init__(MappingType.SYMMETRIC, torch.uint8, PerTensor())
        self.spec, self.method = spec, method
        self.seen: ActivationObserver | None = None

    def forward(self, input: Tensor) -> Tensor:
        x = input.detach().flatten(0, -2)
        if self.seen is None:
            self.seen = ActivationObserver(x.shape[-1], SAMPLE_TOKENS, device=x.device)
        self.seen.update(x.to(torch.float32))
        return input

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        # Of torchao's interface; torchao asks observers that have a convert() for nothing else.
        raise NotImplementedError("FP4 has no zero point; convert() decides")

    def convert(self, model: fx.GraphModule, observer_node: fx.Node) -> None:
        """Give every linear that reads ``observer_node`` its FP4 weight, and remove the observer.

        Raises:
            CalibrationDataError: the prepared model was never called.
        """
        linears = [node for node in observer_node.users if node.target is LINEAR]
        names = {node: str(_weight_name(node)) for node in linears}
        if self.seen is None:
            raise CalibrationDataError(
                f"no data reached {', '.join(names.values())}; call the prepared model on some "
                "batches before convert_pt2e"
            )
        weights = {name: model.get_parameter(name).detach() for name in names.values()}
        problem = GroupProblem(
            {name: weight.to(torch.float32) for name, weight in weights.items()},
            self.seen.value,
            self.spec,
        )
        with torch.no_grad():
            decided = by_method(self.method).search_group(problem)
        for node, name in names.items():
            packed = fp4_weight(problem.weights[name], decided[name], weights[name].dtype)
            _replace_weight(model, node, name, nn.Parameter(packed, requires_grad=False))
        source = observer_node.args[0]
        assert isinstance(source, fx.Node)
        observer_node.replace_all_uses_with(source)
        model.graph.erase_node(observer_node)


def _weight_name(linear: fx.Node) -> str | None:
    """Name of the parameter that is the weight of ``linear``, if it is one."""
    node = linear.args[1]
    while isinstance(node, fx.Node) and node.target in _VIEWS:
        node = node.args[0]
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    return str(node.target)


def _replace_weight(
    model: fx.GraphModule, linear: fx.Node, name: str, weight: nn.Parameter
) -> None:
    """``linear`` reads ``weight``; who else reads the parameter ``name`` still reads that."""
    own = f"{name.replace('.', '_')}_fp4"
    model.register_parameter(own, weight)
    with model.graph.inserting_before(linear):
        linear.update_arg(1, model.graph.get_attr(own))

"""Engines for the backbone's forward pass, at the shapes that serving sees; behind ADR 14.

    eager_fp32, eager_bf16     torch as it is; bf16 is what serving does where the hardware has it
    compile_bf16               torch.compile with dynamic shapes (needs a C++ compiler; its first call takes minutes)
    int8_dynamic               torch's dynamic quantisation of the linear layers
    onnxruntime, openvino      the backbone exported with torch.onnx, or converted, with the block mask as an input

    python -m benchmarks.engines --config complete_journey --run-dir default --output engines.json

needs the stages features and release of the run. An engine whose package is not installed is left out and named. The
engines take turns in one process on the recorded inputs of one batch of users. `users_per_second` is the whole of
`encode_users`, `backbone_seconds` the backbone's part; `agreement` the share of eager_fp32's top-K that is found.
"""

from __future__ import annotations

import copy
import json
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import nn

from benchmarks.bench import Bench, alternate, describe, find_run, open_bench, parse_run, write_figures
from components.settings import get_settings
from components.urm.retrieval.exhaustive import recall_of

Forward = Callable[..., Any]  # of the backbone: inputs_embeds, attention_mask, position_ids → last_hidden_state
NAMES = ("inputs_embeds", "attention_mask", "position_ids")
PLAIN = "eager_fp32"  # what the others are compared with
IN_BFLOAT16 = ("eager_bf16", "compile_bf16")


class Layers(nn.Module):
    """The backbone as a function of three tensors, for exporters."""

    def __init__(self, base: nn.Module) -> None:
        """Take the model without its head."""
        super().__init__()
        self.base = base

    def forward(self, embeddings: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Last hidden states [B, S, D]."""
        output = self.base(inputs_embeds=embeddings, attention_mask=mask, position_ids=positions, use_cache=False)
        hidden: torch.Tensor = output.last_hidden_state
        return hidden


def make_engines(base: nn.Module, example: Mapping[str, torch.Tensor], wanted: list[str]) -> dict[str, Forward]:
    """The engines available here, by name."""
    makers: dict[str, Callable[[], Forward]] = {
        PLAIN: lambda: base.forward,
        "eager_bf16": lambda: base.forward,
        "compile_bf16": lambda: torch.compile(base.forward, dynamic=True),
        "int8_dynamic": lambda: quantise(base),
        "onnxruntime": lambda: export_onnx(base, example),
        "openvino": lambda: convert_openvino(base, example),
    }
    engines: dict[str, Forward] = {}
    for name in [PLAIN, *(name for name in wanted if name != PLAIN)]:
        try:
            engines[name] = makers[name]()
        except Exception as error:  # if an exporter fails, the others are measured
            reason = " ".join(str(error).split())[:300]
            print(f"left out: {name}: {type(error).__name__}: {reason}", flush=True)
    return engines


def quantise(base: nn.Module) -> Forward:
    """Linear layers with 8-bit weights, and dynamically quantised activations."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch has moved it to torchao
        small = torch.ao.quantization.quantize_dynamic(copy.deepcopy(base), {nn.Linear}, dtype=torch.qint8)
    return small.forward


def export_onnx(base: nn.Module, example: Mapping[str, torch.Tensor]) -> Forward:
    """ONNX Runtime with as many threads as torch."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    batch, length = torch.export.Dim("batch", min=2), torch.export.Dim("length", min=2)
    shapes = ({0: batch, 1: length}, {0: batch, 2: length, 3: length}, {0: batch, 1: length})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "backbone.onnx"
        inputs = tuple(example[name] for name in NAMES)
        torch.onnx.export(
            Layers(base), inputs, path, input_names=list(NAMES), dynamic_shapes=shapes, dynamo=True, verbose=False
        )
        session = onnxruntime.InferenceSession(path, options)

    def forward(**given: Any) -> SimpleNamespace:
        hidden = session.run(None, {name: given[name].numpy() for name in NAMES})[0]
        return SimpleNamespace(last_hidden_state=torch.from_numpy(hidden))

    return forward


def convert_openvino(base: nn.Module, example: Mapping[str, torch.Tensor]) -> Forward:
    """OpenVINO with as many threads as torch, and the precision it chooses for the hardware."""
    import openvino

    model = openvino.convert_model(Layers(base), example_input=tuple(example[name] for name in NAMES))
    compiled = openvino.compile_model(model, "CPU", {"INFERENCE_NUM_THREADS": torch.get_num_threads()})

    def forward(**given: Any) -> SimpleNamespace:
        hidden = compiled([given[name].numpy() for name in NAMES])[0]
        return SimpleNamespace(last_hidden_state=torch.from_numpy(np.array(hidden)))

    return forward


@contextmanager
def engine(base: nn.Module, name: str, forward: Forward) -> Iterator[None]:
    """Let the backbone run by an engine; only two of them in bfloat16, as where the hardware has it."""
    allowed = mock.patch("components.device.has_bfloat16", return_value=name in IN_BFLOAT16)
    with allowed, mock.patch.object(base, "forward", forward):
        yield


def record(bench: Bench, base: nn.Module) -> list[dict[str, torch.Tensor]]:
    """Inputs of the backbone for the users of the bench, one pass each."""
    seen: list[dict[str, torch.Tensor]] = []
    plain = base.forward

    def note(**given: Any) -> Any:
        seen.append({name: given[name].clone() for name in NAMES})
        return plain(**given)

    with engine(base, PLAIN, note):
        bench.recaller.encode_users(_requests(bench))
    return seen


def measure(bench: Bench, repeats: int, wanted: list[str]) -> dict[str, Any]:
    """Speed and agreement of every engine."""
    base = bench.recaller.model.backbone.base_model
    passes = record(bench, base)
    with torch.no_grad():
        engines = make_engines(base, passes[-1], wanted)
    items = {name: _top_k(bench, base, name, forward) for name, forward in engines.items()}  # also warms them up
    works = [_timed(bench, base, passes, name, forward) for name, forward in engines.items()]
    columns = alternate(repeats, *(work for pair in works for work in pair))
    return {
        name: {
            "users_per_second": describe(columns[2 * place]),
            "backbone_seconds": describe(columns[2 * place + 1]),
            "agreement": recall_of(items[name], items[PLAIN]),
        }
        for place, name in enumerate(engines)
    } | {"shapes": [list(one["inputs_embeds"].shape) for one in passes], "threads": torch.get_num_threads()}


def _timed(
    bench: Bench, base: nn.Module, passes: list[dict[str, torch.Tensor]], name: str, forward: Forward
) -> tuple[Callable[[], float], Callable[[], float]]:
    """Users per second of encode_users; seconds of the backbone alone."""
    requests = _requests(bench)

    def encode() -> float:
        with engine(base, name, forward):
            start = time.perf_counter()
            bench.recaller.encode_users(requests)
            return len(bench.users) / (time.perf_counter() - start)

    def run_backbone() -> float:
        bfloat16 = torch.autocast("cpu", dtype=torch.bfloat16, enabled=name in IN_BFLOAT16)
        with engine(base, name, forward), torch.inference_mode(), bfloat16:
            start = time.perf_counter()
            for one in passes:
                base(**one, use_cache=False)
            return time.perf_counter() - start

    return encode, run_backbone


def _top_k(bench: Bench, base: nn.Module, name: str, forward: Forward) -> list[Any]:
    requests = _requests(bench)
    with engine(base, name, forward):
        vectors = bench.recaller.encode_users(requests)
    return bench.recaller.top_k(vectors, bench.config.recall.k, [request.excluded_items for request in requests])[0]


def _requests(bench: Bench) -> list[Any]:
    return [request for user in bench.users for request in user]


def main() -> None:
    """Measure, print, and write the JSON file."""
    parser = parse_run(__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--engines", nargs="+", default=["eager_bf16", "compile_bf16", "int8_dynamic", "onnxruntime", "openvino"]
    )
    arguments = parser.parse_args()
    settings = get_settings()
    config, run = find_run(arguments, settings)
    bench = open_bench(config, run, settings, config.recall.batch_size)
    figures = measure(bench, arguments.repeats, arguments.engines)
    print(json.dumps(figures, indent=2))
    write_figures(arguments.output, figures)


if __name__ == "__main__":
    main()

"""The sentence encoder as an ONNX graph, built from its weights without PyTorch.

Building the graph by hand instead of tracing it keeps it small and the same on every machine, and
lets each matrix be stored as it serves best:

* Word embeddings: 4 bits in blocks of 32 with a scale each. A row is only looked up, never
  multiplied, and the layer norm that follows forgives small errors; the table is more than half of
  the model, so this saves more than anything else.
* Matrices of the layers: 8 bits, a scale per output channel; activations are quantised as they
  come ("dynamic"). ``block8``, a scale per 32 inputs for weights and activations, is closer to
  float32 and takes twice as long.
* Everything else: float32.

Source of the block scheme: T. Dettmers et al., "8-bit Optimizers via Block-wise Quantization",
ICLR 2022. Only training imports this module; `onnx` is no dependency of serving.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

Weights = Mapping[str, npt.NDArray[np.float32]]
Matrices = Literal["float", "channel8", "block8"]
Words = Literal["float", "8", "4"]

OPSET = 18
CONTRIB = "com.microsoft"
BLOCK = 32
HEADS = 12
WIDTH = 384
EPSILON = 1e-12


def build(
    weights: Weights,
    *,
    layers: int,
    frozen: int,
    matrices: Matrices = "channel8",
    words: Words = "4",
) -> onnx.ModelProto:
    """The encoder: ``input_ids`` (int64, batch x length) to two summaries of each row.

    ``tuned`` is the mean of the last hidden states and ``frozen`` that of the states after the
    layers that training left alone; both float32, batch x 384, not normalised. There is no mask:
    rows of a batch must have the same number of tokens.

    Args:
        weights: Parameters under their names in the checkpoint of all-MiniLM-L6-v2.
        layers: How many layers to use, from the lowest.
        frozen: After how many of them the frozen summary is taken.
        matrices: How matrices of the transformer layers are stored.
        words: How word embeddings are stored.

    """
    graph = _Builder(weights)
    hidden = graph.embed(words)
    for layer in range(frozen):
        hidden = graph.layer(layer, hidden, matrices)
    graph.pool(hidden, "frozen")
    for layer in range(frozen, layers):
        hidden = graph.layer(layer, hidden, matrices)
    graph.pool(hidden, "tuned")
    model = helper.make_model(
        helper.make_graph(
            graph.nodes,
            "encoder",
            [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "length"])],
            [
                helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", WIDTH])
                for name in ("frozen", "tuned")
            ],
            graph.constants,
        ),
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)],
        producer_name="gatehouse",
    )
    model.ir_version = 9
    return model


class _Builder:
    """Collects nodes and constants; every method returns the name of its result."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def node(self, kind: str, inputs: list[str], outputs: int = 1, **options: Any) -> str:
        name = f"{kind}_{len(self.nodes)}"
        names = [f"{name}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(kind, inputs, names, name=name, **options))
        return names[0]

    def contrib(self, kind: str, inputs: list[str], outputs: int = 1, **options: Any) -> str:
        return self.node(kind, inputs, outputs, domain=CONTRIB, **options)

    def constant(self, value: npt.NDArray[Any]) -> str:
        name = f"constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def embed(self, words: Words) -> str:
        table = self.weights["embeddings.word_embeddings.weight"]
        if words == "float":
            found = self.node("Gather", [self.constant(table), "input_ids"])
        else:
            found = self.quantised_words(table, bits=int(words))
        # All tokens are of type 0, so its embedding is folded into those of the positions.
        places = (
            self.weights["embeddings.position_embeddings.weight"]
            + self.weights["embeddings.token_type_embeddings.weight"][0]
        )
        shape = self.node("Shape", ["input_ids"])
        length = self.node("Gather", [shape, self.constant(np.array([1], dtype=np.int64))])
        zero = self.constant(np.array([0], dtype=np.int64))
        place = self.node("Slice", [self.constant(places), zero, length, zero])
        return self.normed(self.node("Add", [found, place]), "embeddings.LayerNorm")

    def quantised_words(self, table: npt.NDArray[np.float32], bits: int) -> str:
        top = 2 ** (bits - 1) - 1
        blocks = table.reshape(len(table), -1, BLOCK)
        scale = _block_scale(blocks, top)
        stored = np.clip(np.round(blocks / scale[..., None]), -top - 1, top).astype(np.int8)
        flat = stored.reshape(len(table), -1)
        if bits == 8:
            rows = self.node("Gather", [self.constant(flat), "input_ids"])
        else:
            # Two values a byte, offset by 8: the first half of the row in the low four bits.
            half = flat.shape[1] // 2
            raised = (flat + 8).astype(np.uint8)
            packed = raised[:, :half] | (raised[:, half:] << 4)
            both = self.node("Gather", [self.constant(packed), "input_ids"])
            low = self.node("BitwiseAnd", [both, self.constant(np.array(15, dtype=np.uint8))])
            four = self.constant(np.array(4, dtype=np.uint8))
            high = self.node("BitShift", [both, four], direction="RIGHT")
            rows = self.node("Concat", [low, high], axis=-1)
        values = self.node("Cast", [rows], to=TensorProto.FLOAT)
        if bits == 4:
            values = self.node("Sub", [values, self.constant(np.array(8, dtype=np.float32))])
        scales = self.node("Gather", [self.constant(scale.astype(np.float16)), "input_ids"])
        scales = self.node("Cast", [scales], to=TensorProto.FLOAT)
        apart = np.array([0, 0, table.shape[1] // BLOCK, BLOCK], dtype=np.int64)
        values = self.node("Reshape", [values, self.constant(apart)])
        last = self.constant(np.array([3], dtype=np.int64))
        values = self.node("Mul", [values, self.node("Unsqueeze", [scales, last])])
        joined = np.array([0, 0, table.shape[1]], dtype=np.int64)
        return self.node("Reshape", [values, self.constant(joined)])

    def normed(self, hidden: str, prefix: str, residual: str | None = None) -> str:
        scale = self.constant(self.weights[f"{prefix}.weight"])
        shift = self.constant(self.weights[f"{prefix}.bias"])
        if residual is not None:
            # NOTE: not SkipLayerNormalization, which does both at once and takes five times as
            # long on a CPU as the two apart.
            hidden = self.node("Add", [hidden, residual])
        return self.node("LayerNormalization", [hidden, scale, shift], axis=-1, epsilon=EPSILON)

    def linear(self, hidden: str, weight: Any, bias: Any, storage: Matrices) -> str:
        """``hidden @ weight.T + bias``; ``weight`` is outputs x inputs."""
        if storage == "channel8":
            scale = np.abs(weight).max(axis=1) / 127
            stored = np.clip(np.round(weight / scale[:, None]), -127, 127).astype(np.int8)
            return self.contrib(
                "DynamicQuantizeMatMul",
                [
                    hidden,
                    self.constant(stored.T),
                    self.constant(scale.astype(np.float32)),
                    "",
                    self.constant(bias),
                ],
            )
        if storage == "block8":
            stored, scale = _blockwise(weight)
            return self.contrib(
                "MatMulNBits",
                [
                    hidden,
                    self.constant(stored),
                    self.constant(scale),
                    "",
                    "",
                    self.constant(bias),
                ],
                K=weight.shape[1],
                N=weight.shape[0],
                bits=8,
                block_size=BLOCK,
                accuracy_level=4,
            )
        product = self.node("MatMul", [hidden, self.constant(weight.T)])
        return self.node("Add", [product, self.constant(bias)])

    def layer(self, number: int, hidden: str, storage: Matrices) -> str:
        prefix = f"encoder.layer.{number}."
        own = f"{prefix}attention.self."
        names = ("query", "key", "value")
        weight = np.concatenate([self.weights[f"{own}{name}.weight"] for name in names])
        bias = np.concatenate([self.weights[f"{own}{name}.bias"] for name in names])
        joint = self.linear(hidden, weight, bias, storage)
        sizes = self.constant(np.array([WIDTH] * 3, dtype=np.int64))
        first = self.node("Split", [joint, sizes], outputs=3, axis=-1)
        query, key, value = (f"{first[:-1]}{i}" for i in range(3))
        attended = self.contrib("MultiHeadAttention", [query, key, value], num_heads=HEADS)
        weight, bias = self.pair(f"{prefix}attention.output.dense")
        attended = self.linear(attended, weight, bias, storage)
        hidden = self.normed(attended, f"{prefix}attention.output.LayerNorm", hidden)
        weight, bias = self.pair(f"{prefix}intermediate.dense")
        wide = self.contrib("Gelu", [self.linear(hidden, weight, bias, storage)])
        weight, bias = self.pair(f"{prefix}output.dense")
        narrow = self.linear(wide, weight, bias, storage)
        return self.normed(narrow, f"{prefix}output.LayerNorm", hidden)

    def pair(self, prefix: str) -> tuple[Any, Any]:
        return self.weights[f"{prefix}.weight"], self.weights[f"{prefix}.bias"]

    def pool(self, hidden: str, name: str) -> None:
        middle = self.constant(np.array([1], dtype=np.int64))
        self.nodes.append(
            helper.make_node("ReduceMean", [hidden, middle], [name], name=name, keepdims=0)
        )


def _block_scale(blocks: npt.NDArray[np.float32], top: int) -> npt.NDArray[np.float32]:
    """Scale per block that loses least in the square, among a few fractions of the largest."""
    largest = np.asarray(np.abs(blocks).max(axis=-1) / top + 1e-9, dtype=np.float32)
    if top > 7:
        return largest
    best, least = largest.copy(), np.full(largest.shape, np.inf, dtype=np.float32)
    for fraction in (0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0):
        scale = (largest * fraction).astype(np.float16).astype(np.float32) + 1e-9
        rounded = np.clip(np.round(blocks / scale[..., None]), -top - 1, top) * scale[..., None]
        error = np.square(rounded - blocks).sum(axis=-1)
        better = error < least
        best[better], least[better] = scale[better], error[better]
    return best


def _blockwise(
    weight: npt.NDArray[np.float32],
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    """Stored bytes ``(outputs, blocks, BLOCK)`` and scales ``(outputs * blocks,)``.

    Values are offset by 128, the operator's default zero point.
    """
    blocks = weight.reshape(len(weight), -1, BLOCK)
    scale = _block_scale(blocks, 127)
    stored = np.clip(np.round(blocks / scale[..., None]), -127, 127).astype(np.int16) + 128
    return stored.astype(np.uint8), scale.astype(np.float32).reshape(-1)

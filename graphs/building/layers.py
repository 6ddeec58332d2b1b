"""The pieces of a Llama-like decoder layer that prefill and decode share: norm, projections, rotation, MLP.

Two operator sets give the same numbers: opset 23 has fused operators, opset 18 is written in primitives. In half
precision the norm and the softmax run in float32, as transformers does.
"""

import math

import onnx_ir as ir

from graphs.building.graph_builder import GraphBuilder, dims, dtype_of
from graphs.records.spec import DecoderSpec

FLOAT = ir.DataType.FLOAT


def layer_prefix(layer: int) -> str:
    """Canonical name of a layer's tensors in the checkpoint."""
    return f"language_model.layers.{layer}"


def rms_norm(b: GraphBuilder, x: ir.Value, weight: str, eps: float, name: str) -> ir.Value:
    """x [n,C] / sqrt(mean(x^2) + eps) * weight; the division in float32."""
    scale = b.weight(weight, (dims(x)[-1],))
    if b.fused:
        return b.op("RMSNormalization", [x, scale], name, shape=dims(x), axis=-1, epsilon=eps, stash_type=int(FLOAT))
    with b.scope(name):
        wide = b.cast(x, FLOAT, "wide")
        mean = b.reduce("ReduceMean", b.mul(wide, wide, "square"), -1, "mean")
        root = b.unary("Sqrt", b.add(mean, b.scalar(f"epsilon_{eps:g}", eps, FLOAT), "shifted"), "root")
        normal = b.cast(b.binary("Div", wide, root, "normal"), dtype_of(x), "narrow")
        return b.mul(normal, scale, "scaled")


def project_heads(
    b: GraphBuilder, rows: ir.Value, module: str, name: str, *, batch: int, heads: int, head_dim: int, bias: bool
) -> ir.Value:
    """rows [B*S,C] -> [B,heads,S,D]."""
    tokens = dims(rows)[0] // batch
    flat = b.linear(rows, module, heads * head_dim, f"{name}_flat", bias=bias)
    if tokens == 1:  # the same order of elements, no transposition needed
        return b.reshape(flat, (batch, heads, 1, head_dim), name)
    split = b.reshape(flat, (batch, tokens, heads, head_dim), f"{name}_split")
    return b.transpose(split, (0, 2, 1, 3), name)


def rotate(b: GraphBuilder, x: ir.Value, cos: ir.Value, sin: ir.Value, name: str) -> ir.Value:
    """Rotary embedding of x [B,n,S,D] by cos, sin [B,S,D/2]: the halves of D are the real and imaginary parts."""
    if b.fused:
        return b.op("RotaryEmbedding", [x, cos, sin], name, shape=dims(x))
    size = dims(x)[3]
    c, s = _for_all_heads(b, cos), _for_all_heads(b, sin)
    with b.scope(name):
        real, imag = b.slice(x, 3, 0, size // 2, "real"), b.slice(x, 3, size // 2, size, "imag")
        turned_real = b.binary("Sub", b.mul(real, c, "real_cos"), b.mul(imag, s, "imag_sin"), "turned_real")
        turned_imag = b.add(b.mul(real, s, "real_sin"), b.mul(imag, c, "imag_cos"), "turned_imag")
        return b.concat([turned_real, turned_imag], 3, "turned")


def _for_all_heads(b: GraphBuilder, table: ir.Value) -> ir.Value:
    """cos or sin [B,S,D/2] as [B,1,S,D/2]; made once for all layers that use the same table."""
    name = f"{table.name}.for_all_heads"
    known = b.find(name)
    if known is not None:
        return known
    batch, tokens, half = dims(table)
    with b.root_scope():
        return b.reshape(table, (batch, 1, tokens, half), name)


def qkv(
    b: GraphBuilder, spec: DecoderSpec, layer: int, rows: ir.Value, cos: ir.Value, sin: ir.Value
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Query [B,H,S,D], key [B,K,S,D] (both rotated) and value [B,K,S,D] of rows [B*S,C]."""
    batch = dims(cos)[0]
    module = f"{layer_prefix(layer)}.self_attn"

    def heads(kind: str, name: str, count: int) -> ir.Value:
        return project_heads(
            b, rows, f"{module}.{kind}", name, batch=batch, heads=count, head_dim=spec.head_dim, bias=spec.qkv_bias
        )

    query = rotate(b, heads("q_proj", "query_unrotated", spec.num_heads), cos, sin, "query")
    key = rotate(b, heads("k_proj", "key_unrotated", spec.num_kv_heads), cos, sin, "key")
    return query, key, heads("v_proj", "value", spec.num_kv_heads)


def merge_heads(b: GraphBuilder, spec: DecoderSpec, layer: int, context: ir.Value) -> ir.Value:
    """context [B,H,S,D] -> [B*S,C] through the output projection."""
    batch, heads, tokens, size = dims(context)
    by_token = context if tokens == 1 else b.transpose(context, (0, 2, 1, 3), "context_by_token")
    merged = b.reshape(by_token, (batch * tokens, heads * size), "context_rows")
    module = f"{layer_prefix(layer)}.self_attn.o_proj"
    return b.linear(merged, module, spec.hidden_size, "projected", bias=spec.o_bias)


def activation(b: GraphBuilder, kind: str, x: ir.Value) -> ir.Value:
    """silu, gelu (erf) or gelu_pytorch_tanh of x, in primitives."""
    if kind == "silu":
        return b.mul(x, b.unary("Sigmoid", x, "sigmoid"), "silu")
    if kind == "gelu":
        inner = b.unary("Erf", b.scaled(x, math.sqrt(0.5), "erf_argument"), "erf")
    else:
        # The constant is that of the approximation by tanh (Hendrycks and Gimpel, arXiv 1606.08415).
        cube = b.mul(b.mul(x, x, "square"), x, "cube")
        argument = b.scaled(b.add(x, b.scaled(cube, 0.044715, "cubic"), "sum"), math.sqrt(2 / math.pi), "argument")
        inner = b.unary("Tanh", argument, "tanh")
    one = b.scalar("1", 1.0, dtype_of(x))
    return b.scaled(b.mul(x, b.add(inner, one, "gate_shift"), "twice"), 0.5, kind)


def mlp(b: GraphBuilder, spec: DecoderSpec, layer: int, rows: ir.Value) -> ir.Value:
    """down(act(gate(x)) * up(x)) of rows [n,C]."""
    module = f"{layer_prefix(layer)}.mlp"

    def linear(kind: str, x: ir.Value, features: int) -> ir.Value:
        return b.linear(x, f"{module}.{kind}_proj", features, kind, bias=spec.mlp_bias)

    gate = activation(b, spec.hidden_act, linear("gate", rows, spec.intermediate_size))
    gated = b.mul(gate, linear("up", rows, spec.intermediate_size), "gated")
    return linear("down", gated, spec.hidden_size)


def mlp_block(b: GraphBuilder, spec: DecoderSpec, layer: int, rows: ir.Value) -> ir.Value:
    """rows + mlp(norm(rows)), rows [n,C]."""
    weight = f"{layer_prefix(layer)}.post_attention_layernorm.weight"
    with b.scope("mlp"):
        normal = rms_norm(b, rows, weight, spec.rms_norm_eps, "norm")
        changed = mlp(b, spec, layer, normal)
    return b.add(rows, changed, "output")


def attention_norm(b: GraphBuilder, spec: DecoderSpec, layer: int, rows: ir.Value) -> ir.Value:
    """The norm before a layer's attention, of rows [n,C]."""
    return rms_norm(b, rows, f"{layer_prefix(layer)}.input_layernorm.weight", spec.rms_norm_eps, "norm")


def output_logits(b: GraphBuilder, spec: DecoderSpec, rows: ir.Value) -> ir.Value:
    """Final norm and output projection of rows [B,C] -> [B,vocab] float32."""
    table = "language_model.embed_tokens" if spec.tie_word_embeddings else "lm_head"
    with b.scope("head"):
        normal = rms_norm(b, rows, "language_model.norm.weight", spec.rms_norm_eps, "norm")
        return b.cast(b.linear(normal, table, spec.vocab_size, "projected"), FLOAT, "logits")

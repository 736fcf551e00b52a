"""Relevance and evidence once more: slow, literal, in float64, and from the formulas alone.

As in ``oracles``, nothing here imports the package. Gradients come from a copy of the model in
double precision whose attention is not fused and whose normalisations and activations are replaced,
module by module, by the formulas written out; what counts as a constant on the way back is detached
there by hand. ``PlainVit`` does without any automatic gradient, to guard the guard.

Sources: Ali et al. 2022 (arXiv 2202.07304); Achtibat et al. 2024 (arXiv 2402.05602); Mehri et al.
2025 (arXiv 2411.16760); Wu et al. 2024 (arXiv 2403.14552); Chefer, Gur & Wolf 2021 (arXiv
2103.15679); Berend et al. 2026 (ResLRP) for residual additions.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from oracles import Array, multiply


def _constant(x: Tensor) -> Tensor:
    return x.detach()


def _variable(x: Tensor) -> Tensor:
    return x


def unbalanced(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Weights of the gradients of a and b, where their sum passes its own on to both."""
    return torch.ones_like(a), torch.ones_like(b)


def balanced(
    a: Tensor,
    b: Tensor,
    *,
    gamma: float = 1,
    cancel: Callable[[Tensor, Tensor], Tensor] = lambda a, b: a * b < 0,
    a_is_p: Callable[[Tensor, Tensor], Tensor] = lambda a, b: a.abs() > b.abs(),
    denominator: Callable[..., Tensor] = lambda p, q, gamma: (1 + gamma) * p + q,
) -> tuple[Tensor, Tensor]:
    """Weights by the residual rule: (1 + γ)(a + b)/D for p, (a + b)/D for q where they cancel."""
    first = a_is_p(a, b)
    p, q = torch.where(first, a, b), torch.where(first, b, a)
    shared = (a + b) / denominator(p, q, gamma)
    of_p, of_q = (1 + gamma) * shared, shared
    cancels, whole = cancel(a, b), torch.ones_like(a)
    return (
        torch.where(cancels, torch.where(first, of_p, of_q), whole),
        torch.where(cancels, torch.where(first, of_q, of_p), whole),
    )


def first_three_quarters(blocks: int) -> int:
    """Number of blocks in which additions are balanced."""
    return math.floor(3 * blocks / 4)


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What counts as a constant on the way back, so that a test can plant a mistake.

    Attributes:
        shares: Parts of the gradient that reach queries, keys and values: nothing and all under
            the rule "value", a quarter each and half under "shared".
        mean: The mean that layer normalisation subtracts.
        deviation: The standard deviation, or root mean square, by which it divides.
        gate: act(x)/x of an activation.
        residual: Weights of the gradients of a and b in a residual addition a + b.
        depth: How many of a number of blocks it is used in.
    """

    shares: tuple[float, float, float] = (0, 0, 1)
    mean: Callable[[Tensor], Tensor] = _variable
    deviation: Callable[[Tensor], Tensor] = _constant
    gate: Callable[[Tensor], Tensor] = _constant
    residual: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = unbalanced
    depth: Callable[[int], int] = first_three_quarters


VALUE = Rules()
SHARED = Rules(shares=(0.25, 0.25, 0.5))
BALANCED = replace(VALUE, residual=balanced)
BALANCED_SHARED = replace(SHARED, residual=balanced)
ORDINARY = Rules(shares=(1, 1, 1), deviation=_variable, gate=_variable)


def _sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


# act(x)/x of each kind of activation.
_GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "GELU": lambda x: (1 + torch.erf(x / math.sqrt(2))) / 2,
    "GELUTanh": lambda x: _sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x**3)),  # (1 + tanh)/2
    "QuickGELU": lambda x: _sigmoid(1.702 * x),
    "SiLU": _sigmoid,
    "ReLU": lambda x: (x > 0).to(x.dtype),
}
# What transformers calls the same.
_GATES |= {
    **dict.fromkeys(("GELUActivation",), _GATES["GELU"]),
    **dict.fromkeys(("NewGELUActivation", "PytorchGELUTanh"), _GATES["GELUTanh"]),
    **dict.fromkeys(("QuickGELUActivation",), _GATES["QuickGELU"]),
    **dict.fromkeys(("SiLUActivation",), _GATES["SiLU"]),
}
_FORBIDDEN = (
    (F, ("layer_norm", "rms_norm", "gelu", "relu", "scaled_dot_product_attention")),
    (torch, ("sigmoid", "relu", "tanh")),
    (Tensor, ("sigmoid", "relu", "tanh")),
)


@dataclass(kw_only=True)
class LinearTrace:
    """What one forward pass of the linearised float64 model gave, its graph kept for gradients.

    Attributes:
        attention: A_l (batch, heads, queries, keys) of each call, those of a pooling head last.
        values: v_l (batch, heads, keys, value_dim) of each call.
        tokens: x_l (batch, tokens, channels) at the input of each block, and behind the last.
        projections: W_o (channels, heads · value_dim) of each block.
        biases: What follows each, (channels).
        scores: y (batch, classes).
    """

    attention: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    tokens: list[Tensor] = field(default_factory=list)
    projections: list[Array] = field(default_factory=list)
    biases: list[Array] = field(default_factory=list)
    scores: Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def blocks(self) -> int:
        return len(self.projections)

    def about(
        self, class_of_image: Sequence[int], versus: Sequence[int] | None = None
    ) -> list[ImageTrace]:
        """Take the gradients of a class given for each image, or of it less another."""
        chosen = self.scores[torch.arange(len(class_of_image)), list(class_of_image)].sum()
        if versus is not None:
            chosen = chosen - self.scores[torch.arange(len(versus)), list(versus)].sum()
        attention = self.attention[: self.blocks]
        wanted = [*attention, *self.tokens]
        gradients = [
            np.zeros(tuple(each.shape)) if gradient is None else gradient.double().numpy()
            for each, gradient in zip(
                wanted,
                torch.autograd.grad(chosen, wanted, retain_graph=True, allow_unused=True),
                strict=True,
            )
        ]
        return [
            ImageTrace(
                attention=[call[image].detach().numpy() for call in attention],
                attention_gradients=[each[image] for each in gradients[: self.blocks]],
                values=[call[image].detach().numpy() for call in self.values[: self.blocks]],
                projections=self.projections,
                biases=self.biases,
                tokens=[each[image].detach().double().numpy() for each in self.tokens],
                token_gradients=[each[image] for each in gradients[self.blocks :]],
            )
            for image in range(len(class_of_image))
        ]


@dataclass(frozen=True, kw_only=True)
class ImageTrace:
    """Of one image and one class: all that the formulas ask for, by block.

    Attributes:
        attention: A_l (heads, N, N).
        attention_gradients: ∂y/∂A_l, shaped alike.
        values: v_l (heads, N, value_dim).
        projections: W_o (channels, heads · value_dim).
        biases: Of the same layers, which no formula asks for.
        tokens: x_l (N, channels), one more than there are blocks.
        token_gradients: ∂y/∂x_l, shaped alike.
    """

    attention: list[Array]
    attention_gradients: list[Array]
    values: list[Array]
    projections: list[Array]
    biases: list[Array]
    tokens: list[Array]
    token_gradients: list[Array]


def linear_trace(model: nn.Module, images: Tensor, rules: Rules = VALUE) -> LinearTrace:
    """Run a float64 copy of a model of timm or transformers, linearised by hand.

    Args:
        model: The model; it is copied, never touched. Attention of transformers' is eager.
        images: (batch, channels, height, width).
        rules: What counts as a constant.
    """
    shared = {id(weight): weight for weight in model.parameters() if weight.dtype == torch.float64}
    double = copy.deepcopy(model, shared).double().eval()
    blocks, embedding = _blocks_and_embedding(double)
    layers = [_output_layer(block) for block in blocks]
    trace = LinearTrace(
        projections=[weight for weight, _ in layers], biases=[bias for _, bias in layers]
    )
    watch = _Watch(trace, rules, balanced_blocks=rules.depth(len(blocks)))
    before = set(embedding.modules())  # no gradient has to go there
    for module in double.modules():
        if module not in before:
            _write_out(module, rules, watch)
    blocks[0].register_forward_pre_hook(watch.enter_first)
    for block in blocks[1:]:
        block.register_forward_pre_hook(watch.enter)
    blocks[-1].register_forward_hook(watch.leave)
    with watch.products(), torch.enable_grad():
        output = double(images.double())
    trace.scores = getattr(output, "logits", output)
    return trace


def _blocks_and_embedding(model: nn.Module) -> tuple[Sequence[nn.Module], nn.Module]:
    trunk = getattr(model, "encoder", model)
    if hasattr(trunk, "blocks"):
        return trunk.blocks, getattr(trunk, "patch_embed", None) or trunk.embeds
    parts = [part for name, part in model.named_modules() if "text_model" not in name]
    lists = (part for part in parts if isinstance(part, nn.ModuleList) and len(part) > 1)
    named = (part for part in parts if type(part).__name__.endswith("Embeddings"))
    return next(lists), next(named)


def _output_layer(block: nn.Module) -> tuple[Array, Array]:
    """Read W_o and its bias, by their name."""
    owner = getattr(block, "attn", block)
    names = ("proj", "o_proj", "attn_out_proj", "attention.output.dense", "self_attn.out_proj")
    names += ("attention.o_proj",)
    parts = dict(owner.named_modules())
    layer = next(parts[name] for name in names if name in parts)
    layer = getattr(layer, "linear", layer)
    weight: Array = layer.weight.detach().double().numpy()
    bias = np.zeros(len(weight)) if layer.bias is None else layer.bias.detach().double().numpy()
    return weight, bias


def _write_out(module: nn.Module, rules: Rules, watch: _Watch) -> None:
    """Replace a normalisation or activation by its formula, or show attention to the watch."""
    kind = type(module).__name__
    if kind in ("LayerNorm", "RmsNorm", "RmsNormFp32"):
        module.forward = _normalisation(module, rules, centred=kind == "LayerNorm")
    elif kind in _GATES:
        form = "GELUTanh" if getattr(module, "approximate", "") == "tanh" else kind
        module.forward = _activation(_GATES[form], rules)
    elif hasattr(module, "fused_attn"):
        module.fused_attn = False
    elif hasattr(module, "proj_w"):  # heads are mixed between softmax and values
        module.attn_drop.register_forward_hook(watch.mixed)


def _normalisation(module: nn.Module, rules: Rules, *, centred: bool) -> Callable[[Tensor], Tensor]:
    def normalise(x: Tensor) -> Tensor:
        kept = x.dtype
        if type(module).__name__ == "RmsNormFp32":
            x = x.float()
        dims = tuple(range(-len(module.normalized_shape), 0))
        if centred:
            mean = x.mean(dim=dims, keepdim=True)
            variance = ((x - mean) ** 2).mean(dim=dims, keepdim=True)
            x = x - rules.mean(mean)
        else:
            variance = (x**2).mean(dim=dims, keepdim=True)
        x = x / rules.deviation(torch.sqrt(variance + module.eps))
        if module.weight is not None:
            x = x * module.weight.to(x.dtype)
        if getattr(module, "bias", None) is not None:
            x = x + module.bias
        return x.to(kept)

    return normalise


def _activation(gate: Callable[[Tensor], Tensor], rules: Rules) -> Callable[[Tensor], Tensor]:
    def activate(x: Tensor) -> Tensor:
        near = x.abs() < 1e-6
        return x * rules.gate(torch.where(near, torch.full_like(x, 0.5), gate(x)))

    return activate


class _Watch:
    """Sees tokens and products while the model runs, and lets through what the rules let through.

    Whether a product is of queries with keys or of probabilities with values is told by its first
    factor. Products outside of attention have factors without a gradient, and do not change.
    """

    def __init__(self, trace: LinearTrace, rules: Rules, *, balanced_blocks: int) -> None:
        self._trace = trace
        self._rules = rules
        self._balanced_blocks = balanced_blocks
        self._probabilities: Tensor | None = None
        self._inside = False

    def enter_first(self, block: nn.Module, inputs: tuple) -> tuple:
        self._inside = True
        tokens = inputs[0].detach().requires_grad_(True)
        self._trace.tokens.append(tokens)
        return (tokens, *inputs[1:])

    def enter(self, block: nn.Module, inputs: tuple) -> None:
        self._trace.tokens.append(inputs[0])

    def leave(self, block: nn.Module, inputs: object, output: Tensor | tuple[Tensor]) -> None:
        self._trace.tokens.append(output[0] if isinstance(output, tuple) else output)

    def mixed(self, dropout: nn.Module, inputs: object, output: Tensor) -> Tensor:
        assert self._rules.shares[:2] == (0, 0), "what mixed heads owe to queries is not defined"
        self._probabilities = output.detach().requires_grad_(True)
        return self._probabilities

    @contextmanager
    def products(self) -> Iterator[None]:
        """Watch Tensor.softmax, @ and +, and forbid what was not written out."""
        softmax, product, add = Tensor.softmax, Tensor.__matmul__, Tensor.__add__

        def watched_softmax(scores: Tensor, dim: int, dtype: object = None) -> Tensor:
            probabilities = softmax(scores, dim=dim)
            if not self._inside:
                return probabilities
            if self._rules.shares[:2] == (0, 0):
                probabilities = probabilities.detach()
            if not probabilities.requires_grad:
                probabilities.requires_grad_(True)
            self._probabilities = probabilities
            return probabilities

        def watched_product(left: Tensor, right: Tensor) -> Tensor:
            queries, keys, values = self._rules.shares
            if not self._inside:
                return product(left, right)
            if left is self._probabilities:
                self._trace.attention.append(left)
                self._trace.values.append(right)
                return product(left, _shared(right, values))
            return product(_shared(left, queries), _shared(right, keys))

        def watched_sum(left: Tensor, right: Tensor) -> Tensor:
            out = add(left, right)
            if not self._is_residual(left, right):
                return out
            of_left, of_right = self._rules.residual(left.detach(), right.detach())
            passing = add(of_left * left, of_right * right)
            return add(passing, (out - passing).detach())

        def forbidden(name: str, real: Callable[..., Tensor]) -> Callable[..., Tensor]:
            def call(*arguments: object, **named: object) -> Tensor:
                assert not self._inside, f"{name} was not written out by hand"
                return real(*arguments, **named)

            return call

        with ExitStack() as stack:
            stack.enter_context(patch.object(Tensor, "softmax", watched_softmax))
            stack.enter_context(patch.object(Tensor, "__matmul__", watched_product))
            stack.enter_context(patch.object(Tensor, "__add__", watched_sum))
            stack.enter_context(patch.object(torch, "matmul", watched_product))
            stack.enter_context(patch.object(F, "silu", _activation(_GATES["SiLU"], self._rules)))
            for home, names in _FORBIDDEN:
                for name in names:
                    call = forbidden(name, getattr(home, name))
                    stack.enter_context(patch.object(home, name, call))
            yield

    def _is_residual(self, left: object, right: object) -> bool:
        """Tell whether tokens are added to tokens, in one of the blocks that count."""
        if not self._inside or not 0 < len(self._trace.tokens) <= self._balanced_blocks:
            return False
        size = self._trace.tokens[0].shape
        return all(
            isinstance(each, Tensor) and each.requires_grad and each.shape == size
            for each in (left, right)
        )


def _shared(x: Tensor, share: float) -> Tensor:
    """Return x, with a share of its gradient."""
    return share * x + (1 - share) * x.detach()


def fuse_positive(attention: Array, gradient: Array) -> Array:
    """E, before values are weighed: mean over heads of relu(A ⊙ ∂y/∂A)."""
    return np.maximum(attention * gradient, 0).mean(axis=0)


def value_norms(values: Array, projection: Array, bias: Array) -> Array:
    """‖W_o v_j‖ (N): all heads' values of a token through the output projection, without bias."""
    tokens = values.shape[1]
    return np.array(
        [np.linalg.norm(projection @ values[:, token].reshape(-1)) for token in range(tokens)]
    )


def contribution(tokens: Array, gradient: Array) -> Array:
    """Σ over channels of x ⊙ ∂y/∂x (N)."""
    return (tokens * gradient).sum(axis=1)


def speaking(image: ImageTrace) -> Array:
    """How much each token behind the last block speaks for the class (N)."""
    return np.maximum(contribution(image.tokens[-1], image.token_gradients[-1]), 0)


def start_of_relevance(image: ImageTrace) -> Array:
    """r behind the last block (N); nothing where no token speaks for the class."""
    start = speaking(image)
    return start / start.sum() if start.any() else start


def carry(r: Array, fused: Array) -> Array:
    """From behind a block to before it: r + r·E."""
    return r + r @ fused


def average_of_shares(carried: Sequence[Array]) -> Array:
    """Average r in front of each block, each as shares of its sum; nothing where r is nothing."""
    return sum(each / each.sum() if each.any() else each for each in carried) / len(carried)


def block_inputs(image: ImageTrace) -> range:
    """Number the block inputs whose evidence is averaged."""
    return range(len(image.attention))


@dataclass(frozen=True, kw_only=True)
class LinearSteps:
    """The formulas, so that a test can plant a mistake in one of them."""

    fuse: Callable[[Array, Array], Array] = fuse_positive
    value_norms: Callable[[Array, Array, Array], Array] = value_norms
    start: Callable[[ImageTrace], Array] = start_of_relevance
    carry: Callable[[Array, Array], Array] = carry
    average: Callable[[Sequence[Array]], Array] = average_of_shares
    contribution: Callable[[Array, Array], Array] = contribution
    block_inputs: Callable[[ImageTrace], range] = block_inputs


STEPS = LinearSteps()


def token_relevance(
    image: ImageTrace, *, first_block: int | None = None, steps: LinearSteps = STEPS
) -> Array:
    """r (N) for one image, the prefix tokens among them, in front of one block or of all."""
    carried = [steps.start(image)]
    for block in reversed(range(first_block or 0, len(image.attention))):
        fused = steps.fuse(image.attention[block], image.attention_gradients[block])
        fused = fused * steps.value_norms(
            image.values[block], image.projections[block], image.biases[block]
        )
        carried.append(steps.carry(carried[-1], fused))
    return steps.average(carried[1:]) if first_block is None else carried[-1]


def token_evidence(image: ImageTrace, *, steps: LinearSteps = STEPS) -> Array:
    """Recipe S for one image, averaged over block inputs (N)."""
    inputs = steps.block_inputs(image)
    return sum(
        steps.contribution(image.tokens[block], image.token_gradients[block]) for block in inputs
    ) / len(inputs)


def classic_relevance(
    attention: Sequence[Array],
    gradients: Sequence[Array],
    *,
    readout: Array,
    first_block: int = 0,
    steps: LinearSteps = STEPS,
) -> Array:
    """Chefer, Gur & Wolf 2021 for one image: R ← R + E·R from the first block up, then wᵀR (N)."""
    fused = map(steps.fuse, attention[first_block:], gradients[first_block:])
    return readout @ multiply([np.eye(len(readout)) + each for each in fused])


@dataclass(frozen=True)
class _Norm:
    """One layer normalisation, and its way back."""

    weight: Array
    bias: Array
    eps: float

    def forward(self, x: Array) -> tuple[Array, Array]:
        centred = x - x.mean(axis=-1, keepdims=True)
        deviation = np.sqrt((centred**2).mean(axis=-1, keepdims=True) + self.eps)
        return centred / deviation * self.weight + self.bias, deviation

    def back(self, gradient: Array, deviation: Array) -> Array:
        gradient = gradient * self.weight / deviation
        return gradient - gradient.mean(axis=-1, keepdims=True)


def _leave(a: Array, b: Array) -> tuple[float, float]:
    return 1.0, 1.0


def _balance_by_hand(a: Array, b: Array) -> tuple[Array, Array]:
    """Go through a sum number by number; γ = 1."""
    of_a, of_b = np.ones_like(a), np.ones_like(b)
    for place in np.ndindex(a.shape):
        one, other = a[place], b[place]
        if one * other >= 0:
            continue
        if abs(one) > abs(other):
            of_a[place] = 2 * (one + other) / (2 * one + other)
            of_b[place] = (one + other) / (2 * one + other)
        else:
            of_b[place] = 2 * (one + other) / (2 * other + one)
            of_a[place] = (one + other) / (2 * other + one)
    return of_a, of_b


class PlainVit:
    """A ViT with a class token, forward and linearised backward in NumPy, for one image.

    The way back was derived on paper: no automatic gradient, no torch but for reading the weights
    and for the error function.
    """

    def __init__(self, model: nn.Module) -> None:
        """Read the weights of a plain timm ViT: pre-norm, GELU, class token."""
        self._w = {name: p.detach().double().numpy() for name, p in model.state_dict().items()}
        self._heads = model.blocks[0].attn.num_heads
        self._blocks = len(model.blocks)
        self._eps = model.norm.eps
        self._patch = model.patch_embed.patch_size[0]

    def image_trace(
        self,
        image: Array,
        class_index: int,
        *,
        shares: tuple[float, float, float],
        balanced_blocks: int = 0,
    ) -> ImageTrace:
        """Run forward and back, with the residual rule in the first blocks."""
        names = [f"blocks.{block}." for block in range(self._blocks)]
        x = self._embed(image)
        tokens, kept = [x], []
        for name in names:
            x, memory = self._block(x, name)
            tokens.append(x)
            kept.append(memory)
        # The logit is a row of the head on the normalised class token.
        _, deviation = self._norm("norm.").forward(x)
        gradient = np.zeros_like(x)
        gradient[0] = self._w["head.weight"][class_index]
        gradient = self._norm("norm.").back(gradient, deviation)
        token_gradients, attention_gradients = [gradient], []
        for block in reversed(range(self._blocks)):
            weigh = _balance_by_hand if block < balanced_blocks else _leave
            gradient, of_attention = self._back(gradient, kept[block], names[block], shares, weigh)
            token_gradients.insert(0, gradient)
            attention_gradients.insert(0, of_attention)
        return ImageTrace(
            attention=[memory["attention"] for memory in kept],
            attention_gradients=attention_gradients,
            values=[memory["v"] for memory in kept],
            projections=[self._w[f"{name}attn.proj.weight"] for name in names],
            biases=[self._w[f"{name}attn.proj.bias"] for name in names],
            tokens=tokens,
            token_gradients=token_gradients,
        )

    def _norm(self, name: str) -> _Norm:
        return _Norm(self._w[name + "weight"], self._w[name + "bias"], self._eps)

    def _linear(self, x: Array, name: str) -> Array:
        return x @ self._w[name + "weight"].T + self._w[name + "bias"]

    def _embed(self, image: Array) -> Array:
        size = self._patch
        rows, cols = image.shape[1] // size, image.shape[2] // size
        kernel = self._w["patch_embed.proj.weight"]
        patches = [
            np.tensordot(
                kernel, image[:, r * size : (r + 1) * size, c * size : (c + 1) * size], axes=3
            )
            for r in range(rows)
            for c in range(cols)
        ]
        embedded = np.stack(patches) + self._w["patch_embed.proj.bias"]
        tokens = np.concatenate([self._w["cls_token"][0], embedded])
        return tokens + self._w["pos_embed"][0]

    def _block(self, x: Array, name: str) -> tuple[Array, dict[str, Any]]:
        n, channels = x.shape
        width = channels // self._heads
        normed, deviation1 = self._norm(name + "norm1.").forward(x)
        qkv = self._linear(normed, name + "attn.qkv.").reshape(n, 3, self._heads, width)
        q, k, v = qkv.transpose(1, 2, 0, 3)  # each (heads, N, width)
        scores = q @ k.transpose(0, 2, 1) / math.sqrt(width)
        powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
        attention = powers / powers.sum(axis=-1, keepdims=True)
        joined = (attention @ v).transpose(1, 0, 2).reshape(n, channels)
        attended = self._linear(joined, name + "attn.proj.")
        middle = x + attended
        normed, deviation2 = self._norm(name + "norm2.").forward(middle)
        hidden = self._linear(normed, name + "mlp.fc1.")
        erf = torch.erf(torch.from_numpy(hidden / math.sqrt(2))).numpy()
        gate = np.where(np.abs(hidden) < 1e-6, 0.5, (1 + erf) / 2)
        made = self._linear(hidden * gate, name + "mlp.fc2.")
        return middle + made, {
            **{"q": q, "k": k, "v": v, "attention": attention, "gate": gate},
            **{"deviation1": deviation1, "deviation2": deviation2},
            **{"sum1": (x, attended), "sum2": (middle, made)},
        }

    def _back(
        self,
        gradient: Array,
        memory: dict[str, Any],
        name: str,
        shares: tuple[float, float, float],
        weigh: Callable[[Array, Array], tuple[Any, Any]],
    ) -> tuple[Array, Array]:
        """From ∂y/∂(block output) to ∂y/∂(block input) and ∂y/∂A."""
        n, channels = gradient.shape
        width = channels // self._heads
        q, k, v, attention = (memory[key] for key in ("q", "k", "v", "attention"))
        passing, branch = (gradient * each for each in weigh(*memory["sum2"]))
        hidden = branch @ self._w[name + "mlp.fc2.weight"] * memory["gate"]
        normed = hidden @ self._w[name + "mlp.fc1.weight"]
        gradient = passing + self._norm(name + "norm2.").back(normed, memory["deviation2"])
        passing, branch = (gradient * each for each in weigh(*memory["sum1"]))
        joined = branch @ self._w[name + "attn.proj.weight"]
        output = joined.reshape(n, self._heads, width).transpose(1, 0, 2)  # (heads, N, width)
        of_attention = output @ v.transpose(0, 2, 1)
        of_scores = attention * (
            of_attention - (attention * of_attention).sum(axis=-1, keepdims=True)
        )
        of_q = shares[0] * of_scores @ k / math.sqrt(width)
        of_k = shares[1] * of_scores.transpose(0, 2, 1) @ q / math.sqrt(width)
        of_v = shares[2] * attention.transpose(0, 2, 1) @ output
        qkv = np.stack([of_q, of_k, of_v]).transpose(2, 0, 1, 3).reshape(n, 3 * channels)
        normed = qkv @ self._w[name + "attn.qkv.weight"]
        return passing + self._norm(name + "norm1.").back(
            normed, memory["deviation1"]
        ), of_attention

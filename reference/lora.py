"""LoRA on a Llama by hand: each operation beside its derivative, so that nothing is computed that a lesson has no use for.

PyTorch's own backward pass spends most of a lesson on a CPU outside the matrix products: gradients of frozen weights' inputs
that are copied, attention kernels made for graphics cards, logits of tokens without a loss. Here every function returns its
output and `back`, which turns the gradient of the output into that of its input. Sources: LoRA, Hu et al. 2021, section 4.1;
the layer, Touvron et al. 2023, section 2.2; grouped keys, Ainslie et al. 2023.

Shapes: T tokens, B examples, N own tokens of the longest, P tokens of the prefix, H key heads, G query heads a key head,
D dimensions a head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from reference.packing import IGNORED, Lesson, plain_loss

LOGIT_ROWS = 128  # answer tokens whose logits are held at once


def by_hand(network: nn.Module) -> bool:
    """Can `LlamaLesson` teach this PEFT model? It must be a plain Llama with LoRA on each linear layer of its blocks."""
    from transformers import LlamaForCausalLM

    causal = network.base_model.model
    if not isinstance(causal, LlamaForCausalLM) or causal.config.attention_bias or causal.config.mlp_bias:
        return False
    return causal.config.hidden_act == "silu" and sum("lora_A" in n for n, _ in network.named_parameters()) == 7 * len(
        causal.model.layers
    )


class LessonLoss(nn.Module):
    """The summed cross entropy of a lesson's answer tokens: by hand where the model is a Llama, otherwise as PEFT computes."""

    def __init__(self, network: nn.Module, fast: bool = True):
        super().__init__()
        self.network, self.fast = network, fast and by_hand(network)

    def forward(self, lesson: Lesson) -> Tensor:
        if not self.fast:
            return plain_loss(self.network, lesson)
        weights = [weight for weight in self.network.parameters() if weight.requires_grad]
        return LlamaLesson.apply(self.network, lesson, *weights)


class LlamaLesson(torch.autograd.Function):
    """The summed loss of a lesson. Its gradient by every LoRA weight is made in the same pass, and kept for `backward`."""

    @staticmethod
    def forward(ctx, network: nn.Module, lesson: Lesson, *weights: Tensor) -> Tensor:
        loss, grads = loss_and_gradients(network.base_model.model, lesson)
        ctx.grads = [grads[weight] for weight in weights]
        return loss

    @staticmethod
    def backward(ctx, grad: Tensor):
        return None, None, *(grad * each for each in ctx.grads)


@torch.no_grad()
def loss_and_gradients(causal: nn.Module, lesson: Lesson) -> tuple[Tensor, dict[Tensor, Tensor]]:
    """Summed cross entropy of the answer tokens, and LoRA weight -> its gradient (fp32)."""
    model, grads = causal.model, {}
    x = model.embed_tokens(lesson.tokens[0])
    cos, sin = (table[0, :, None, : table.shape[-1] // 2] for table in model.rotary_emb(x[None], lesson.positions))
    backs = []
    for block in model.layers:
        x, back = layer(x, block, lesson, cos, sin, grads)
        backs.append(back)
    chosen = (lesson.targets != IGNORED).nonzero()[:, 0]
    final, norm_back = norm(x[chosen], model.norm)
    loss, grad_final = cross_entropy(final, causal.lm_head.weight, lesson.targets[chosen])
    grad = torch.zeros_like(x).index_copy_(0, chosen, norm_back(grad_final))
    while backs:
        grad = backs.pop()(grad)
    return loss, grads


def layer(x: Tensor, block: nn.Module, lesson: Lesson, cos: Tensor, sin: Tensor, grads: dict):
    """One Llama block on x (T, C)."""
    a, m = block.self_attn, block.mlp
    n, norm_back = norm(x, block.input_layernorm)
    qkv, qkv_back = project(n, [a.q_proj, a.k_proj, a.v_proj], grads)
    seen, attend_back = attend(qkv, a, lesson, cos, sin)
    o, o_back = project(seen, [a.o_proj], grads)
    middle = o.add_(x)
    n, middle_back = norm(middle, block.post_attention_layernorm)
    both, both_back = project(n, [m.gate_proj, m.up_proj], grads)
    h, swiglu_back = swiglu(both)
    down, down_back = project(h, [m.down_proj], grads)

    def back(grad: Tensor) -> Tensor:
        grad = middle_back(both_back(swiglu_back(down_back(grad)))).add_(grad)
        return norm_back(qkv_back(attend_back(o_back(grad)))).add_(grad)

    return down.add_(middle), back


def project(x: Tensor, layers: list[nn.Module], grads: dict, adapter: str = "default"):
    """y = x W^T + s (x A^T) B^T, for LoRA layers on the same input side by side as one.

    A and B are fp32 masters, used in the type of x; W is frozen and has no gradient.
    """
    As, Bs = [layer.lora_A[adapter].weight for layer in layers], [layer.lora_B[adapter].weight for layer in layers]
    scale = layers[0].scaling[adapter]
    W = torch.cat([layer.base_layer.weight for layer in layers]) if layers[1:] else layers[0].base_layer.weight
    A, B = torch.cat(As).to(x.dtype), torch.block_diag(*Bs).mul_(scale).to(x.dtype)
    low = x @ A.T

    def back(grad: Tensor) -> Tensor:
        grad_low = grad @ B
        ranks, sizes = [len(a) for a in As], [len(b) for b in Bs]
        grads.update(zip(As, (grad_low.T @ x).float().split(ranks), strict=True))
        for b, own_low, own in zip(Bs, low.split(ranks, 1), grad.split(sizes, 1), strict=True):
            grads[b] = scale * (own_low.T @ own).T.float()
        return (grad @ W).addmm_(grad_low, A)

    return (x @ W.T).addmm_(low, B.T), back


def norm(x: Tensor, rms: nn.Module):
    """y = w x / sqrt(mean x^2 + e) over the last dimension."""
    wide = x.float()
    inverse = (wide.square().mean(-1, keepdim=True) + rms.variance_epsilon).rsqrt_()

    def back(grad: Tensor) -> Tensor:
        unit, grad = x * inverse, (grad * rms.weight).float()
        along = (grad * unit).mean(-1, keepdim=True)
        return unit.mul_(-along).add_(grad).mul_(inverse).to(x.dtype)

    return (wide * inverse).to(x.dtype).mul_(rms.weight), back


def swiglu(both: Tensor):
    """silu(gate) up; `both` (T, 2 F) holds gate and up side by side."""
    gate, up = both.chunk(2, -1)
    silu = torch.nn.functional.silu(gate)

    def back(grad: Tensor) -> Tensor:
        return torch.cat([torch.ops.aten.silu_backward(grad * up, gate), grad * silu], -1)

    return silu * up, back


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021, section 3.4.2): x (T, heads, D), tables (T, 1, D / 2). Its inverse has -sin."""
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def attend(x: Tensor, a: nn.Module, lesson: Lesson, cos: Tensor, sin: Tensor):
    """Attention of the prefix to itself, and of each example to the prefix and itself: (T, (H G + 2 H) D) -> (T, H G D)."""
    T, D, G = len(x), a.head_dim, a.num_key_value_groups
    H = x.shape[1] // D // (G + 2)
    qk, v = x.view(T, -1, D).split([H * G + H, H], 1)
    q, k = rotate(qk, cos, sin).split([H * G, H], 1)
    q = (q * a.scaling).view(T, H, G, D).permute(1, 2, 0, 3)  # (H, G, T, D)
    k, v = k.transpose(0, 1), v.transpose(0, 1)  # (H, T, D)
    longest = lesson.prefix + max(end - start for start, end in lesson.spans)
    later = torch.full((longest, longest), float("-inf"), dtype=x.dtype, device=x.device).triu_(1)
    seen, backs = torch.empty(T, H, G, D, dtype=x.dtype, device=x.device).permute(1, 2, 0, 3), []
    for start, end in lesson.spans:
        P = lesson.prefix if start else 0  # the prefix itself comes first
        own_k, own_v = (torch.cat([each[:, :P], each[:, start:end]], 1) for each in (k, v))
        seen[:, :, start:end], back = attention(q[:, :, start:end], own_k, own_v, later[P : P + end - start, : P + end - start])
        backs.append((start, end, P, back))

    def back(grad: Tensor) -> Tensor:
        grad = grad.view(T, H, G, D).permute(1, 2, 0, 3)
        grad_q = torch.empty(T, H, G, D, dtype=x.dtype, device=x.device)
        grad_k, grad_v = torch.zeros(2, T, H, D, device=x.device)  # fp32: the prefix sums over all examples
        for start, end, P, back in backs:
            own_q, *own = back(grad[:, :, start:end])
            grad_q[start:end] = own_q.permute(2, 0, 1, 3)
            for whole, part in zip((grad_k, grad_v), own, strict=True):
                whole[:P] += part[:, :P].transpose(0, 1)
                whole[start:end] += part[:, P:].transpose(0, 1)
        grad_qk = rotate(torch.cat([grad_q.mul_(a.scaling).flatten(1, 2), grad_k.to(x.dtype)], 1), cos, -sin)
        return torch.cat([grad_qk, grad_v.to(x.dtype)], 1).view(T, -1)

    return seen.permute(2, 0, 1, 3).reshape(T, -1), back


def attention(q: Tensor, k: Tensor, v: Tensor, later: Tensor):
    """Attention of one example: q (H, G, N, D), k and v (H, L, D); `later` (N, L) is -inf where a query must not look."""
    H, G, N, D = q.shape
    q = q.reshape(H, G * N, D)
    p = (q @ k.mT).view(H, G, N, -1).add_(later).softmax(-1).view(H, G * N, -1)

    def back(grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        grad = grad.reshape(H, G * N, D)
        scores = torch._softmax_backward_data(grad @ v.mT, p, -1, p.dtype)
        return (scores @ k).view(H, G, N, D), scores.mT @ q, p.mT @ grad

    return (p @ v).view(H, G, N, D), back


def cross_entropy(x: Tensor, words: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Summed loss (fp32) of x (A, C) against the vocabulary `words` (V, C), and its gradient by x, a few rows at a time."""
    loss, grads = x.new_zeros((), dtype=torch.float32), []
    for rows, wanted in zip(x.split(LOGIT_ROWS), targets.split(LOGIT_ROWS), strict=True):
        p = (rows @ words.T).softmax(-1)
        there = torch.arange(len(rows), device=x.device), wanted
        loss -= p[there].float().log().sum()
        p[there] -= 1
        grads.append(p @ words)
    return loss, torch.cat(grads)

"""Which KV head a query head meets. Ports tile KV heads that HF repeats, and give ranks the heads of others."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llama_neuron import shard_heads
from tools.audit.chain import Step, attend
from tools.audit.knobs.knob import Knob, Knobs, attended

if TYPE_CHECKING:
    from tools.audit.causes import Case


def head_orders(case: Case) -> Knobs:
    """Query heads that attend to other KV heads."""

    def reordered(at: Step, q: Tensor, k: Tensor, v: Tensor, order: list[int]) -> Tensor:
        return attend(q, k[:, order], v[:, order], at.chain.scaling)

    config = case.chain.config
    num_heads = config.num_attention_heads
    group = num_heads // config.num_key_value_heads
    right = tuple(head // group for head in range(num_heads))
    seen = {right}
    for name, order in known_orders(case, group).items():
        if tuple(order) not in seen:
            seen.add(tuple(order))
            yield Knob(name, attended(partial(reordered, order=order)))
    yield from found_orders(case, group)


def known_orders(case: Case, group: int) -> dict[str, list[int]]:
    """The KV head of each query head, as ports have been seen to have them."""
    num_heads = case.chain.config.num_attention_heads
    num_kv_heads = case.chain.config.num_key_value_heads
    ranks = shard_heads(num_heads, num_kv_heads, case.tp)
    orders = {"every query head attends to the first KV head": [0] * num_heads}
    if group > 1:
        orders["KV heads are tiled (0 1 0 1), HF repeats them (0 0 1 1)"] = list(range(num_kv_heads)) * group
        orders["KV heads are tiled on each rank, HF repeats them"] = tiled_on_ranks(ranks, num_heads)
    for shift in range(1, num_kv_heads):
        moved = [(head // group - shift) % num_kv_heads for head in range(num_heads)]
        orders[f"query heads attend to KV heads that are off by {shift}"] = moved
    for shift in range(1, case.tp):
        moved = on_other_ranks(ranks, num_heads, shift)
        if moved:
            orders[f"KV heads are on ranks that are off by {shift}"] = moved
    if case.tp > num_kv_heads and case.tp % num_kv_heads == 0:
        name = "KV heads are copied to ranks in turn (0 1 0 1), NxD repeats them (0 0 1 1)"
        orders[name] = copied_in_turn(ranks, num_heads, num_kv_heads)
    return orders


def tiled_on_ranks(ranks: list, num_heads: int) -> list[int]:
    """The KV head of each query head if every rank goes through its KV heads again and again."""
    order = [0] * num_heads
    for query_heads, kv_heads in ranks:
        for place, head in enumerate(query_heads):
            kv_head = kv_heads[place % len(kv_heads)]
            if head is not None and kv_head is not None:
                order[head] = kv_head
    return order


def on_other_ranks(ranks: list, num_heads: int, shift: int) -> list[int] | None:
    """The KV head of each query head if ranks had each other's KV heads; None if one of them would be padding."""
    order = [0] * num_heads
    for rank, (query_heads, _) in enumerate(ranks):
        _, its = ranks[(rank + shift) % len(ranks)]
        for place, head in enumerate(query_heads):
            if head is None:
                continue
            kv_head = its[place * len(its) // len(query_heads)]
            if kv_head is None:
                return None
            order[head] = kv_head
    return order


def copied_in_turn(ranks: list, num_heads: int, num_kv_heads: int) -> list[int]:
    """The KV head of each query head if ranks had one KV head each, in turn."""
    order = [0] * num_heads
    for rank, (query_heads, _) in enumerate(ranks):
        for head in query_heads:
            if head is not None:
                order[head] = rank % num_kv_heads
    return order


def found_orders(case: Case, group: int) -> Knobs:
    """Each wrong query head attends to the KV head, or the zeros, whose output is nearest to the port's."""
    if case.kind != "heads":
        return
    outputs = outputs_by_kv_head(case)
    order = nearest_kv_heads(case, outputs, group)

    def compute(at: Step) -> Tensor:
        result = torch.zeros_like(case.step)
        for head, kv_head in enumerate(order):
            if kv_head is not None:
                result[:, head] = outputs[kv_head][:, head]
        return result

    changes = []
    for head, kv_head in enumerate(order):
        if kv_head != head // group:
            changes.append(f"{head} meets {'zeros' if kv_head is None else kv_head}")
    if changes:
        yield Knob(f"query heads attend to other KV heads: {', '.join(changes)}", {"heads": compute})


def outputs_by_kv_head(case: Case) -> list[Tensor]:
    """Of each KV head: attention's output [P,H,D] if all query heads met it."""
    q, k, v = (case.text.flow.arrived(source) for source in case.chain.inputs[case.name])
    num_heads = q.shape[1]
    outputs = []
    for kv_head in range(k.shape[1]):
        order = [kv_head] * num_heads
        outputs.append(attend(q, k[:, order], v[:, order], case.chain.scaling))
    return outputs


def nearest_kv_heads(case: Case, outputs: list[Tensor], group: int) -> list[int | None]:
    """The KV head of each query head, from what came out; None: zeros came out."""
    order: list[int | None] = []
    for head in range(case.port.shape[1]):
        rows = case.wrong[:, head]
        mine = case.port[rows, head].to(case.step)
        if not rows.any():
            order.append(head // group)
        elif not mine.any():
            order.append(None)
        else:
            distances = [float((output[rows, head] - mine).norm()) for output in outputs]
            order.append(distances.index(min(distances)))
    return order

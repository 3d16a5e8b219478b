"""Which samples go into which micro-batch of which replica: equal budgets, equal work, prompts computed once."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_rlsc.types import DataShare, Load

Pack = list[int]
"""Of a micro-batch: rows of the documents."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What a token costs beside its way through the layers' matrices, which counts 1."""

    attention: float = 0.0
    """A key that it looks at."""
    head: float = 0.0
    """A response token's log-probability."""


BY_TOKENS = Work()


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """What packing needs to know of a sample."""

    prompt: int
    """Tokens."""
    response: int
    """Tokens."""
    family: int
    """Documents of one family have one prompt, which a pack computes once; without sharing each has its own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What every replica computes."""

    replicas: list[list[Pack]]
    """[dp][micro-batches]; a pack is empty where there are fewer documents than packs."""
    load: Load


def plan_packs(
    documents: Sequence[Document],
    share: DataShare,
    *,
    max_tokens: int,
    work: Work = BY_TOKENS,
    layout: Literal["packed", "padded"] = "packed",
) -> Plan:
    """Every replica gets the same number of packs.

    Packed: families are cut into bundles, and those laid by LPT, the heaviest first, each into the lightest of the
    packs that has room, with the least number of packs for which that works out. Coarse bundles repeat few prompts,
    fine ones share the work out evenly: of several sizes the one is taken whose heaviest replica has least to do.
    Padded: neighbours in length together, as each takes up as much as the longest of its pack.

    Args:
        documents: of the global batch.
        share: how many replicas, and what each asks of documents and packs.
        max_tokens: of one micro-batch.
        work: what documents are weighed by.
        layout: how the documents of a pack will lie.

    Raises:
        ValueError: a document is longer than a micro-batch.
    """
    measure = _Measure(documents, share, work, layout)
    capacity = share.capacity(max_tokens)
    longest = max(share.padded(document.prompt + document.response) for document in documents)
    if longest > capacity:
        raise ValueError(
            f"a sample of {longest} tokens does not fit a micro-batch of {capacity}: raise --max-tokens-per-micro-batch"
        )
    step = share.micro_batch_multiple * share.dp_size
    if layout == "padded":
        candidates = iter([_fill_padded(measure, capacity)])
    else:
        candidates = (_fill(bundles, measure, capacity, step) for bundles in _bundlings(measure, capacity))
    plans = (_deal(packs, measure, step, share.dp_size) for packs in candidates)
    replicas = min(plans, key=measure.heaviest)
    return Plan(replicas=replicas, load=measure.load(replicas))


class _Measure:
    """What packs hold, and what computing them costs."""

    def __init__(
        self, documents: Sequence[Document], share: DataShare, work: Work, layout: Literal["packed", "padded"]
    ) -> None:
        self.documents = documents
        self._share = share
        self._work = work
        self._padded = layout == "padded"

    def _firsts(self, pack: Pack) -> Iterator[tuple[Document, bool]]:
        """The pack's documents, and whether each computes its prompt."""
        seen: set[int] = set()
        for i in pack:
            document = self.documents[i]
            yield document, document.family not in seen
            seen.add(document.family)

    def tokens(self, pack: Pack) -> int:
        """That it takes up, the padding that documents need included."""
        if self._padded:
            return len(pack) * max((self._length(i) for i in pack), default=0)
        return sum(
            self._share.padded(document.response + (document.prompt if first else 0))
            for document, first in self._firsts(pack)
        )

    def cost(self, pack: Pack) -> float:
        """In tokens' ways through the layers."""
        total = float(self.tokens(pack))
        for document, first in self._firsts(pack):
            own = document.response + (document.prompt if first else 0)
            before = 0 if first else document.prompt
            total += self._work.attention * own * (before + own / 2) + self._work.head * document.response
        return total

    def _length(self, i: int) -> int:
        return self.documents[i].prompt + self.documents[i].response

    def heaviest(self, replicas: Sequence[Sequence[Pack]]) -> float:
        """Cost of the replica that the others wait for."""
        return max(sum(map(self.cost, packs)) for packs in replicas)

    def load(self, replicas: Sequence[Sequence[Pack]]) -> Load:
        packs = [pack for replica in replicas for pack in replica]
        multiple = self._share.pack_multiple
        laid = sum(-(-self.tokens(pack) // multiple) * multiple if pack else self._filler() for pack in packs)
        new = sum(d.response + (d.prompt if first else 0) for pack in packs for d, first in self._firsts(pack))
        whole = sum(d.prompt + d.response for d in self.documents)
        costs = [sum(map(self.cost, replica)) for replica in replicas]
        return Load(
            padding_share=1 - new / laid,
            imbalance=max(costs) / (sum(costs) / len(costs)) - 1,
            reused_share=1 - new / whole,
        )

    def _filler(self) -> int:
        """Tokens of the pack of a replica that has none of its own."""
        return self._share.padded(min(map(self._length, range(len(self.documents)))))


def _bundlings(measure: _Measure, capacity: int) -> Iterator[list[Pack]]:
    """The documents as bundles of siblings, coarse at first, in the end one by one."""
    families = defaultdict[int, Pack](list)
    for i, document in enumerate(measure.documents):
        families[document.family].append(i)
    limit, before = capacity, 0
    while True:
        bundles = [bundle for family in families.values() for bundle in _cut(family, measure, limit)]
        if len(bundles) > before:
            yield bundles
        if len(bundles) == len(measure.documents):
            return
        limit, before = limit // 2, len(bundles)


def _cut(family: Pack, measure: _Measure, limit: int) -> list[Pack]:
    """One family in the fewest bundles of at most `limit` tokens, of one document where that is longer."""
    order = sorted(family, key=lambda i: -measure.documents[i].response)
    whole = measure.tokens(order)
    for count in range(max(1, min(len(order), math.ceil(whole / limit))), len(order)):
        bundles: list[Pack] = [[] for _ in range(count)]
        loads = [0] * count
        for i in order:
            lightest = loads.index(min(loads))
            bundles[lightest].append(i)
            loads[lightest] += measure.documents[i].response
        if all(measure.tokens(bundle) <= limit for bundle in bundles):
            return bundles
    return [[i] for i in order]


def _fill(bundles: list[Pack], measure: _Measure, capacity: int, step: int) -> list[Pack]:
    """Packs of at most `capacity` tokens, a multiple of `step` of them."""
    weighed = [(cost, measure.tokens(bundle), bundle) for cost, bundle in _heaviest_first(measure, bundles)]
    count = _round_up(max(1, math.ceil(sum(tokens for _, tokens, _ in weighed) / capacity)), step)
    while True:
        packs: list[Pack] = [[] for _ in range(count)]
        costs, room = [0.0] * count, [capacity] * count
        for cost, tokens, bundle in weighed:
            lightest = min((p for p in range(count) if room[p] >= tokens), key=costs.__getitem__, default=None)
            if lightest is None:
                break
            packs[lightest] += bundle
            costs[lightest] += cost
            room[lightest] -= tokens
        else:
            return packs
        count += step


def _fill_padded(measure: _Measure, capacity: int) -> list[Pack]:
    """Packs whose documents, each as long as the first, fit `capacity`."""
    packs: list[Pack] = []
    for i in sorted(range(len(measure.documents)), key=lambda i: -measure.tokens([i])):
        if packs and measure.tokens([*packs[-1], i]) <= capacity:
            packs[-1].append(i)
        else:
            packs.append([i])
    return packs


def _deal(packs: list[Pack], measure: _Measure, step: int, dp_size: int) -> list[list[Pack]]:
    """As many to each replica; the heaviest first, to the one that has least to do of those that still get one."""
    packs = packs + [[] for _ in range(_round_up(max(1, len(packs)), step) - len(packs))]
    each = len(packs) // dp_size
    replicas: list[list[Pack]] = [[] for _ in range(dp_size)]
    costs = [0.0] * dp_size
    for cost, pack in _heaviest_first(measure, packs):
        lightest = min((r for r in range(dp_size) if len(replicas[r]) < each), key=costs.__getitem__)
        replicas[lightest].append(pack)
        costs[lightest] += cost
    return replicas


def _heaviest_first(measure: _Measure, packs: Sequence[Pack]) -> list[tuple[float, Pack]]:
    """With their costs."""
    return sorted(((measure.cost(pack), pack) for pack in packs), key=lambda weighed: -weighed[0])


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple

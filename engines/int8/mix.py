"""Mixed-precision search: the fewest blocks that must stay float to keep the accuracy budget."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tap_deploy import graphs
from tap_deploy.engines.int8.blocks import Exclusions, nodes_by_block
from tap_deploy.engines.int8.budget import AccuracyBudget
from tap_deploy.engines.verdict.agreement import ReferenceAnswers
from tap_deploy.engines.verdict.tally import Agreement
from tap_deploy.sessions.contract import Session

# Creates a session of a graph in which only the given nodes are quantized.
SessionFor = Callable[[str, Sequence[str]], Session]
OnTrial = Callable[[str], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockDamage:
    """Effect of quantizing a single block.

    Attributes:
        graph: name of the graph.
        block: name of the block.
        nodes: its quantizable nodes.
        budget_use: used multiple of the budget.
        agreement: agreement with the reference when only this block is quantized.
    """

    graph: str
    block: str
    nodes: tuple[str, ...]
    budget_use: float
    agreement: Agreement

    @property
    def order(self) -> tuple[float, float]:
        """Sort key, larger is worse: the used budget, then the worst noise of the tensors."""
        return self.budget_use, -min(self.agreement.sqnr_db.values())

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return {
            "graph": self.graph,
            "block": self.block,
            "nodes": list(self.nodes),
            "budget_use": self.budget_use,
            "mask_iou": self.agreement.mask_iou,
            "concept_top1": self.agreement.concept_top1,
            "caption_tokens": self.agreement.captions.tokens_equal,
            "worst_sqnr_db": min(self.agreement.sqnr_db.values()),
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mix:
    """Result of the mixed-precision search.

    Attributes:
        exclusions: blocks that stay float.
        ranking: all blocks, the most harmful first.
        everything_quantized: agreement without exclusions.
        agreement: agreement with the exclusions.
        within_budget: whether the mix keeps the budget; if not, all blocks are excluded.
    """

    exclusions: Exclusions
    ranking: tuple[BlockDamage, ...]
    everything_quantized: Agreement
    agreement: Agreement
    within_budget: bool

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types; users can edit ``exclude`` and pass it to ``--exclusions``."""
        return {
            "exclude": self.exclusions.to_dict(),
            "within_budget": self.within_budget,
            "agreement": self.agreement.to_dict(),
            "everything_quantized": self.everything_quantized.to_dict(),
            "ranking": [block.to_dict() for block in self.ranking],
        }


class MixSearch:
    """Searches the fewest blocks to exclude from quantization.

    1. Rank the blocks by the damage of quantizing each alone, to masks, names and captions.
    2. Find by bisection the smallest number of worst blocks whose exclusion keeps the budget.
    3. Quantize excluded blocks again, the least harmful first, while the budget is kept.

    Args:
        answers: regions to evaluate on, with the reference's answers.
        nodes: graph name -> nodes that are quantized without exclusions.
        session_for: creates candidate sessions.
        budget: accuracy budget.
        on_trial: called with the name of each trial before it starts.
    """

    def __init__(
        self,
        answers: ReferenceAnswers,
        nodes: Mapping[str, Sequence[str]],
        session_for: SessionFor,
        budget: AccuracyBudget,
        on_trial: OnTrial | None = None,
    ) -> None:
        self._answers, self._session_for, self._budget = answers, session_for, budget
        self._nodes = {name: tuple(nodes.get(name, ())) for name in graphs.GRAPH_NAMES}
        self._say = on_trial if on_trial is not None else _say_nothing

    def run(self) -> Mix:
        """Run the search; a single trial suffices if quantizing everything keeps the budget.

        Raises:
            SessionError: a candidate fails to load or run.
        """
        everything = self._trial("everything quantized", ())
        if self._fits(everything):
            return self._mix((), (), everything, everything)
        ranking = self.rank()
        count, agreement = self._fewest(ranking)
        excluded, agreement = self._prune(list(ranking[:count]), agreement)
        return self._mix(ranking, excluded, everything, agreement)

    def rank(self) -> tuple[BlockDamage, ...]:
        """Quantize each block alone, and return the blocks, the most harmful first."""
        damages = [
            self._damage(graph, block, members)
            for graph, nodes in self._nodes.items()
            for block, members in nodes_by_block(nodes).items()
        ]
        return tuple(sorted(damages, key=lambda damage: damage.order, reverse=True))

    def _damage(self, graph: str, block: str, nodes: tuple[str, ...]) -> BlockDamage:
        self._say(f"{graph} {block} alone")
        with self._session_for(graph, nodes) as session:
            agreement = self._answers.agreement({graph: session})
        return BlockDamage(
            graph=graph,
            block=block,
            nodes=nodes,
            budget_use=self._budget.use(agreement),
            agreement=agreement,
        )

    def _fewest(self, ranking: Sequence[BlockDamage]) -> tuple[int, Agreement]:
        """Return how many of the worst blocks to exclude, at least 1, and the agreement then."""
        low, high = 1, len(ranking)
        found: dict[int, Agreement] = {}
        while low < high:
            middle = (low + high) // 2
            found[middle] = self._trial(f"without the worst {middle}", ranking[:middle])
            low, high = (low, middle) if self._fits(found[middle]) else (middle + 1, high)
        if low not in found:
            found[low] = self._trial(f"without the worst {low}", ranking[:low])
        return low, found[low]

    def _prune(
        self, excluded: list[BlockDamage], agreement: Agreement
    ) -> tuple[list[BlockDamage], Agreement]:
        """Quantize excluded blocks again, the least harmful first, while the budget is kept."""
        if not self._fits(agreement):
            return excluded, agreement
        # The last block must stay excluded: the bisection showed that the budget needs it.
        for block in reversed(excluded[:-1]):
            rest = [other for other in excluded if other is not block]
            trial = self._trial(f"with {block.graph} {block.block} again", rest)
            if self._fits(trial):
                excluded, agreement = rest, trial
        return excluded, agreement

    def _trial(self, name: str, excluded: Sequence[BlockDamage]) -> Agreement:
        self._say(name)
        exclusions = _exclusions(excluded)
        sessions: dict[str, Session] = {}
        try:
            for graph, nodes in self._nodes.items():
                kept = exclusions.keep(graph, nodes)
                if kept:
                    sessions[graph] = self._session_for(graph, kept)
            return self._answers.agreement(sessions)
        finally:
            for session in sessions.values():
                session.close()

    def _fits(self, agreement: Agreement) -> bool:
        return self._budget.use(agreement) <= 1

    def _mix(
        self,
        ranking: Sequence[BlockDamage],
        excluded: Sequence[BlockDamage],
        everything: Agreement,
        agreement: Agreement,
    ) -> Mix:
        return Mix(
            exclusions=_exclusions(excluded),
            ranking=tuple(ranking),
            everything_quantized=everything,
            agreement=agreement,
            within_budget=self._fits(agreement),
        )


def _exclusions(blocks: Sequence[BlockDamage]) -> Exclusions:
    entries: dict[str, tuple[str, ...]] = {}
    for block in blocks:
        entries[block.graph] = (*entries.get(block.graph, ()), block.block)
    return Exclusions(entries=entries)


def _say_nothing(trial: str) -> None:
    """Ignore progress; the default callback."""

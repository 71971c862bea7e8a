"""What embedding and head would lose at each width, measured while the float model is surveyed.

| symbol | meaning |
| --- | --- |
| ``h_t`` | what leaves the last block at token ``t`` |
| ``W, W_b [V, D]`` | the table, and what is stored of it at ``b`` bits |
| ``D_t`` | how far what enters the first block moves if the embedding is ``W_b`` |
| ``g_t`` | gradient of the sequence's loss with respect to that |

Of a head the loss is what happens, ``mean_t KL(softmax(W h_t) || softmax(W_b h_t))``. Of an embedding it is the second
order, the labels being the model's own: ``sum_s sum_v (sum_{t in s, token v} g_t D_t)^2 / (2 T)``; the errors of one
row of the table come together, those of different rows do not. Both are nats a token, as the groups' distortions are. A
table that is both loses both.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from bitfloor.calib.capture import capture
from bitfloor.core.affine import decode
from bitfloor.core.spec import QuantSpec
from bitfloor.modeling.loader import SourceModel
from bitfloor.pipeline.choice import Item, budget_bits
from bitfloor.pipeline.ends import ROWS, Rounding, is_head, to_nearest
from bitfloor.pipeline.head import enough, head_rounding, shown_states
from bitfloor.pipeline.job import Assignment
from bitfloor.pipeline.student import Head, gives_tuple, poured
from bitfloor.pipeline.survey import SurveyOptions

TOKENS = 4096  # on which a head is judged


class Ends:
    """Embedding and head in a survey.

    Args:
        source: the float model.
        assignment: the storage of every matrix.
        widths: to choose from, rising.
        options: of the survey.
        by_logits: the head is rounded towards its logits, not to nearest.
    """

    def __init__(
        self,
        source: SourceModel,
        assignment: Assignment,
        widths: Sequence[int],
        options: SurveyOptions,
        *,
        by_logits: bool = False,
    ) -> None:
        self.source, self.widths, self.options = source, tuple(widths), options
        self.assignment, self.by_logits = assignment, by_logits
        self.rounding: Rounding = to_nearest  # of the head, once it is known what reaches it
        self.refs = {name: ref for name, ref in assignment.refs.items() if ref.block < 0}
        self.specs = {name: assignment.specs[name] for name in self.refs if name in assignment.specs}
        self.tied = assignment.tied
        self.losses = {name: torch.zeros(len(self.widths), dtype=torch.float64) for name in self.specs}

    def items(self) -> dict[str, Item]:
        """The tables as parts of a budget; each has one width."""
        found = {}
        for name, spec in self.specs.items():
            ref = self.refs[name]
            groups = len(spec.group_widths(ref.shape[1]))
            options = tuple((bits,) * groups for bits in self.widths)
            tried = [[bits, float(f"{loss:.6g}")] for bits, loss in zip(self.widths, self.losses[name], strict=True)]
            found[name] = Item(ref, spec, options, self.losses[name], budget_bits(ref, spec, None), {"tried": tried})
        return found

    @torch.no_grad()
    def leaving(self, rows: Sequence[Tensor], hidden: Iterable[Tensor]) -> None:
        """See :class:`bitfloor.pipeline.survey.Ends`."""
        name = self._named("embedding" if self.tied else "head")
        if name is None:
            return
        head_param = self.refs[name].param
        device = self.options.device
        if self.by_logits:
            few = enough(self.source, rows)
            states = (state.to(device) for _, state in zip(few, hidden, strict=False))
            shown = shown_states(self.source, few, states, self.options.products, device)
            self.rounding = head_rounding(shown, tied=self.tied)
        kept: list[tuple[Tensor, Tensor]] = []
        for ids, state in zip(rows, hidden, strict=True):
            if sum(own.numel() for own, _ in kept) >= TOKENS:
                break
            kept.append((ids, state.to(device)))
        tokens = sum(ids.numel() for ids, _ in kept)
        head = Head(self.source, self.options.products, as_tuple=gives_tuple(self.source, rows[0], device))
        table = self.source.skeleton.get_parameter(head_param).detach()
        for at, bits in enumerate(self.widths):
            rough = torch.empty_like(table)
            for start in range(0, len(table), ROWS):
                rough[start : start + ROWS] = self._rounded(table[start : start + ROWS], name, bits)
            for ids, state in kept:
                exact = head.logits(ids, state, {}).log_softmax(-1)
                found = head.logits(ids, state, {head_param: rough}).log_softmax(-1)
                self.losses[name][at] += float((exact.exp() * (exact - found)).sum()) / tokens

    @torch.no_grad()
    def entering(self, rows: Sequence[Tensor], flow: Iterable[Tensor]) -> None:
        """See :class:`bitfloor.pipeline.survey.Ends`."""
        name = self._named("embedding")
        if name is None:
            return
        source, device = self.source, self.options.device
        source.load_outer(device, head=False)
        try:
            path, param = source.map.blocks_path, self.refs[name].param
            table = source.skeleton.get_parameter(param).detach()
            used = torch.unique(torch.cat([ids.flatten() for ids in rows]))
            tokens = sum(ids.numel() for ids in rows)
            for at, bits in enumerate(self.widths):
                # Only the rows that occur matter, and only they are rounded.
                rough = table.clone()
                for part in torch.split(used, ROWS):
                    rough[part] = self._rounded(table[part], name, bits)
                for ids, gradient in zip(rows, flow, strict=True):
                    exact = capture(source.skeleton, path, [ids]).hidden[0]
                    with poured(source, {param: rough}):
                        moved = capture(source.skeleton, path, [ids]).hidden[0] - exact
                    products = (gradient.to(moved.device) * moved).sum(-1).flatten()
                    own, which = torch.unique(ids, return_inverse=True)
                    total = products.new_zeros(len(own)).index_add_(0, which.flatten().to(products.device), products)
                    self.losses[name][at] += float(total.square().sum(dtype=torch.float64)) / (2 * tokens)
        finally:
            source.release_outer()

    def _named(self, kind: str) -> str | None:
        """The quantized table of a kind."""
        return next((name for name in self.specs if self.refs[name].kind == kind), None)

    def _rounded(self, rows: Tensor, name: str, bits: int) -> Tensor:
        head = is_head(self.refs[name], self.assignment)
        return rounded(rows, self.specs[name], bits, self.rounding if head else to_nearest)


def rounded(table: Tensor, spec: QuantSpec, bits: int, rounding: Rounding = to_nearest) -> Tensor:
    """Rows of a table as they would be stored: float32."""
    codes, grid, _ = rounding(table.float(), replace(spec, bits=bits, widths=()))
    return decode(codes, grid)

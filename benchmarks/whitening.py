"""What it costs to whiten value gradients by decomposition (eigh) and by following the last turn's root (newton):

    python -m benchmarks.whitening [--d-v 576] [--turns 60] [--rows 400] [--decay 1.0] [--floor 0.01] [--device cuda]
    python -m benchmarks.whitening --data FILE [--facts 10] [--turns 60] [--warm-up 20]

With a file in zsRE's form the rows are real: captures of the embedded model, layers 26 to 28, --facts of them a turn.
Otherwise they are made: rows of heavy-tailed length, eigenvalues that fall like i^-decay, directions that turn. The
first rows, as many as --warm-up turns bring and d_v + 2 at least, enter the statistics before anything is whitened.
Agreement is ||g_tilde (newton) - g_tilde (eigh)|| / ||g_tilde (eigh)|| of a turn's rows, eigh in float64. Flops are
counted: a product of d x d matrices as 2 d^3, of N rows with one as 2 N d^2, a decomposition with eigenvectors as 9 d^3
(Golub and Van Loan, Matrix Computations, section 8.3: 4/3 to make it tridiagonal, the rest for vectors). Seconds
are medians over the turns in which both were timed. With --state FILE a run that was stopped goes on from there.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.common import parser_with
from benchmarks.turn import build, parser_of
from data.disk import whole_or_absent
from editor.stopwatch import Stopwatch
from nets import LifelongNormalizer, Whitening


def captured(arguments: argparse.Namespace, device: torch.device) -> Iterator[Tensor]:  # (N, d_v) float32
    """Of all modules together, as they share their statistics."""
    chosen = parser_of(None).parse_args(["--data", str(arguments.data), "--device", str(device)])
    chosen.facts = arguments.facts * (arguments.warm_up + arguments.turns)
    model, whole = build(chosen)
    for start in range(0, len(whole.sequences), arguments.facts):
        turn = whole.part(range(start, min(start + arguments.facts, len(whole.sequences))))
        yield torch.cat([capture.value_grads for capture in model.capture(turn).modules.values()])


def made(arguments: argparse.Namespace, device: torch.device) -> Iterator[Tensor]:  # (N, d_v) float32
    d_v, turns = arguments.d_v, arguments.warm_up + arguments.turns
    generator = torch.Generator(device).manual_seed(0)
    drawn = partial(torch.randn, generator=generator, device=device)

    spread = 1e-4 * torch.arange(1, d_v + 1, device=device) ** (-arguments.decay / 2)
    first = torch.linalg.qr(drawn(d_v, d_v)).Q
    last = torch.linalg.qr(first + drawn(d_v, d_v) / d_v**0.5).Q
    least = -(-(d_v + 2) // arguments.rows)
    for turn in range(turns):
        rows = arguments.rows * (max(least - arguments.warm_up, 0) + 1 if turn == 0 else 1)
        made = drawn(rows, 1).abs() * drawn(rows, d_v) * spread
        late = torch.rand(rows, 1, generator=generator, device=device) < turn / turns
        yield torch.where(late, made @ last.T, made @ first.T)


def newton_flops(found: Whitening, d_v: int, rows: int) -> float:
    """Turning Sigma into the kept basis, what the steps multiply, and the rows."""
    products = (found.details["whitening_products"] or 0) + (
        2 if found.details["whitening_residual"] is not None else 0
    )
    return (
        2.0 * d_v**3 * products + 6.0 * rows * d_v**2 + (9.0 * d_v**3 if found.details["whitening_decomposed"] else 0)
    )


def main() -> None:
    sizes = {"d_v": 576, "turns": 60, "rows": 400, "warm_up": 20}
    parser = parser_with(__doc__, **sizes, decay=1.0, floor=0.01, device="cpu")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--facts", type=int, default=10, help="of a turn of real rows")
    parser.add_argument("--compared", type=int, default=10, help="every so many turns eigh is computed and timed too")
    parser.add_argument("--state", type=Path, help="kept here every --compared turns, and gone on from")
    arguments = parser.parse_args()
    device, d_v, floor = torch.device(arguments.device), arguments.d_v, arguments.floor
    followed = LifelongNormalizer(1, d_v, full=True, follow=True).to(device)
    plain = LifelongNormalizer(1, d_v, full=True).to(device)
    so_far = Measured()
    if arguments.state and arguments.state.exists():
        kept = torch.load(arguments.state, map_location=device)
        followed.load_state_dict(kept["normalizer"])
        so_far = Measured(**kept["measured"])

    for turn, rows in enumerate((captured if arguments.data else made)(arguments, device)):
        if turn < so_far.turns:
            continue
        followed.observe([(torch.zeros(len(rows), 1, device=device), rows)], 512)
        so_far.turns += 1
        if turn < arguments.warm_up:
            continue
        here = turn - arguments.warm_up
        so_far.rows += len(rows)
        watch = Stopwatch(device)
        with watch.measure("newton"):
            found, ours = whitened(followed, floor, rows)
        so_far.flops.append(newton_flops(found, d_v, len(rows)))
        if found.details["whitening_decomposed"]:
            so_far.decomposed.append(here)
        else:
            so_far.steps.append(found.details["whitening_steps"] or 0)
            so_far.newton.append(watch.seconds["newton"])
        if here % arguments.compared == 0 or here == arguments.turns - 1:
            plain.load_state_dict({name: followed.state_dict()[name] for name in plain.state_dict()})
            with watch.measure("eigh"):
                _, theirs = whitened(plain, floor, rows)
            so_far.agreement.append(float((ours - theirs).norm() / theirs.norm()))
            so_far.eigh.append(watch.seconds["eigh"])
            print(f"turn {here + 1} of {arguments.turns}: g_tilde differs by {so_far.agreement[-1]:.1e}", flush=True)
            if arguments.state:
                with whole_or_absent(arguments.state) as part:
                    torch.save({"normalizer": followed.state_dict(), "measured": vars(so_far)}, part)
    report(so_far, arguments, decay(followed))


@dataclass
class Measured:
    """What a run has found so far; seconds in the last two."""

    turns: int = 0  # of warm-up too
    rows: int = 0  # after warm-up
    agreement: list[float] = field(default_factory=list)
    decomposed: list[int] = field(default_factory=list)  # turns, counted from the first after warm-up
    steps: list[float] = field(default_factory=list)  # in all others
    flops: list[float] = field(default_factory=list)
    newton: list[float] = field(default_factory=list)  # where nothing was decomposed
    eigh: list[float] = field(default_factory=list)


def report(found: Measured, arguments: argparse.Namespace, decay: float) -> None:
    d_v, steps = arguments.d_v, found.steps
    a_turn = found.rows / arguments.turns
    eigh = 11.0 * d_v**3 + 2.0 * a_turn * d_v**2
    print(f"d_v = {d_v}, {a_turn:.0f} rows a turn, shift {arguments.floor}, {arguments.device}")
    print(f"  Sigma's eigenvalues fall as  {f'i^-{decay:.2f}':>8}")
    print(f"  g_tilde differs by at most   {max(found.agreement):8.1e} in {len(found.agreement)} turns")
    print(f"  decomposed after all in      {len(found.decomposed):8d} of {arguments.turns} turns: {found.decomposed}")
    if steps:
        print(f"  steps in all others          {statistics.mean(steps):8.2f} on average, {max(steps):.0f} at most")
        quarters = [steps[len(steps) * n // 4 : len(steps) * (n + 1) // 4] for n in range(4)]
        said = ", ".join(f"{statistics.mean(each):.1f} ({max(each):.0f} at most)" for each in quarters if each)
        print(f"  in each quarter of these     {said}")
        print(f"  seconds a turn, newton       {statistics.median(found.newton):8.3f}")
    print(f"  seconds a turn, eigh         {statistics.median(found.eigh):8.3f}")
    print(f"  flops a turn, newton         {statistics.mean(found.flops):8.2e} on average, in products")
    print(f"  flops a turn, eigh           {eigh:8.2e}, most of them not in products")


def decay(normalizer: LifelongNormalizer) -> float:
    """The exponent a of eigenvalues that fall as i^-a, by least squares of their logarithms, the first ten apart."""
    values = torch.linalg.eigvalsh(normalizer.value_scatter).flip(0)[10 : len(normalizer.value_scatter) // 2].log()
    places = torch.arange(11, 11 + len(values), device=values.device, dtype=values.dtype).log()
    return -float(torch.cov(torch.stack([places, values]))[0, 1] / places.var())


def whitened(normalizer: LifelongNormalizer, floor: float, rows: Tensor) -> tuple[Whitening, Tensor]:
    found = normalizer.whitening(0.0, floor, "shift")
    return found, normalizer.whiten_values(rows, found)


if __name__ == "__main__":
    main()

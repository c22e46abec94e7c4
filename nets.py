"""Tensors with state: the lifelong normaliser, and the hypernetwork on top of it.

Letters: n rows seen so far, b rows of a chunk, d_k key size, d_v value size, r rank of a block.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import reduce

import torch
from torch import Tensor, nn

from editor import linalg

# The released arithmetic is float32; its machine epsilon stays in the formula when the sums run in float64.
EPSILON = torch.finfo(torch.float32).eps

# A root that is followed: residual ||I - X (Sigma + s I) X||_F / sqrt(d_v) up to which it is taken. Float32 leaves some
# 1e-6 to 1e-5; g_tilde then differs by up to six times as much on real gradients, so by less than 1e-4.
FOLLOWED_TO = 1.5e-5
# Steps it has before Sigma is decomposed, which costs more than that many of them.
MOST_STEPS = 8
# The basis is renewed once there are that many times the rows it was made from: log(rows) times a run.
RENEWED_AT = 1.5


@dataclass(frozen=True)
class Whitening:
    """Sigma^(-1/2) as the factors whose product it is, and what is known of it."""

    factors: tuple[Tensor, ...]  # of (d_v, d_v) each
    floored: float  # fraction of Sigma's eigenvalues below the floor
    spectrum: Tensor  # (d_v,) eigenvalues of the root, or of one that is followed, its diagonal in the kept basis
    # how the root was found, where it is followed, or of what, where Sigma was shrunk
    details: Mapping[str, float | None] = field(default_factory=dict)


class FollowedRoot(nn.Module):
    """(Sigma + s I)^(-1/2), s = floor times the mean eigenvalue, followed from turn to turn without a decomposition.

    Kept are the eigenvectors Q of some earlier turn's Sigma and the last root, turned into them: Q^T Sigma Q is nearly
    diagonal, and `linalg.follow_root` finds its root from the last one in float32. Where that fails, and once the rows
    have grown by half since Q was found, Sigma is decomposed and its eigenvectors are kept from then on.
    Q^T Sigma Q is formed in float64: float32 would lose the small eigenvalues of a covariance that spans decades.
    """

    basis: Tensor  # Q (d_v, d_v)
    root: Tensor  # (d_v, d_v) of Sigma / (its mean eigenvalue), in that basis
    rows: Tensor  # () that Sigma had when the basis was made; zero before the first

    def __init__(self, d_v: int) -> None:
        super().__init__()
        self.register_buffer("rows", torch.zeros((), dtype=torch.float64))
        for name in ("basis", "root"):
            self.register_buffer(name, torch.zeros(d_v, d_v))

    @torch.no_grad()
    def find(
        self,
        covariance: Tensor,  # Sigma (d_v, d_v) float64
        count: Tensor,  # () rows that it has been estimated from
        floor: float,
    ) -> Whitening:
        """`details` hold whether Sigma was decomposed, steps, products of (d_v, d_v) matrices that they took, and the
        residual; None where none was tried.
        """
        mean, rows, rows_then = torch.stack([covariance.diagonal().mean(), count, self.rows]).tolist()
        steps, products, residual = 0, 0, None
        if rows < RENEWED_AT * rows_then:
            basis = self.basis.double()
            turned = (basis.T @ covariance @ basis).div_(mean)
            turned.diagonal().add_(floor)
            root, steps, products, residual = linalg.follow_root(turned.float(), self.root, FOLLOWED_TO, MOST_STEPS)
            if residual <= FOLLOWED_TO:
                self.root.copy_(root)
                floored = float((turned.diagonal() < 2 * floor).double().mean())
                return self._whitening(mean, floored, decomposed=0.0, steps=steps, products=products, residual=residual)
        vectors, scale, floored = linalg.inverse_root_spectrum(covariance, floor, "shift")
        self.basis.copy_(vectors)
        self.root.copy_(torch.diag(scale * mean**0.5))
        self.rows.fill_(rows)
        return self._whitening(mean, floored, decomposed=1.0, steps=steps, products=products, residual=residual)

    def _whitening(self, mean: float, floored: float, **found: float | None) -> Whitening:
        root = self.root / mean**0.5
        return Whitening(
            (self.basis, root, self.basis.T),
            floored,
            root.diagonal().double(),
            {f"whitening_{name}": value for name, value in found.items()},
        )


class LifelongNormalizer(nn.Module):
    """Running count, mean and scatter of z = [k | g] over every row ever observed (Chan et al. 1983).

    With delta = mean_b - mu:  mu += b delta/(n+b),  S += S_b + (n b/(n+b)) delta delta^T,  n += b.
    Keys keep the diagonal of the scatter; value gradients keep all of it if `full` (StableEdit's whitening needs it),
    else the diagonal. Standard deviations and covariances are derived on reading. Buffers are float64, so that row
    two million still counts.
    """

    count: Tensor  # ()
    key_mean: Tensor  # (d_k,)
    value_mean: Tensor  # (d_v,)
    key_scatter: Tensor  # (d_k,)
    value_scatter: Tensor  # (d_v, d_v) if full, else (d_v,)

    def __init__(self, d_k: int, d_v: int, full: bool, follow: bool = False) -> None:
        """With `follow`, the root of the value gradients' covariance is found from the last one (`FollowedRoot`)."""
        super().__init__()
        self.full = full
        self.followed = FollowedRoot(d_v) if follow else None
        for name, shape in {
            "count": (),
            "key_mean": (d_k,),
            "value_mean": (d_v,),
            "key_scatter": (d_k,),
            "value_scatter": (d_v, d_v) if full else (d_v,),
        }.items():
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float64))

    @torch.no_grad()
    def observe(
        self,
        sides: Iterable[tuple[Tensor, Tensor]],  # keys (b, d_k) and value gradients (b, d_v), of each module
        chunk: int | None = None,
    ) -> None:
        """Merge the rows into the statistics, `chunk` of them at a time or, with None, each module's at once.

        That bounds memory: the order and the size of the chunks do not matter beyond rounding.
        """
        seen = float(self.count)
        for keys, value_grads in sides:
            for rows in linalg.row_chunks(keys.shape[0], chunk):
                self._merge(self.key_mean, self.key_scatter, keys[rows], seen)
                self._merge(self.value_mean, self.value_scatter, value_grads[rows], seen)
                seen += rows.stop - rows.start
        self.count.fill_(seen)

    @staticmethod
    def _merge(
        mean: Tensor,  # (d,)
        scatter: Tensor,  # (d,) or (d, d)
        rows: Tensor,  # (b, d)
        seen: float,  # n
    ) -> None:
        rows = rows.to(mean.device).double()
        share = len(rows) / (seen + len(rows))  # b / (n + b)
        weight = seen * share  # n b / (n + b)
        batch_mean = rows.mean(0)
        centred = rows - batch_mean
        delta = batch_mean - mean
        if scatter.ndim == 2:
            scatter.addmm_(centred.T, centred).addr_(delta, delta, alpha=weight)
        else:
            scatter.add_(centred.square().sum(0)).add_(delta.square(), alpha=weight)
        mean.add_(delta, alpha=share)

    @property
    def key_std(self) -> Tensor:  # (d_k,)
        return self._std(self.key_scatter)

    @property
    def value_std(self) -> Tensor:  # (d_v,)
        return self._std(self.value_scatter.diagonal() if self.full else self.value_scatter)

    def _std(self, diagonal: Tensor) -> Tensor:
        """sqrt(diag(S)/(n-1)); zero while a single row is all there is, so that its normalised form is zero too."""
        return (diagonal / (self.count - 1).clamp_min(1)).sqrt()

    def normalize_keys(
        self,
        keys: Tensor,  # (b, d_k)
    ) -> Tensor:  # (b, d_k) float64
        """k_hat = (k - mu)/(sigma + eps), eps the machine epsilon of float32."""
        return (keys.to(self.count.device).double() - self.key_mean) / (self.key_std + EPSILON)

    def normalize_values(
        self,
        value_grads: Tensor,  # (b, d_v)
    ) -> Tensor:  # (b, d_v) float64
        """g_hat = (g - mu)/(sigma + eps), the diagonal form."""
        return (value_grads.to(self.count.device).double() - self.value_mean) / (self.value_std + EPSILON)

    def whiten_values(
        self,
        value_grads: Tensor,  # (b, d_v)
        whitening: Whitening,
    ) -> Tensor:  # (b, d_v) float64
        """g_tilde = Sigma^(-1/2) (g - mu), the full form."""
        centred = value_grads.to(self.count.device).double() - self.value_mean
        return reduce(torch.matmul, whitening.factors, centred.to(whitening.factors[0].dtype)).double()

    def can_whiten(self, mode: linalg.FloorMode) -> bool:
        """Whether there is a covariance that is not zero: its posterior mean needs n > d_v + 1, shrinkage n > 1."""
        least = 1 if mode == "shrinkage" else self.value_mean.numel() + 1
        return self.full and bool((self.count > least) & self.value_scatter.diagonal().any())

    def whitening(self, prior: float, floor: float, mode: linalg.FloorMode) -> Whitening:
        """Sigma^(-1/2) (d_v, d_v), Sigma = (eps0 I + S_g)/(n - d_v - 1), its eigenvalues kept from zero by the floor.

        Sigma is the posterior mean of a Normal-Inverse-Wishart model (StableEdit, Algorithm 1), eps0 = `prior`; with
        shrinkage it is (eps0 I + S_g)/(n - 1), shrunk towards its diagonal, and `details` have the coefficient.
        """
        covariance = self.value_scatter.clone()
        covariance.diagonal().add_(prior)
        if mode == "shrinkage":
            shrunk, share = linalg.shrunk_to_diagonal(covariance / (self.count - 1), float(self.count))
            root, floored, spectrum = linalg.inverse_square_root(shrunk, floor, mode)
            return Whitening((root,), floored, spectrum, {"whitening_shrinkage": share})
        covariance /= self.count - self.value_mean.numel() - 1
        if self.followed is not None:
            assert mode == "shift", "only the root of a shifted covariance can be followed"
            return self.followed.find(covariance, self.count, floor)
        root, floored, spectrum = linalg.inverse_square_root(covariance, floor, mode)
        return Whitening((root,), floored, spectrum)

    def moments(self) -> dict[str, Tensor]:
        """Copies of what normalises: mu and sigma of keys and of value gradients and, if full, the latters' Sigma."""
        spread = {"key_std": self.key_std, "value_std": self.value_std}
        if self.full:
            spread["value_covariance"] = self.value_scatter / (self.count - 1).clamp_min(1)
        return {"key_mean": self.key_mean.clone(), "value_mean": self.value_mean.clone(), **spread}

    def changes_since(self, before: Mapping[str, Tensor]) -> dict[str, float | None]:
        """||x - x_before|| / ||x_before|| of each of the `moments`; None where there was nothing to change."""
        norm, after = torch.linalg.vector_norm, self.moments()
        norms = [torch.stack([norm(now - before[name]), norm(before[name])]) for name, now in after.items()]
        return {
            f"{name}_change": moved / scale if scale > 0 else None
            for name, (moved, scale) in zip(after, torch.stack(norms).tolist(), strict=True)
        }

    def summary(self) -> dict[str, float | None]:
        """Rows seen, mean |mu| and mean sigma of the value gradients."""
        found = torch.stack([self.count, self.value_mean.abs().mean(), self.value_std.mean()])
        return dict(zip(("n", "mean_abs", "std_mean"), found.tolist(), strict=True))

    def reset(self) -> None:
        """Forget every row."""
        for buffer in self.buffers():
            buffer.zero_()


class HyperNetwork(nn.Module):
    """(k', g') = h(LN([k | g])): residual low-rank blocks over normalised rows, one network for modules of one shape.

    Every module of that shape has scales and shifts of its own in each block; the statistics of LN are shared, or one
    for each module with `own_statistics`. A fresh network is the identity after LN, because B = 0 (MEND, arXiv
    2110.11309, section 3.1; MALMEN, arXiv 2311.04661, section 4).
    """

    def __init__(
        self,
        d_k: int,
        d_v: int,
        n_modules: int,
        rank: int,
        n_blocks: int,
        own_statistics: bool,
        generator: torch.Generator,
    ) -> None:
        """`generator`, of the CPU, draws what a fresh network has at random: the first factor A of each block."""
        super().__init__()
        assert rank <= d_k + d_v, "a map of that size needs no more"
        self.d_k, self.d_v = d_k, d_v
        self.normalizers = nn.ModuleList(
            LifelongNormalizer(d_k, d_v, full=False) for _ in range(n_modules if own_statistics else 1)
        )
        self.blocks = nn.ModuleList(_Block(d_k + d_v, rank, n_modules, generator) for _ in range(n_blocks))

    def normalizer(self, module: int) -> LifelongNormalizer:
        """The running statistics that module number `module` uses."""
        normalizer = self.normalizers[module if len(self.normalizers) > 1 else 0]
        assert isinstance(normalizer, LifelongNormalizer)
        return normalizer

    def forward(
        self,
        keys: Tensor,  # (b, d_k)
        value_grads: Tensor,  # (b, d_v)
        module: int,
    ) -> tuple[Tensor, Tensor]:  # (b, d_k), (b, d_v) in the precision of the parameters
        """k' and g' of rows of module number `module`; the statistics are constants here."""
        normalizer = self.normalizer(module)
        normal = torch.cat([normalizer.normalize_keys(keys), normalizer.normalize_values(value_grads)], 1)
        rows = normal.to(next(self.parameters()).dtype)
        for block in self.blocks:
            rows = block(rows, module)
        return rows[:, : self.d_k], rows[:, self.d_k :]


class _Block(nn.Module):
    """x + s_m * max(x A B + b, 0) + o_m."""

    def __init__(self, size: int, rank: int, n_modules: int, generator: torch.Generator) -> None:
        super().__init__()
        drawn = torch.randn(size, rank, generator=generator)
        self.down = nn.Parameter(drawn / size**0.5)  # A: x A has the variance of x
        self.up = nn.Parameter(torch.zeros(rank, size))  # B
        self.bias = nn.Parameter(torch.zeros(size))
        self.scale = nn.Parameter(torch.ones(n_modules, size))
        self.shift = nn.Parameter(torch.zeros(n_modules, size))

    def forward(
        self,
        rows: Tensor,  # (b, size)
        module: int,
    ) -> Tensor:  # (b, size)
        # clamp, not relu: at 0, where a fresh block is, relu's gradient is 0 and B would never leave it; clamp's is 1
        inner = torch.addmm(self.bias, rows @ self.down, self.up).clamp(min=0)
        return torch.addcmul(rows + self.shift[module], self.scale[module], inner)

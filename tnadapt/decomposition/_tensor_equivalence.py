"""Square matrices, one for each mode, that turn one tensor into another: ``T = G ×_0 J_0 ×_1 J_1 …``.

Least squares in the matrices has local minima wherever they are not near the identity. Over finite fields the problem
is the one that the signature scheme MEDS relies on, and no fast algorithm is known. For real tensors in general
position linear algebra is enough. Both are multiplied by matrices that make the rows of every unfolding orthonormal up
to a factor: these exist, and are unique up to orthogonal ones (Kempf & Ness, 1979; Gurvits, 2004), so that what is left
to find is orthogonal. A symmetric matrix that is computed from a tensor alone, and turns with it, has eigenvectors in
each mode, which the orthogonal matrices must map to each other, and the signs follow from the elements.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tnadapt.algebra.products import mode_product, tucker_tensor, unfolded
from tnadapt.backends import load_backend

Bases = list[np.ndarray]

_NUMPY = load_backend("numpy")
# Balancing ends where the unfoldings' rows are orthonormal to this, or after this number of sweeps.
_BALANCED, _SWEEPS = 1e-9, 1000
# Combinations of two slices whose determinants are compared.
_ANGLES = 1 << 10
# Alternating steps from each start, which end where one gains less than this part of what is missing.
_STEPS, _GAIN = 100, 1e-3
# Number of starts for a small tensor, elements of all starts together, and the correlation of an exact answer.
_STARTS, _ELEMENTS, _EXACT = 64, 1 << 18, 1.0 - 1e-8


def equivalence(tensor: np.ndarray, wanted: np.ndarray, rng: np.random.RandomState) -> list[np.ndarray]:
    """Find matrices that turn a tensor nearly into another one, if there are such matrices.

    Parameters
    ----------
    tensor, wanted : ndarray of float64, shape (d_1, …, d_M)
        Not zero.
    rng : RandomState
        Of the starts that are tried if eigenvalues coincide, as they do for two slices, and for shapes such as
        (3, 3, 3): 64 for up to 4,096 elements, fewer for more.

    Returns
    -------
    list of ndarray, shapes (d_m, d_m)
        A start of an iteration, which is near an exact answer if there is one. If there is none, any matrices.

    Examples
    --------
    >>> rng = np.random.RandomState(0)
    >>> tensor, turn = rng.normal(size=(3, 4, 4)), [rng.normal(size=(size, size)) for size in (3, 4, 4)]
    >>> wanted = tucker_tensor(_NUMPY, tensor, turn)
    >>> matrices = equivalence(tensor, wanted, rng)
    >>> bool(np.linalg.norm(tucker_tensor(_NUMPY, tensor, matrices) - wanted) < 1e-3 * np.linalg.norm(wanted))
    True
    """
    (source, before), (target, after) = _balanced(tensor), _balanced(wanted)
    tries = max(1, min(_STARTS, _ELEMENTS // tensor.size))
    best, most = None, -1.0
    for _, start in zip(range(tries), _orthogonal_starts(source, target, rng), strict=False):
        turn, correlation = _turned(source, target, start)
        if correlation > most:
            best, most = turn, correlation
        if most >= _EXACT:
            break
    assert best is not None
    matrices = [np.linalg.pinv(b) @ q @ a for a, q, b in zip(before, best, after, strict=True)]
    image = tucker_tensor(_NUMPY, tensor, matrices)
    matrices[0] = matrices[0] * (np.vdot(image, wanted) / (np.vdot(image, image) or 1.0))
    return matrices


def _balanced(tensor: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return a tensor of norm 1 with equal singular values in every mode, and the matrices that make it of a tensor."""
    tensor = tensor / np.linalg.norm(tensor)
    matrices = [np.eye(size) for size in tensor.shape]
    for _ in range(_SWEEPS):
        uneven = 0.0
        for mode in range(tensor.ndim):
            rows = unfolded(_NUMPY, tensor, mode)
            values, vectors = np.linalg.eigh(rows @ rows.T)
            # Directions in which the tensor has nothing are left as they are.
            kept = values > 1e-12 * values[-1]
            values = np.where(kept, values * kept.sum(), 1.0)
            uneven = max(uneven, float(np.max(np.abs(values - 1.0))))
            matrix = (vectors / np.sqrt(values)) @ vectors.T
            matrices[mode] = matrix @ matrices[mode]
            tensor = mode_product(_NUMPY, tensor, matrix, mode)
            tensor = tensor / np.linalg.norm(tensor)
        if uneven < _BALANCED:
            break
    return tensor, matrices


def _orthogonal_starts(
    source: np.ndarray, target: np.ndarray, rng: np.random.RandomState
) -> Iterator[list[np.ndarray]]:
    """Yield orthogonal matrices that map eigenvectors of the source to those of the target, and random ones."""
    if 2 in source.shape:
        for ours, theirs in _bases_of_two_slices(source, target):
            yield _mapped(ours, theirs, _signs(source, target, ours, theirs))
    ours, theirs = _eigenvectors(source), _eigenvectors(target)
    yield _mapped(ours, theirs, _signs(source, target, ours, theirs))
    while True:
        yield [np.linalg.qr(rng.normal(size=v.shape))[0] for v in ours]
        yield _mapped(ours, theirs, [rng.choice([-1.0, 1.0], size=len(v)) for v in ours])


def _mapped(ours: Bases, theirs: Bases, signs: list[np.ndarray]) -> list[np.ndarray]:
    """Return the matrices that map one basis to the other, up to signs, in each mode."""
    return [(w * s) @ v.T for v, s, w in zip(ours, signs, theirs, strict=True)]


def _signs(source: np.ndarray, target: np.ndarray, ours: Bases, theirs: Bases) -> list[np.ndarray]:
    """Return the signs of basis vectors with which the elements of two tensors have equal signs.

    If the elements are equal up to signs, each unfolding of their product is a matrix of positive elements with signs,
    whose leading singular vector has the signs of the rows (Perron).
    """
    product = tucker_tensor(_NUMPY, source, [v.T for v in ours]) * tucker_tensor(_NUMPY, target, [v.T for v in theirs])
    signs = [np.ones(size) for size in product.shape]
    # A tensor of two slices falls into blocks, and only the mode of the slices has one leading vector.
    for mode in sorted(range(product.ndim), key=product.shape.__getitem__):
        leading = np.linalg.svd(unfolded(_NUMPY, product, mode), full_matrices=False)[0][:, 0]
        signs[mode] = np.where(leading < 0.0, -1.0, 1.0)
        product = mode_product(_NUMPY, product, signs[mode][None], mode)
    return signs


def _bases_of_two_slices(source: np.ndarray, target: np.ndarray) -> Iterator[tuple[Bases, Bases]]:
    """Yield bases of a tensor of two square slices, a pencil, and of one that it might be turned into.

    Over the angle of a combination of the slices, the determinants of the two differ by a rotation or a reflection of
    the angle, which the maximum of their correlation shows. After it the slices themselves correspond, and the singular
    vectors of the first one are the bases.
    """
    mode = source.shape.index(2)
    x, y = (np.moveaxis(tensor, mode, 0) for tensor in (source, target))
    if x.ndim != 3 or x.shape[1] != x.shape[2]:
        return
    angles = 2.0 * np.pi / _ANGLES * np.arange(_ANGLES)
    circle = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    waves = [np.linalg.det(np.tensordot(circle, z, axes=1) * len(x[0]) ** 0.5) for z in (x, y)]
    for mirror in (1.0, -1.0):
        ours = waves[0] if mirror > 0.0 else np.roll(waves[0][::-1], 1)
        correlation = np.fft.irfft(np.conj(np.fft.rfft(ours)) * np.fft.rfft(waves[1]), _ANGLES)
        cosine, sine = circle[np.argmax(np.abs(correlation))]
        turn = np.array([[cosine, -mirror * sine], [sine, mirror * cosine]])
        pairs = [(turn.T, np.eye(2))]
        (u, _, vh), (w, _, zh) = np.linalg.svd(np.tensordot(turn[0], x, axes=1)), np.linalg.svd(y[0])
        pairs += [(u, w), (vh.T, zh.T)]
        pairs.insert(mode, pairs.pop(0))
        yield [v for v, _ in pairs], [w for _, w in pairs]


def _eigenvectors(tensor: np.ndarray) -> Bases:
    """Return for each mode the eigenvectors of a matrix that turns with the tensor: four copies of it, contracted."""
    bases = []
    for mode, size in enumerate(tensor.shape):
        rows = unfolded(_NUMPY, tensor, mode)
        x = rows.reshape(size, tensor.shape[0 if mode else 1], -1)
        cubic = np.einsum("cjl,bml,cmk->bjk", x, x, x, optimize=True)
        bases.append(np.linalg.eigh(cubic.reshape(size, -1) @ rows.T)[1])
    return bases


def _turned(source: np.ndarray, target: np.ndarray, turn: list[np.ndarray]) -> tuple[list[np.ndarray], float]:
    """Turn the source to the target, by the best orthogonal matrix of one mode after another; add the correlation."""
    turn, correlation = list(turn), -1.0
    for _ in range(_STEPS):
        before = correlation
        # The eigenvectors may be wrong in one mode: it is the first to be replaced.
        for mode in reversed(range(source.ndim)):
            others: list[np.ndarray | None] = [q if other != mode else None for other, q in enumerate(turn)]
            rows = unfolded(_NUMPY, tucker_tensor(_NUMPY, source, others), mode)
            u, s, vh = np.linalg.svd(unfolded(_NUMPY, target, mode) @ rows.T)
            turn[mode], correlation = u @ vh, float(s.sum())
        if correlation - before < _GAIN * (1.0 - correlation):
            break
    return turn, correlation

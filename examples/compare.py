"""Compares methods that keep a square layer well-conditioned: the time of a step, and kappa.

    python examples/compare.py --size 512

The comparison includes geotorch and orthogonium if they are installed. Time is the CPU time of a
step relative to training without a method. Kappa is the condition number of the effective weight of
the layer, after 10 steps, at the end, and after `enforce()` of a limit.
"""

import argparse
import importlib.util
import time

import torch
from torch import nn

import wellcond as wc


def plain(size):
    return nn.Linear(size, size)


def parametrized(register, **options):
    def build(size):
        layer = plain(size)
        register(layer, "weight", **options)
        return layer

    return build


def methods():
    """Name, constructor of the layer, wellcond's rule for it, and penalty in the loss."""
    parametrizations = nn.utils.parametrizations
    yield "nothing", plain, None, None
    yield "wellcond: ConditionLimit(10)", plain, wc.ConditionLimit(10), None
    yield (
        "wellcond: SingularValueLimit(lower=0.2, upper=2)",
        plain,
        wc.SingularValueLimit(lower=0.2, upper=2.0),
        None,
    )
    yield "wellcond: IsometryStep(scale=1)", plain, wc.IsometryStep(scale=1.0), None
    yield "wellcond: ConditionPenalty(100)", plain, wc.ConditionPenalty(100.0), None
    yield "r by an SVD in the loss", plain, None, wc.condition_penalty
    yield "torch: spectral_norm", parametrized(parametrizations.spectral_norm), None, None
    for kind in ("matrix_exp", "cayley", "householder"):
        build = parametrized(parametrizations.orthogonal, orthogonal_map=kind)
        yield f"torch: orthogonal, {kind}", build, None, None
    if importlib.util.find_spec("geotorch"):
        import geotorch

        yield "geotorch: orthogonal", parametrized(geotorch.orthogonal), None, None
        near = parametrized(geotorch.almost_orthogonal, lam=9 / 11)
        yield "geotorch: almost_orthogonal(lam=9/11)", near, None, None
    if importlib.util.find_spec("orthogonium"):
        from orthogonium.layers.linear import OrthoLinear

        yield "orthogonium: OrthoLinear", lambda size: OrthoLinear(size, size), None, None


def kappa(layer):
    was, _ = layer.training, layer.eval()  # so that spectral_norm does not update its estimate
    with torch.no_grad():
        value = float(wc.condition_number(layer.weight))
    layer.train(was)
    return value


def train(build, rule, penalty, size, steps):
    """Seconds per step, and kappa after 10 steps, at the end, and after enforce()."""
    torch.manual_seed(0)
    layer = build(size)
    target = torch.randn(size, size) / size**0.5
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-3)
    reg = wc.Regularizer(layer, {"weight": rule}) if rule else None
    if reg:
        reg.attach(optimizer)
    kappas, spent = [], 0.0
    for step in range(steps):
        x = torch.randn(32, size)
        begun = time.process_time()
        optimizer.zero_grad()
        loss = (layer(x) - x @ target).square().mean()
        if penalty:
            loss = loss + penalty(layer.weight)
        loss.backward()
        optimizer.step()
        spent += time.process_time() - begun
        if step + 1 == min(10, steps):
            kappas.append(kappa(layer))
    kappas.append(kappa(layer))
    if isinstance(rule, wc.Limit):
        reg.enforce()
        kappas.append(kappa(layer))
    return spent / steps, kappas


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--steps", type=int, default=60)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    unit = None
    print("| method | time of a step | kappa after 10 steps | at the end | enforced |")
    print("|---|---|---|---|---|")
    for name, *method in methods():
        seconds, kappas = train(*method, arguments.size, arguments.steps)
        unit = unit or seconds
        shown = [f"{number:.5g}" for number in kappas] + [""] * (3 - len(kappas))
        print(f"| {name} | {seconds / unit:.1f} | {' | '.join(shown)} |", flush=True)


if __name__ == "__main__":
    main()

"""The function ``report`` and the class ``Report`` that it returns."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

from torch import nn

from halo_tensor.analysis import gpus
from halo_tensor.analysis.ceilings import Ceilings
from halo_tensor.analysis.trial_run import LossFn
from halo_tensor.convert import warn_of_share
from halo_tensor.diagnostics.reports import experts, figure, html, text
from halo_tensor.diagnostics.reports.candidates import Candidate, Candidates, accepted_layers, candidates_for
from halo_tensor.diagnostics.reports.comparison import Comparison, comparing, weight_name
from halo_tensor.diagnostics.reports.data import CandidateReport, LayerReport, ReportData
from halo_tensor.diagnostics.reports.layers import exact_products, fidelity, layer_report, predict_time
from halo_tensor.diagnostics.reports.recommendation import recommend, speed_of


class Report(ReportData):
    """The result of :func:`report`.

    ``str(report)`` is a summary. ``quantize_(model, report.config)`` follows the recommendation. If ``report.balanced``,
    ``balance_(model, **batch)`` comes after it.

    Attributes:
        model: name of the model's class.
        loss: the loss of the batch in high precision.
        tokens: tokens of the batch.
        step_tokens: tokens of the training step whose time is predicted.
        sampled: how many rows of X and E each layer's own products were measured with, at most.
        layers: the measurements of each layer.
        candidates: the measurements of the whole model under each candidate.
        min_cosine: as passed to :func:`report`.
        min_sqnr: as passed to :func:`report`, in dB.
        min_gain: as passed to :func:`report`; 0 if it does not apply.
        ceilings: the rates of the GPU whose time is predicted.
        seconds: how long the report took.
        gradient_of: the parameters whose gradient was compared, in words.
        recommended: the name of a candidate; None if high precision is recommended.
        result: the model under the recommendation, exceptions included; None if high precision is recommended.
        verdict: the recommendation in words, with its reasons.
        share: the fraction of the linear layers' parameters, stacks of experts included, that the measured layers hold.
        left_alone: the layers that no candidate converts, and why, a line for each reason.
        exceptions: the layers that should not follow ``recommended``.
        config: the recommendation for ``quantize_``; None if high precision is recommended.
        balanced: whether ``balance_`` should follow ``quantize_``.

    Example:
        >>> import torch
        >>> from halo_tensor import quantize_, report
        >>> model = torch.nn.Sequential(torch.nn.Linear(128, 128), torch.nn.ReLU(), torch.nn.Linear(128, 128))
        >>> found = report(model, torch.randn(64, 128), loss_fn=lambda model, x: model(x).square().mean(), gpu="H100")
        >>> text = found.to_markdown()
        >>> if found.config is not None:
        ...     conversion = quantize_(model, found.config)
    """

    def to_json(self, path: str | Path | None = None) -> str:
        """Return all numbers as JSON, and write them to ``path`` if it is given."""
        return _written(json.dumps(self.to_dict(), indent=1, ensure_ascii=False, allow_nan=False), path)

    def to_markdown(self, path: str | Path | None = None) -> str:
        """Return a summary and a table of all layers, and write them to ``path`` if it is given."""
        return _written(text.markdown(self), path)

    def to_html(self, path: str | Path | None = None) -> str:
        """Return a page that needs no other file, and write it to ``path`` if it is given."""
        return _written(html.page(self), path)

    def to_png(self, path: str | Path) -> None:
        """Draw the report.

        Args:
            path: the file to write.

        Raises:
            ImportError: matplotlib is not installed.
        """
        figure.draw(self, path)

    def __str__(self) -> str:
        return text.summary(self)


def _written(content: str, path: str | Path | None) -> str:
    if path is not None:
        Path(path).write_text(content + "\n", encoding="utf-8")
    return content


def report(
    model: nn.Module,
    batch: Any,
    *,
    loss_fn: LossFn | None = None,
    candidates: Mapping[str, Candidate] | Iterable[Candidate] | None = None,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    min_cosine: float = 0.97,
    min_sqnr: float = 20.0,
    min_gain: float | None = None,
    tokens: int = 128,
    step_tokens: int | None = None,
    gpu: str | None = None,
    ceilings: Ceilings | None = None,
) -> Report:
    """Measure what each candidate recipe does to a model's gradient, and recommend one.

    The model runs forward and backward once exactly, in its own dtype, and once under each candidate, converted as
    ``quantize_`` would convert it. In addition, each layer's three products are computed from sampled rows of the exact X and
    E, by the autograd function that training uses, and compared with float32's. Experts of mixtures are judged as one layer,
    with the sampled tokens that the router sends to them. The time on a GPU is predicted, not measured
    (:mod:`halo_tensor.analysis.roofline`).

    A candidate is faithful if the cosine of the whole gradient with the exact one is at least ``min_cosine``. The fastest
    faithful candidate is recommended. Another candidate replaces it if it is less than 5 % slower, has at most half of its
    1 − cosine, and a cosine that is higher by more than 0.001. A layer with a product below ``min_sqnr`` under the recommended
    recipe, or with a predicted speed below ``min_gain``, takes the fastest candidate that reaches both, or high precision if
    there is none. If no layer reaches ``min_gain``, high precision is recommended. If no candidate
    is faithful, the one with the highest cosine is tried with such exceptions. If that is not faithful either, or leaves no
    layer, high precision is recommended. A balanced candidate has to halve the error to replace one that is as fast. If it is
    recommended, the exceptions are chosen among balanced candidates, because ``balance_`` reaches all layers.

    Args:
        model: plain or converted. The dense weights of a converted model are measured, without its balance. It is left as it
            was, also after an error: parameters, gradients, modes, hooks and random state. It runs in evaluation mode.
        batch: the model is called as ``model(**batch)`` for a mapping, ``model(*batch)`` for a tuple or list, and
            ``model(batch)`` for anything else. The loss is the output's ``loss``, or the output itself.
        loss_fn: ``(model, batch) -> scalar``, for models that return no loss.
        candidates: configs, or a mapping from names to configs. The default is HALO-0, 1 and 2 in int8 and HALO-0 and 1 in
            fp8, those that the device runs and the modelled GPU multiplies faster than bf16: only fp8 on a B300, only int8 on
            an A100. ``halo_config(dtype="bf16")`` lets high precision compete in speed. ``Balanced(config)`` is that config
            followed by ``balance_`` on the batch.
        filter_fn: ``(module, qualified name) -> bool``, as in ``quantize_``.
        min_cosine: the least cosine of the whole gradient. 0.97 is a relative error of 24 %, about the difference between the
            exact gradients of two batches of a thousand tokens.
        min_sqnr: the least SQNR of each product of a layer, in dB. 20 is a relative error of 10 %.
        min_gain: the least predicted speed of a layer, × bf16. None is 1.0 if the rates of the GPU are known: it is named, or
            at hand and listed. If another GPU stands in for it, None is 0. Candidates without a kernel (MXFP8, NVFP4) are
            measured, but never recommended.
        tokens: evenly spaced rows of X and E with which each layer's own products are measured. On SmolLM2's 210 layers, 128
            rows give SQNRs that differ from those of all 512 rows by 0.06 dB in output and 0.2 dB in grad_input (int8 HALO-1,
            medians). grad_weight contracts over the sampled rows, and its SQNR is 1.8 dB higher: pass more rows for it.
        step_tokens: tokens in a training step, for the predicted time, if the batch is only a part of one.
        gpu: the GPU to model, "RTX 4090" for example. The default is the model's GPU, or this machine's, or an H100. The rates
            of an H100 were measured, those of other GPUs are published by NVIDIA (:mod:`halo_tensor.analysis.gpus`). A GPU
            that is not listed is modelled as another one of its generation, and the report says so.
        ceilings: your own rates, instead of ``gpu``.

    Returns:
        the measurements and the recommendation.

    Raises:
        TypeError: a candidate is no config.
        ValueError: the loss is no finite scalar; no layer is eligible (the message says why); there is no candidate; ``gpu``
            is not known; or both ``gpu`` and ``ceilings`` are given.
        RuntimeError: the device or the modelled GPU cannot run one of the ``candidates`` passed.

    Example:
        >>> import torch
        >>> from halo_tensor import report
        >>> model = torch.nn.Sequential(torch.nn.Linear(128, 128), torch.nn.ReLU(), torch.nn.Linear(128, 128))
        >>> found = report(model, torch.randn(64, 128), loss_fn=lambda model, x: model(x).square().mean(), gpu="H100")
        >>> len(found.layers)
        2
    """
    start = perf_counter()
    model = getattr(model, "_orig_mod", model)
    if ceilings is not None and gpu is not None:
        raise ValueError("gpu and ceilings both say what to model: pass one of them")
    if min_gain is None:
        min_gain = float(ceilings is not None or gpus.known_ceilings(gpu, next(model.parameters()).device)[0] is not None)
    if ceilings is None:
        ceilings = gpus.modelled(gpu, next(model.parameters()).device)
    compared = candidates_for(candidates, model, ceilings)
    accepted, covered = accepted_layers(model, compared.configs, filter_fn)
    warn_of_share(model, covered, stacklevel=3)
    with comparing(model, batch, loss_fn, covered.converted) as comparison:
        comparison.run_exactly(tokens, balancing=bool(compared.balanced))
        total = max(own.tokens for own in comparison.operands.values())
        layers = _layers(comparison, compared, accepted, step_tokens or total, ceilings)
        measured = _run_candidates(comparison, compared, accepted, layers)

        def run_mixture(chosen: dict[str, str], balancing: bool) -> CandidateReport:
            recipes = {layer: compared.configs[candidate].recipe for layer, candidate in chosen.items()}
            weights = comparison.convert(recipes, balancing)
            return comparison.run("as recommended", None, recipes, weights, balancing)

        found = Report(
            model=type(model).__name__,
            loss=comparison.loss.item(),
            tokens=total,
            step_tokens=step_tokens or total,
            sampled=max(len(own.x) for own in comparison.operands.values() if own.x is not None),
            layers=layers,
            candidates=measured,
            min_cosine=min_cosine,
            min_sqnr=min_sqnr,
            ceilings=ceilings,
            seconds=0.0,
            gradient_of=comparison.gradient_of,
            share=covered.share,
            left_alone=covered.reasons,
            min_gain=min_gain,
            _by_name=filter_fn is not None,
        )
        recommend(found, run_mixture)
    found.seconds = perf_counter() - start
    return found


def _layers(
    comparison: Comparison, compared: Candidates, accepted: dict[str, list[str]], step_tokens: int, ceilings: Ceilings
) -> list[LayerReport]:
    """Describe the layers that the batch reached, with their predicted times in a step of ``step_tokens``."""
    total = max(own.tokens for own in comparison.operands.values())
    layers = []
    for name in (x for x in (*comparison.layers, *comparison.experts) if x in comparison.operands):
        recipes = {candidate: c.recipe for candidate, c in compared.configs.items() if name in accepted[candidate]}
        step = round(comparison.operands[name].tokens * step_tokens / total)
        if name in comparison.experts:
            module, own = comparison.experts[name], comparison.operands[name]
            layer = experts.layer_report(name, module, own, compared.rotation)
            experts.predict_time(layer, module, own, recipes, step, ceilings)
        else:
            weight = comparison.weights[name]
            layer = layer_report(name, comparison.layers[name], comparison.operands, weight, compared.rotation)
            predict_time(layer, recipes, step, weight.requires_grad, ceilings)
        layers.append(layer)
    return layers


def _run_candidates(
    comparison: Comparison, compared: Candidates, accepted: dict[str, list[str]], layers: list[LayerReport]
) -> list[CandidateReport]:
    """Run the model under each candidate, and set ``fidelity`` of the layers."""
    operands = comparison.operands
    linear = [layer for layer in layers if not layer.experts]
    exact = {layer.name: exact_products(layer, operands[layer.name], comparison.weights[layer.name]) for layer in linear}
    measured: list[CandidateReport] = []
    weights: dict[str, nn.Parameter] = {}
    for name, config in compared.configs.items():
        balancing = name in compared.balanced
        recipes = dict.fromkeys(accepted[name], config.recipe)
        weights = comparison.convert(recipes, balancing, earlier=weights)
        for layer in linear:
            if layer.name in recipes:
                weight = weights[weight_name(layer.name)]
                layer.fidelity[name] = fidelity(layer, operands[layer.name], weight, exact[layer.name])
        candidate = comparison.run(name, config, recipes, weights, balancing)
        candidate.has_kernels = compared.has_kernels(name)
        measured.append(candidate)
    for layer in layers:
        if layer.experts:
            chosen = {name: c.recipe for name, c in compared.configs.items() if layer.name in accepted[name]}
            layer.fidelity = experts.fidelity(layer, comparison.experts[layer.name], operands[layer.name], chosen)
    for candidate in measured:
        candidate.speed = speed_of(layers, {layer.name: candidate.name for layer in layers})
    return measured

"""Results as JSON and as a table.

A report is a dict: "device", "torch", "vllm", "date", "commit", "command", "notes", "wall_s", "summary", "deltas" and
"rows", each {model, point, requests, tokens, <backend>: {ms, least_ms, gpu_ms, attention_ms, kernels}}.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from rich.table import Table

from flashmla_backend.bench import machine, tables
from flashmla_backend.bench.backends import OURS, REFERENCES
from flashmla_backend.bench.provenance import provenance
from flashmla_backend.bench.steps.points import Point
from flashmla_backend.bench.steps.run import Results, vllm_version

LONG_TOKENS = 8192  # mean context from which a point counts as attention-heavy, in a model made for it
ATTENTION_HEAVY = "v3-attention"


def make(results: Results, points: Sequence[Point], command: Sequence[str], commit: str | None) -> dict[str, Any]:
    """The report of a run."""
    rows = []
    for model, answers in results.answers.items():
        for point in points:
            row: dict[str, Any] = {
                "model": model,
                "point": point.name,
                "requests": len(point.lengths),
                "tokens": point.tokens,
            }
            row |= {who: answer["rows"][point.name] for who, answer in answers.items() if point.name in answer["rows"]}
            rows.append(row)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        **provenance(machine.describe(device)[0], command, commit),
        "vllm": vllm_version(),
        "impls": {model: {who: a["impl"] for who, a in answers.items()} for model, answers in results.answers.items()},
        "rows": rows,
        "deltas": {model: deltas(answers) for model, answers in results.answers.items()},
        "summary": summarise(rows),
        "notes": results.notes,
        "wall_s": round(results.wall_s, 1),
    }


def speed_up(row: dict[str, Any]) -> float | None:
    """Time of the best of vLLM's own backends over ours."""
    others = [value["ms"] for who, value in row.items() if isinstance(value, dict) and who != OURS]
    return min(others) / row[OURS]["ms"] if OURS in row and others else None


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Geometric mean and least of the speed-ups, over all points and over those where attention dominates."""

    def heavy(row: dict[str, Any]) -> bool:
        return row["model"] == ATTENTION_HEAVY and row["tokens"] >= LONG_TOKENS * row["requests"]

    chosen = {"all": list(rows), "attention-heavy": [row for row in rows if heavy(row)]}
    summary = {}
    for name, some in chosen.items():
        ratios = [ratio for row in some if (ratio := speed_up(row)) is not None]
        if ratios:
            mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
            summary[name] = {"geomean": round(mean, 4), "min": round(min(ratios), 4), "n": len(ratios)}
    return summary


def deltas(answers: dict[str, dict[str, Any]], reference: str | None = None) -> dict[str, dict[str, Any]]:
    """Mean |difference of log probabilities| from the reference backend, over the tokens before any answer parts.

    A token that all backends choose after the same tokens has the same context in all, and all are compared over the
    same tokens: later ones lie further apart. By default the reference is the first of REFERENCES that answered.
    Backends of vLLM's own are also compared with ours, token by token. Standard errors take requests for independent.
    """
    reference = reference or next((name for name in REFERENCES if name in answers), None)
    if reference is None:
        return {}
    differences: dict[str, list[list[float]]] = {who: [] for who in answers if who != reference}
    choices = [  # by backend, request and place: a token and the logarithm of its probability
        [list(zip(*request, strict=True)) for request in zip(answer["tokens"], answer["logprobs"], strict=True)]
        for answer in answers.values()
    ]
    for request in zip(*choices, strict=True):
        for of_requests in differences.values():
            of_requests.append([])
        for place in zip(*request, strict=True):
            if len({token for token, _ in place}) > 1:
                break
            logprobs = {who: logprob for who, (_, logprob) in zip(answers, place, strict=True)}
            for who, of_requests in differences.items():
                of_requests[-1].append(abs(logprobs[who] - logprobs[reference]))
    made = {}
    for who, of_requests in differences.items():
        mean, error = mean_and_error(of_requests)
        made[who] = {
            "from": reference,
            "mean_abs_dlogprob": mean,
            "standard_error": error,
            "compared_tokens": sum(map(len, of_requests)),
        }
        if who != OURS and OURS in differences:
            mean, error = mean_and_error(
                [
                    [x - own for x, own in zip(*request, strict=True)]
                    for request in zip(of_requests, differences[OURS], strict=True)
                ]
            )
            made[who] |= {"further_than_ours": mean, "its_standard_error": error}
    return made


def mean_and_error(groups: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Of all values, and its standard error where the values of a group may depend on each other."""
    values = [value for group in groups for value in group]
    if not values:
        return math.nan, math.nan
    mean = statistics.fmean(values)
    residuals = [sum(value - mean for value in group) for group in groups if group]
    if len(residuals) < 2:
        return mean, math.nan
    variance = sum(residual**2 for residual in residuals) * len(residuals) / (len(residuals) - 1)
    return mean, math.sqrt(variance) / len(values)


def backends_of(rows: Sequence[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key, value in row.items() if isinstance(value, dict)))


def cells(report: dict[str, Any]) -> list[list[str]]:
    """A head, then a line for each point: milliseconds of a step (of which attention) by backend, and the speed-up."""
    names = backends_of(report["rows"])
    lines = [["model", "requests x tokens", *names, "speed-up"]]
    for row in report["rows"]:
        line = [row["model"], row["point"]]
        for name in names:
            value = row.get(name)
            share = f" ({value['attention_ms']:.2f})" if value and "attention_ms" in value else ""
            line.append(f"{value['ms']:.2f}{share}" if value else "-")
        ratio = speed_up(row)
        lines.append([*line, f"{ratio:.3f}" if ratio else "-"])
    return lines


def table(report: dict[str, Any]) -> Table:
    title = f"{report['device']}, {report['vllm']}: milliseconds of a decode step (of which attention)"
    return tables.table(cells(report), title)


def markdown(report: dict[str, Any]) -> str:
    """The same table for README."""
    return tables.markdown(cells(report))


def lines(report: dict[str, Any]) -> list[str]:
    """What the table does not say."""
    said = [
        f"best of vLLM's own / ours, {name}: geometric mean {s['geomean']:.3f}, least {s['min']:.3f} of {s['n']:.0f}"
        for name, s in report["summary"].items()
    ]
    for model, by_backend in report["deltas"].items():
        for who, d in by_backend.items():
            line = f"{model}: mean |dlogprob| of {who} from {d['from']} {d['mean_abs_dlogprob']:.5f}"
            if "standard_error" in d:  # older reports have none
                line += f" +- {d['standard_error']:.5f}"
            line += f" over {d['compared_tokens']:.0f} tokens"
            if "further_than_ours" in d:
                line += f", than ours {d['further_than_ours']:+.5f} +- {d['its_standard_error']:.5f}"
            said.append(line)
    return said + report["notes"]

"""Aggregate runs over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from classroomkd.report.numbers import differences, spread

_MEASURES = ("last", "best", "chosen", "seconds")
_BASELINES = ("alone", "kd")


def aggregate(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One group per classroom and variant, aggregated over its seeds.

    Each measure is a `spread`, or None if a run lacks it. ``over_alone`` and ``over_kd`` are the
    differences of ``last`` from that variant's run with the same seed, over the seeds of both.
    """
    runs: dict[tuple[str, str], dict[int, Mapping[str, Any]]] = {}
    for row in rows:
        runs.setdefault((row["classroom"], row["variant"]), {})[row["seed"]] = row
    groups = []
    for (classroom, variant), by_seed in runs.items():
        own = list(by_seed.values())
        group = {key: own[0][key] for key in ("classroom", "variant", "method", "student")}
        group |= {
            "mentors": own[0]["mentors"].split(),
            "seeds": sorted(by_seed),
            "teacher_last": own[0]["teacher_last"],
        }
        group |= {key: spread([row[key] for row in own]) for key in _MEASURES}
        for baseline in _BASELINES:
            others = {} if variant == baseline else runs.get((classroom, baseline), {})
            last, alone = (
                {seed: row["last"] for seed, row in of.items()} for of in (by_seed, others)
            )
            group[f"over_{baseline}"] = spread(differences(last, alone))
        groups.append(group)
    return groups

"""Tables, learning curves and videos from run directories.

    python benchmark/report.py runs                    # every run below runs/ -> runs/report/
    python benchmark/report.py runs --out benchmark/results/pointmaze
    python benchmark/report.py runs --steps-to 0.5     # and: how soon was a success of 0.5 reached?

Writes report.md with one picture of learning curves per kind of data, and report.html, one file
that needs neither a server nor the network: the same, with the videos and pictures of the run
directories, the settings that differ and links to the logs. Runs on official data, on collected
data, on generated data and without a dataset never share a table. A score is one seed's mean over
the episodes of its final evaluation. Columns:

  mean, deviation   over all seeds (deviation with n - 1)
  IQM               mean of the middle half of the scores: floor(n / 4) of them fall away at each
                    end, so with fewer than 4 scores it is the mean
  95% interval      of the IQM: percentile bootstrap, seeds drawn with replacement within each task
  last three        mean of the last three evaluations, of the headline metric
  profile           a picture where methods share at least two tasks: the share of scores above
                    each level, mean over tasks, of the headline metric
  published         somebody else's number and where it stands: never part of any figure of ours

Runs are one method if they share the script, the launcher's label and every argument but the seed,
and so are the seeds of one arm of a run with a grid; where a label stands for several settings, the
arguments in which they differ are named. Several finished runs of the same seed count once, the
newest.
"""

import base64
import collections
import csv
import dataclasses
import functools
import html
import itertools
import json
import math
import os
import string
import sys
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import numpy as np
import tyro

HERE = Path(__file__).resolve().parent
NOT_A_SETTING = ("env_id", "seed", "num_seeds", "out_dir", "dataset_dir")
NOT_A_SETTING += ("resume", "start_from", "evaluate", "video", "eval_background")
COLUMN = {"training_return": "charts/episodic_return"}  # mean of the last training episodes
KINDS = ("official", "collected", "generated", "none")
TITLES = {
    "official": "Official datasets",
    "collected": "Collected datasets (not comparable with published numbers)",
    "generated": "Generated data",
    "none": "No dataset (online only)",
}


@dataclasses.dataclass(frozen=True)
class Args:
    runs: tyro.conf.Positional[tuple[str, ...]] = ("runs",)  # directories to search for runs
    out: str | None = None  # where the report goes (default: report/ in the first directory)
    published: str = str(HERE / "published.json")  # numbers of others, a source each
    resamples: int = 10_000  # of the bootstrap
    pictures: bool = True  # draw learning curves beside report.md
    headline: bool = False  # curves of each method's first mode of evaluation only
    steps_to: float | None = None
    """also list when each seed's headline metric first reached this value, and compare methods"""
    embed_mb: float = 20.0
    """videos and pictures in report.html, MB together; what is left over, or large, is linked"""


@dataclasses.dataclass(frozen=True)
class Run:
    """One run directory, of a grid one arm of it, whose values are in the arguments."""

    directory: Path
    facts: dict  # args.json
    result: dict | None  # result.json, None where the run has not ended
    label: str
    arm: str = ""  # its name, of a grid

    @property
    def args(self):
        return self.facts["args"] | self.facts.get("arms", {}).get(self.arm, {})

    @property
    def seeds(self):
        return [self.args["seed"] + i for i in range(self.args.get("num_seeds", 1))]

    @property
    def kind(self):
        """The table it belongs to: official, collected, generated or none."""
        source = self.facts["dataset_source"]
        return next((kind for kind in KINDS if source.startswith(kind)), "none")

    @property
    def settings(self):
        """The arguments that make it this method, as one comparable value."""
        kept = {k: v for k, v in self.args.items() if k not in NOT_A_SETTING}
        return json.dumps(kept, sort_keys=True)

    def scores(self):
        """{metric: {seed: score}} of the final evaluation, and of the last training episodes."""
        episodes = self.result["episodes"].items()
        seeds = self.result["seeds"]
        scores = {k: dict(zip(seeds, np.mean(v, axis=1), strict=True)) for k, v in episodes}
        for row in self.rows:
            if row.get(COLUMN["training_return"]):
                last = scores.setdefault("training_return", {})
                last[int(row["seed"])] = float(row[COLUMN["training_return"]])
        return scores

    @functools.cached_property
    def rows(self):
        """The lines of metrics.csv, after those of the offline phase with which the run began
        where that was another run's (--start-from) and is still there."""
        paths, rows = [self.directory / "metrics.csv"], []
        if start := self.args.get("start_from"):
            paths = [Path(start) / "metrics.csv", *paths]
        for path in (path for path in paths if path.is_file()):
            with open(path, newline="") as file:
                end = math.inf if path == paths[-1] else self.args["offline_steps"]
                rows += [r for r in csv.DictReader(file) if int(r["step"]) <= end]
        return [row for row in rows if row.get("arm", self.arm) == self.arm]


@dataclasses.dataclass
class Group:
    """All runs of one method on one task."""

    task: str
    label: str
    runs: list

    @property
    def args(self):
        return self.runs[0].args

    def scores(self):
        """{metric: array of one score per seed}; the newest run of a seed counts."""
        merged = collections.defaultdict(dict)
        for run in self.runs:
            for metric, by_seed in run.scores().items():
                merged[metric] |= by_seed
        return {k: np.array([v[seed] for seed in sorted(v)]) for k, v in merged.items()}

    def modes(self):
        """Metrics to report: every mode's success, or its return where there is no success."""
        names = list(self.scores())
        return [n for n in names if n.startswith("success")] or [n for n in names if "return" in n]


# ---- statistics ----
def interquartile_mean(scores):
    """Mean of what is left when floor(n / 4) of the n scores fall away at each end."""
    scores = np.sort(np.ravel(scores))
    cut = len(scores) // 4
    return scores[cut : len(scores) - cut].mean()


def bootstrap_interval(tasks, resamples, seed=0, level=0.95):
    """Percentile interval of the IQM over the pooled scores of `tasks` (list of 1-D arrays).

    Stratified: each resample draws, within each task, as many seeds as it has, with replacement.
    """
    pooled = np.concatenate(resample(tasks, resamples, seed), axis=1)
    pooled.sort(axis=1)
    cut = pooled.shape[1] // 4
    means = pooled[:, cut : pooled.shape[1] - cut].mean(axis=1)
    return np.quantile(means, [(1 - level) / 2, (1 + level) / 2])


def resample(tasks, resamples, seed=0):
    """Bootstrap of the seeds within each task: list of (n,) -> list of (resamples, n)."""
    rng = np.random.default_rng(seed)
    draws = [rng.integers(len(s), size=(resamples, len(s))) for s in tasks]
    return [s[i] for s, i in zip(map(np.asarray, tasks), draws, strict=True)]


def performance_profile(tasks, levels):
    """Share of scores above each level, mean over tasks: list of (..., n) -> (..., levels).

    Agarwal et al., Deep RL at the Edge of the Statistical Precipice, arXiv 2108.13264, section 4.2.
    """
    return np.mean([(np.asarray(s)[..., None] > levels).mean(axis=-2) for s in tasks], axis=0)


# ---- reading ----
def read_runs(roots):
    """All run directories below some directories -> list of Run, one for each arm, oldest first."""
    runs = []
    for path in sorted({p for root in roots for p in Path(root).rglob("args.json")}):
        facts, result = json.loads(path.read_text()), path.with_name("result.json")
        launched = path.parent.parent / "launch.json"
        launch = json.loads(launched.read_text()) if launched.is_file() else {}
        result = json.loads(result.read_text()) if result.is_file() else None
        for arm in facts.get("arms", ("",)):
            label = launch.get("arms", {}).get(arm, launch.get("label", facts["algo"]))
            own = result
            if arm and result:  # an arm none of whose seeds is left has no result
                own = arm in result["arms"] and result | result["arms"][arm]
            runs.append(Run(path.parent, facts, own or None, label, arm))
    return sorted(runs, key=lambda run: run.directory.stat().st_mtime)


def group_runs(runs):
    """Finished runs -> {kind of data: [Group]}, sorted; equal labels are told apart."""
    by_key = collections.defaultdict(list)
    for run in runs:
        if run.result:
            key = (run.kind, run.facts["task"], run.label, run.facts["algo"], run.settings)
            by_key[key].append(run)
    groups = collections.defaultdict(list)
    for (kind, task, label, _, _), members in sorted(by_key.items()):
        groups[kind].append(Group(task, label, members))
    for members in groups.values():
        tell_apart(members)
    return groups


def tell_apart(groups):
    """Where one label stands for several settings on a task, add what differs to the labels."""
    same = collections.defaultdict(list)
    for group in groups:
        same[group.task, group.label].append(group)
    for members in same.values():
        names = {k for g in members for k in g.args if k not in NOT_A_SETTING}
        values = {n: {json.dumps(g.args.get(n)) for g in members} for n in names}
        differing = sorted(n for n in names if len(values[n]) > 1)
        for group in members if len(members) > 1 else ():
            group.label += " " + " ".join(f"{n}={group.args.get(n)}" for n in differing)


def read_curves(group, column):
    """Evaluations of a group: steps (T,), seconds (T,), values (T, seeds) of the common steps."""
    points = collections.defaultdict(dict)
    for run in group.runs:
        for row in run.rows:
            if row.get(column):
                point = (float(row["time/train_seconds"]), float(row[column]))
                points[int(row["step"])][int(row["seed"])] = point
    if not points:
        return np.zeros(0), np.zeros(0), np.zeros((0, 0))
    full = max(len(p) for p in points.values())
    steps = sorted(s for s, p in points.items() if len(p) == full)
    table = np.array([[points[s][seed] for seed in sorted(points[s])] for s in steps])
    return np.array(steps), table[..., 0].mean(axis=1), table[..., 1]


class Curve(NamedTuple):
    """Mean over seeds at the T evaluations that all seeds have; low, high: its IQM's interval."""

    task: str
    group: int  # number of the method on its task
    headline: bool  # the method's first mode of evaluation
    name: str
    steps: np.ndarray
    seconds: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def make_curves(groups):
    """Every method's modes on every task -> [Curve]."""
    curves, number = [], collections.Counter()
    for group in groups:
        for i, metric in enumerate(group.modes()):
            steps, seconds, values = read_curves(group, COLUMN.get(metric, f"eval/{metric}"))
            if len(steps):
                band = np.array([bootstrap_interval([v], 1_000) for v in values])
                mode = metric.partition("_")[2]
                name = f"{group.label} {mode} ({values.shape[1]})".replace("  ", " ")
                facts = (group.task, number[group.task], i == 0, name)
                curves.append(Curve(*facts, steps, seconds, values.mean(axis=1), *band.T))
        number[group.task] += 1
    return curves


# ---- steps to a target ----
UNITS = ("steps", "online", "seconds")  # in which methods are compared


class Reach(NamedTuple):
    """The first evaluation that reached the target, or the last one of a seed that never did."""

    reached: bool
    steps: int
    online: int | None  # the steps of the online phase among them, None where there is none
    seconds: float  # of training


def first_reach(group, threshold):
    """{seed: Reach} of the headline metric; the newest run of a seed counts.

    FMQ's figure 3 (arXiv 2605.12416) compares the online steps to one threshold.
    """
    metric, found = group.modes()[0], {}
    column = COLUMN.get(metric, f"eval/{metric}")
    offline = group.args.get("offline_steps") or 0
    for run in group.runs:
        points = collections.defaultdict(list)
        for row in run.rows:
            if row.get(column):
                step, seconds = int(row["step"]), float(row["time/train_seconds"])
                online = max(0, step - offline) if group.args.get("online_steps") else None
                reached = float(row[column]) >= threshold
                points[int(row["seed"])].append(Reach(reached, step, online, seconds))
        for seed, evaluations in points.items():
            found[seed] = next((e for e in evaluations if e.reached), evaluations[-1])
    return dict(sorted(found.items()))


def median_reach(reaches, unit):
    """Median over seeds, those that never reached the target as later than all -> (median, exact).

    Where no median is left, the number is a lower bound of it (exact: False), from the length of
    the runs; where the run has no such unit (online steps), None.
    """
    values = [getattr(r, unit) for r in reaches]
    if None in values:
        return None
    late = [v if r.reached else math.inf for v, r in zip(values, reaches, strict=True)]
    median = float(np.median(late))
    return (median, True) if math.isfinite(median) else (float(np.median(values)), False)


def compare(median, fastest):
    """'12,000 (2.40 x)': a median and its multiple of the fastest method's."""
    if median is None:
        return ""
    more = "" if median[1] else "> "
    ratio = f" ({more}{median[0] / fastest[0]:.2f} x)" if fastest and fastest[0] else ""
    return f"{more}{median[0]:,.0f}{ratio}"


def reach_text(seed, reach):
    """'0: 4,000 (11 s)': a seed, its step and its training seconds."""
    never = "" if reach.reached else "not reached by "
    return f"{seed}: {never}{reach.steps:,} ({reach.seconds:,.0f} s)"


def reach_rows(groups, threshold):
    """Rows of REACH_HEADER: per task the methods, each against the one of the fewest steps."""
    rows = []
    for task in dict.fromkeys(group.task for group in groups):
        members = [(g, first_reach(g, threshold)) for g in groups if g.task == task]
        members = [(g, reaches) for g, reaches in members if reaches]
        medians = [{u: median_reach(r.values(), u) for u in UNITS} for _, r in members]
        known = [m for m in medians if m["steps"][1]]
        fastest = min(known, key=lambda m: m["steps"], default=dict.fromkeys(UNITS))
        for (group, reaches), median in zip(members, medians, strict=True):
            row = [task.removesuffix("-v0"), group.label, group.modes()[0]]
            row += [f"{sum(r.reached for r in reaches.values())} of {len(reaches)}"]
            row += [compare(median[unit], fastest[unit]) for unit in UNITS]
            rows.append((*row, "; ".join(reach_text(*item) for item in reaches.items())))
    return rows


REACH_HEADER = ("task", "method", "metric", "seeds that did", "median steps", "online steps")
REACH_HEADER += ("training seconds", "seed: first step (training seconds)")
REACH_TEXT = (
    "The first evaluation of each seed at which the method's headline metric is at least {:g}: one "
    "good evaluation is enough, and the interval of evaluations is the resolution. Medians over "
    "seeds; in brackets, their multiple of the median of the method with the fewest steps. A seed "
    "that never did counts as later than all others; where that leaves no median, > gives a bound, "
    "from the length of the runs. Seconds are those of training, without compilation and "
    "evaluation, of all seeds of a run together: they compare runs with equally many seeds on the "
    "same machine."
)


# ---- published numbers ----
def published_entries(published, group, metric):
    """Others' numbers for a method, task and metric -> [(method, value text, source)]."""
    found = []
    for entry in published["results"]:
        value = entry["values"].get(group.task)  # its full name
        fits = all(group.args.get(k) == v for k, v in entry["where"].items())
        online = bool(group.args.get("online_steps"))
        if value is None or group.runs[0].facts["algo"] != entry["script"] or not fits:
            continue
        if entry["online"] == online and entry["metric"] == metric:
            text = f"{value[0]:.2f} ± {value[1]:.2f}" if isinstance(value, list) else f"{value:.3f}"
            found.append((entry["method"], text, entry["source"]))
    return found


# ---- writing ----
def markdown_table(header, rows):
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return [*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)]


def spread(scores):
    return f" ± {scores.std(ddof=1):.2f}" if len(scores) > 1 else ""


def row_of(group, metric, published, cited, resamples):
    """One line of a table; the published numbers' sources are added to `cited`."""
    scores = group.scores()[metric]
    low, high = bootstrap_interval([scores], resamples)
    results = [run.result for run in group.runs]
    headline = f"eval/{metric}_last_three"
    last = [r[headline] for r in results if headline in r for _ in r["seeds"]]
    theirs = []
    for method, text, source in published_entries(published, group, metric):
        cited.setdefault(source, len(cited) + 1)
        theirs.append(f"{method} {text} [{cited[source]}]")
    seconds = [r["train_seconds"] for r in results]
    episodes = {len(e) for r in results for e in r["episodes"].get(metric, ())}
    return (
        group.task.removesuffix("-v0"),
        group.label,
        metric,
        len(scores),
        "/".join(map(str, sorted(episodes))),
        f"{scores.mean():.2f}{spread(scores)}",
        f"{interquartile_mean(scores):.2f} [{low:.2f}, {high:.2f}]",
        f"{np.mean(last):.2f}" if last else "",
        f"{results[-1]['steps']:,}",
        f"{np.mean(seconds):,.0f} s",
        "; ".join(theirs),
    )


HEADER = ("task", "method", "metric", "seeds", "episodes", "mean ± deviation", "IQM [95%]")
HEADER += ("last three", "steps", "training time", "published, not ours")


def over_tasks(groups, resamples):
    """Rows that pool the tasks of a method, where it was run on at least two."""
    pooled = collections.defaultdict(dict)
    for group in groups:
        for metric in group.modes():
            if metric.startswith("success"):  # returns of different tasks have no common scale
                pooled[group.label, metric][group.task] = group.scores()[metric]
    rows = []
    for (label, metric), tasks in pooled.items():
        if len(tasks) > 1:
            low, high = bootstrap_interval(list(tasks.values()), resamples)
            scores = np.concatenate(list(tasks.values()))
            means = np.mean([s.mean() for s in tasks.values()])
            iqm = f"{interquartile_mean(scores):.2f} [{low:.2f}, {high:.2f}]"
            rows.append((label, metric, len(tasks), len(scores), f"{means:.2f}", iqm))
    return rows


@dataclasses.dataclass
class Section:
    """What there is to say about the runs of one kind of data."""

    kind: str
    groups: list
    rows: list  # of HEADER
    pooled: list  # of POOLED_HEADER
    reaches: list  # of REACH_HEADER
    curves: list
    facts: list  # sentences


POOLED_HEADER = ("method", "metric", "tasks", "scores", "mean over tasks", "IQM [95%]")
AVERAGES_HEADER = ("method", "over", "success", "source")


def make_sections(groups, published, args):
    """{kind: groups} -> [Section], {source: its number}."""
    sections, cited = [], {}
    for kind in (kind for kind in KINDS if groups.get(kind)):
        members = groups[kind]
        rows = [
            row_of(group, metric, published, cited, args.resamples)
            for group in members
            for metric in group.modes()
        ]
        pooled = over_tasks(members, args.resamples)
        reaches = [] if args.steps_to is None else reach_rows(members, args.steps_to)
        facts, runs = [], [run for group in members for run in group.runs]
        for name in ("device", "commit", "dataset_source"):
            facts += [f"{name}: {', '.join(sorted({str(run.facts[name]) for run in runs}))}"]
        timings = {run.args.get("success_timing") for run in runs} - {None}
        facts += [f"success timing: {', '.join(sorted(timings)) or 'none'}"]
        curves = [c for c in make_curves(members) if c.headline or not args.headline]
        sections.append(Section(kind, members, rows, pooled, reaches, curves, facts))
    return sections, cited


def make_sources(groups, published, cited):
    """Averages of others as rows, why a column may be empty, and the cited sources as sentences."""
    scripts = {run.facts["algo"] for g in groups.values() for group in g for run in group.runs}
    official = {run.facts["algo"] for group in groups.get("official", ()) for run in group.runs}
    averages = []
    for a in (a for a in published["averages"] if a["script"] in official):
        cited.setdefault(a["source"], len(cited) + 1)
        interval = a.get("interval")
        text = f"{a['value']:.3f}" + (f" [{interval[0]}, {interval[1]}]" if interval else "")
        averages.append((a["method"], a["over"], text, f"[{cited[a['source']]}]"))
    nothing = published["nothing_published"]
    notes = [f"Published column of {x}: {nothing[x]}." for x in sorted(scripts & set(nothing))]
    for source, number in sorted(cited.items(), key=lambda item: item[1]):
        s = published["sources"][source]
        notes += [f"[{number}] {s['title']}. Protocol: {s['protocol']}. Caveat: {s['caveat']}."]
    return averages, notes


def write_markdown(sections, averages, notes, unfinished, args):
    """report.md as one string."""
    lines = ["# Results", ""]
    for section in sections:
        lines += [f"## {TITLES[section.kind]}", "", *markdown_table(HEADER, section.rows), ""]
        if section.pooled:
            lines += ["All tasks of a method together:", ""]
            lines += [*markdown_table(POOLED_HEADER, section.pooled), ""]
        if section.reaches:
            lines += [f"Steps to {args.steps_to:g}:", ""]
            lines += [*markdown_table(REACH_HEADER, section.reaches), ""]
            lines += [REACH_TEXT.format(args.steps_to), ""]
        lines += ["  \n".join(section.facts), ""]
        if args.pictures:
            if any(len(curve.steps) > 1 for curve in section.curves):
                lines += [f"![learning curves](curves_{section.kind}.png)", ""]
            if profile_scores(section.groups):
                lines += [f"![profiles](profile_{section.kind}.png)", ""]
    if averages:
        lines += ["## Averages that others published (not ours)", ""]
        lines += [*markdown_table(AVERAGES_HEADER, averages), ""]
    for note in notes:
        lines += [note, ""]
    if unfinished:
        lines += ["Not finished, and in no table:", ""]
        lines += dict.fromkeys(f"- {run.directory}" for run in unfinished)
    return "\n".join(lines).rstrip() + "\n"


def draw_curves(section, path):
    """A row per task: mean over seeds with its IQM's 95% interval, by step and by wall-clock."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tasks = sorted({group.task for group in section.groups})
    figure = Figure(figsize=(12, 3.4 * len(tasks)))
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(tasks), 2, squeeze=False, sharey="row")
    for task, row in zip(tasks, axes, strict=True):
        for curve in (c for c in section.curves if c.task == task):
            look = dict(color=COLORS[curve.group % len(COLORS)], marker=".", label=curve.name)
            look |= {} if curve.headline else dict(ls="--", lw=0.8)
            for axis, x in zip(row, (curve.steps, curve.seconds), strict=True):
                axis.plot(x, curve.mean, **look)
                axis.fill_between(x, curve.low, curve.high, color=look["color"], alpha=0.15, lw=0)
        for start in online_starts(section.groups, task):
            row[0].axvline(start, c="grey", ls=":", lw=1)
        row[0].set(title=task, ylabel=group_metric(section.groups, task), xlabel="step")
        row[1].set(title="the same by wall-clock", xlabel="training seconds")
        row[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=100)


LEVELS = np.linspace(0, 1, 101)  # of success, in profiles


def profile_scores(groups):
    """{name: scores of each task, list of (seeds,)} of the methods that have a success on every
    task; empty with fewer than two tasks, or methods."""
    tasks, found = sorted({g.task for g in groups}), collections.defaultdict(dict)
    for group in groups:
        if (metric := group.modes()[0]).startswith("success"):
            found[f"{group.label} {metric[8:]}".strip()][group.task] = group.scores()[metric]
    full = {k: [v[t] for t in tasks] for k, v in found.items() if len(v) == len(tasks)}
    return full if len(tasks) > 1 and len(full) > 1 else {}


def draw_profile(scores, path):
    """Profiles of all methods with 95% bands of the stratified bootstrap."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4))
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for color, (name, tasks) in zip(itertools.cycle(COLORS), scores.items(), strict=False):
        label = f"{name} ({sum(map(len, tasks))} scores)"
        axis.step(LEVELS, performance_profile(tasks, LEVELS), where="post", c=color, label=label)
        draws = performance_profile(resample(tasks, 1_000), LEVELS)
        band = np.quantile(draws, [0.025, 0.975], axis=0)
        axis.fill_between(LEVELS, *band, step="post", color=color, alpha=0.1, lw=0)
    axis.set(xlabel="success", ylabel="share of seeds with more, mean over tasks", ylim=(0, 1.02))
    axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=100)


COLORS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd")
COLORS += ("#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf")


def online_starts(groups, task):
    """Steps at which the methods' online phases begin, of those that have both phases."""
    args = [group.args for group in groups if group.task == task]
    both = [a for a in args if a.get("offline_steps") and a.get("online_steps")]
    return sorted({a["offline_steps"] for a in both})


def group_metric(groups, task):
    """success or return: the scale of a task's curves."""
    return next(g for g in groups if g.task == task).modes()[0].partition("_")[0]


# ---- the page ----
PAGE = string.Template("""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark; --fg: #1b1f24; --dim: #5b6570; --bg: #fff; --line: #d5dae0;
  --stripe: #f4f6f8; }
@media (prefers-color-scheme: dark) { :root { --fg: #e4e7ea; --dim: #9aa4ae; --bg: #14171a;
  --line: #363c43; --stripe: #1d2126; } }
body { margin: 0 auto; padding: 1rem; max-width: 76rem; background: var(--bg); color: var(--fg);
  font: 15px/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { margin: 0; } h2 { margin: 2.5rem 0 .5rem; border-bottom: 2px solid var(--line); }
h3 { margin: 1.8rem 0 .4rem; } h4 { margin: 1.2rem 0 .3rem; }
p, .dim { color: var(--dim); margin: .3rem 0; max-width: 60rem; }
a { color: #2f7fd1; }
.scroll { overflow-x: auto; margin: .4rem 0; }
table { border-spacing: 0; font: 14px/20px system-ui, sans-serif;
  font-variant-numeric: tabular-nums; }
th, td { padding: 5px 11px; text-align: left; white-space: nowrap; vertical-align: top;
  border-bottom: 1px solid var(--line); }
th { color: var(--dim); font-weight: 600; } .n { text-align: right; }
td.long { white-space: normal; min-width: 15rem; max-width: 34rem; }
th:first-child, td:first-child { position: sticky; left: 0; background: var(--bg);
  white-space: normal; max-width: 14rem; }
small { color: var(--dim); font-size: 12px; }
tr:hover td { background: var(--stripe); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr));
  gap: .5rem 1.5rem; }
.media { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(45%, 15rem), 1fr));
  gap: 1rem; }
figure { margin: 0; } figcaption { color: var(--dim); font-size: .8rem; }
img, video { width: 100%; box-sizing: border-box; background: #fff; border-radius: 4px;
  border: 1px solid var(--line); }
svg { width: 100%; height: auto; display: block; } svg text { fill: var(--dim); font-size: 11px; }
.axis { stroke: var(--line); } .band { opacity: .15; stroke: none; }
.curve { fill: none; stroke-width: 1.8; } .other .curve { stroke-width: 1; stroke-dasharray: 4 3; }
body:not(:has(#modes:checked)) .other { display: none; }
.legend span { display: inline-block; margin-right: 1.1rem; font-size: .87rem; }
.legend i { display: inline-block; width: 1.3em; margin-right: .4em; vertical-align: middle;
  border-top: 3px solid; } .legend .other i { border-top: 2px dashed; }
@media (max-width: 40rem) { small { display: block; line-height: 16px; }
  table { font-size: 13px; } th { white-space: normal; } th, td { padding: 4px 6px; }
  th:first-child, td:first-child { min-width: 8rem; } }
@media (min-width: 60rem) { svg text { font-size: 9px; } }
</style>
<h1>$title</h1>
<p>$summary</p>
$body
</html>
""")
MIME = {".mp4": "video/mp4", ".webm": "video/webm", ".gif": "image/gif", ".png": "image/png"}
LARGE = 2e6  # bytes: larger files are linked


class Markup(str):
    """Text that is HTML already."""


def escape(text):
    return text if isinstance(text, Markup) else html.escape(str(text))


def html_table(header, rows):
    """A table that scrolls sideways below its first column, which stays."""
    numbers = [any(cell_class(row[i]) == " class='n'" for row in rows) for i in range(len(header))]
    titles = zip(header, numbers, strict=True)
    lines = [f"<th{' class=n' if n else ''}>{escape(h)}</th>" for h, n in titles]
    for row in rows:
        lines += ["<tr>", *(f"<td{cell_class(cell)}>{escape(cell)}</td>" for cell in row)]
    return f"<div class='scroll'><table><tr>{''.join(lines)}</table></div>"


def html_scores(header, rows):
    """A table whose first two columns, the method and what tells its rows apart, become one cell;
    the scores come next, so that a phone shows them."""
    first = [Markup(f"{escape(row[0])} <small>{escape(row[1])}</small>") for row in rows]
    order = sorted(range(2, len(header)), key=lambda i: not header[i].startswith(("mean", "IQM")))
    table = [(cell, *(row[i] for i in order)) for cell, row in zip(first, rows, strict=True)]
    return html_table(("method", *(header[i] for i in order)), table)


def cell_class(cell):
    """Numbers stand at the right, long texts may break."""
    if isinstance(cell, Markup):
        return ""
    if len(str(cell)) > 40:
        return " class='long'"
    return " class='n'" if str(cell).lstrip("-> ")[:1].isdigit() else ""


def ticks(low, high, count=5):
    """Round numbers from low to high, about `count` of them."""
    raw = (high - low) / count or 1.0
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(m * size for m in (1, 2, 2.5, 5, 10) if m * size >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 10) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def short(number):
    """30,000 -> 30k."""
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:g}{letter}"
    return f"{number:g}"


def svg_chart(curves, unit, y_label, marks=()):
    """Learning curves with their intervals, by "steps" or "seconds", as inline SVG."""
    end = max(getattr(c, unit).max() for c in curves) or 1.0
    low, high = 0.0, 1.0
    if y_label != "success":
        low, high = min(c.low.min() for c in curves), max(c.high.max() for c in curves)
        pad = 0.05 * (high - low) or 1.0
        low, high = low - pad, high + pad

    def px(x):  # the plot is from 42 to 390 of 400, and from 10 to 206 of 240
        return round(42 + 348 * float(x) / end, 1)

    def py(y):
        return round(10 + 196 * (high - float(y)) / (high - low), 1)

    def text(x, y, anchor, content):
        return f"<text x='{x}' y='{y}' text-anchor='{anchor}'>{content}</text>"

    x_label = {"steps": "step", "seconds": "training seconds"}[unit]
    parts = [f"<svg viewBox='0 0 400 240' role='img' aria-label='{y_label} by {x_label}'>"]
    for y in ticks(low, high):
        parts += [f"<path class='axis' d='M42 {py(y)}H390'/>", text(37, py(y) + 3, "end", short(y))]
    for x in marks:
        parts += [f"<path class='axis' stroke-dasharray='3 3' d='M{px(x)} 10V206'/>"]
    parts += [text(px(x), 221, "middle", short(x)) for x in ticks(0, end)]
    parts += [text(216, 236, "middle", x_label)]
    for c in curves:
        xs, color = [px(x) for x in getattr(c, unit)], COLORS[c.group % len(COLORS)]
        ys, lows, highs = ([py(y) for y in values] for values in (c.mean, c.low, c.high))
        band = points(xs + xs[::-1], highs + lows[::-1])
        parts += [f"<g{'' if c.headline else ' class=other'} fill='{color}' stroke='{color}'>"]
        parts += [f"<polygon class='band' points='{band}'/>"]
        parts += [f"<polyline class='curve' points='{points(xs, ys)}'/>"]
        for i, (x, y) in enumerate(zip(xs, ys, strict=True)):
            hint = f"{c.name}: {c.mean[i]:.2f} [{c.low[i]:.2f}, {c.high[i]:.2f}]"
            hint = escape(f"{hint}, step {c.steps[i]:,}, {c.seconds[i]:,.0f} s")
            parts += [f"<circle cx='{x}' cy='{y}' r='2'><title>{hint}</title></circle>"]
        parts += ["</g>"]
    return "".join([*parts, "</svg>"])


def points(xs, ys):
    return " ".join(f"{x},{y}" for x, y in zip(xs, ys, strict=True))


def html_curves(section, task):
    """Both charts of a task with their legend."""
    curves = [c for c in section.curves if c.task == task]
    if not curves:
        return []
    y_label, marks = group_metric(section.groups, task), online_starts(section.groups, task)
    legend = []
    for c in curves:
        line = f"<i style='border-color:{COLORS[c.group % len(COLORS)]}'></i>"
        legend += [f"<span{'' if c.headline else ' class=other'}>{line}{escape(c.name)}</span>"]
    charts = [svg_chart(curves, "steps", y_label, marks), svg_chart(curves, "seconds", y_label)]
    return [
        f"<p>{y_label}: mean over seeds (their number in brackets), IQM's 95% interval</p>",
        f"<div class='legend'>{''.join(legend)}</div><div class='charts'>{''.join(charts)}</div>",
    ]


def differing_settings(groups):
    """Rows (setting, value of each group) of what at least two groups have and that differs."""
    facts = []
    for group in groups:
        facts.append({k: v for k, v in group.args.items() if k not in NOT_A_SETTING})
        for name in ("commit", "device"):
            values = {str(run.facts.get(name)) for run in group.runs}
            facts[-1][name] = ", ".join(sorted(values))
    rows = []
    for name in sorted({name for f in facts for name in f}):
        if len({json.dumps(f[name]) for f in facts if name in f}) > 1:
            values = [f.get(name, "") for f in facts]
            rows.append(
                (name, *(" ".join(map(str, v)) if isinstance(v, list) else v for v in values))
            )
    return rows


def find_media(run):
    """Videos and pictures of a run directory, the smallest where one exists in several formats."""
    by_stem = collections.defaultdict(list)
    for path in sorted(run.directory.rglob("*")):
        if path.suffix in MIME:
            by_stem[path.with_suffix("")].append(path)
    return [min(paths, key=lambda p: p.stat().st_size) for paths in by_stem.values()]


def link(path, out, text):
    return Markup(f"<a href='{quote(os.path.relpath(path, out))}'>{escape(text)}</a>")


def html_media(groups, out, budget):
    """Figures of the groups' videos and pictures; `budget`: [bytes left], spent here."""
    runs = [(g.label, run) for g in groups for run in g.runs]
    found = {path: (path, label, run) for label, run in runs for path in find_media(run)}
    found = list(found.values())  # of a grid once
    found.sort(key=lambda item: item[0].stat().st_size)
    figures, links = [], []
    for path, label, run in found:
        size, seeds = path.stat().st_size, ", ".join(map(str, run.seeds))
        caption = escape(f"{label}, seed {seeds}: {path.relative_to(run.directory)}")
        if size > min(LARGE, budget[0]):
            links.append(f"<p>{link(path, out, Markup(f'{caption} ({size / 1e6:.1f} MB)'))}</p>")
            continue
        budget[0] -= size
        source = f"data:{MIME[path.suffix]};base64,{base64.b64encode(path.read_bytes()).decode()}"
        shown = f"<img src='{source}' alt='{caption}'>"
        if MIME[path.suffix].startswith("video"):
            shown = f"<video src='{source}' controls autoplay loop muted playsinline></video>"
        figures.append(f"<figure><figcaption>{caption}</figcaption>{shown}</figure>")
    figures = [f"<div class='media'>{''.join(sorted(figures))}</div>"] if figures else []
    return figures + links


RUNS_HEADER = ("method", "task", "seeds", "state", "files", "steps", "training time", "commit")


def run_row(run, label, out):
    """A line of the list of runs, with links to its files."""
    files = {"log": run.directory.parent / "log.txt"}
    files |= {n: run.directory / n for n in ("metrics.csv", "args.json", "result.json")}
    links = Markup(" ".join(link(p, out, n) for n, p in files.items() if p.is_file()))
    steps, seconds = "", ""
    if run.result:
        steps, seconds = f"{run.result['steps']:,}", f"{run.result['train_seconds']:,.0f} s"
    state, commit = "finished" if run.result else "not finished", (run.facts["commit"] or "")[:7]
    seeds = ", ".join(map(str, run.seeds))
    return label, run.facts["task"].removesuffix("-v0"), seeds, state, links, steps, seconds, commit


def write_page(sections, averages, notes, unfinished, args, out):
    """report.html as one string; links are relative to the directory `out`."""
    body, budget = [], [args.embed_mb * 1e6]
    if any(not curve.headline for section in sections for curve in section.curves):
        body.append(
            "<label class='dim'><input type='checkbox' id='modes'> curves of every mode of "
            "evaluation (otherwise each method's first)</label>"
        )
    for section in sections:
        body.append(f"<h2>{escape(TITLES[section.kind])}</h2>")
        for task in dict.fromkeys(group.task for group in section.groups):
            body += html_task(section, task, args, out, budget)
        if section.pooled:
            body += ["<h3>All tasks of a method together</h3>"]
            body += [html_scores(POOLED_HEADER, section.pooled)]
        if section.reaches:
            body += [f"<p>Steps to a target: {REACH_TEXT.format(args.steps_to)}</p>"]
        body += [f"<p>{escape(fact)}</p>" for fact in section.facts]
    if averages:
        body += ["<h2>Averages that others published (not ours)</h2>"]
        body += [html_table(AVERAGES_HEADER, averages)]
    body += [f"<p>{escape(note)}</p>" for note in notes]
    finished = [(r, g.label) for s in sections for g in s.groups for r in g.runs]
    runs = [run_row(run, label, out) for run, label in finished]
    runs += [run_row(run, run.label, out) for run in unfinished]
    body += ["<h2>Runs</h2>", "<p>The links lead to the run directories beside this page.</p>"]
    body += [html_scores(RUNS_HEADER, runs)]
    summary = f"{len(finished)} finished runs, {len(unfinished)} not finished. "
    summary += "A score is one seed's mean over the episodes of its final evaluation."
    return PAGE.substitute(title="Results", summary=summary, body="\n".join(body))


def html_task(section, task, args, out, budget):
    """The part of a page on one task."""
    groups = [g for g in section.groups if g.task == task]
    name = task.removesuffix("-v0")
    lines = [f"<h3>{escape(name)}</h3>"]
    lines += [html_scores(HEADER[1:], [row[1:] for row in section.rows if row[0] == name])]
    lines += html_curves(section, task)
    if section.reaches:
        rows = [row[1:] for row in section.reaches if row[0] == name]
        lines += [f"<h4>Steps to {args.steps_to:g}</h4>", html_scores(REACH_HEADER[1:], rows)]
    media = html_media(groups, out, budget)
    lines += ["<h4>Videos and pictures</h4>", *media] if media else []
    if settings := differing_settings(groups):
        text = "settings that differ (of those that at least two methods have)"
        table = html_table(("setting", *(g.label for g in groups)), settings)
        lines += [f"<details><summary>{len(settings)} {text}</summary>{table}</details>"]
    return lines


# ---- main ----
def main(args):
    runs = read_runs(args.runs)
    groups, unfinished = group_runs(runs), [r for r in runs if not r.result]
    if not groups:
        print(f"error: no finished run below {', '.join(args.runs)}", file=sys.stderr)
        return 2
    out = Path(args.out or Path(args.runs[0]) / "report")
    out.mkdir(parents=True, exist_ok=True)
    published = json.loads(Path(args.published).read_text())
    sections, cited = make_sections(groups, published, args)
    averages, notes = make_sources(groups, published, cited)
    text = write_markdown(sections, averages, notes, unfinished, args)
    (out / "report.md").write_text(text)
    page = write_page(sections, averages, notes, unfinished, args, out)
    (out / "report.html").write_text(page, encoding="utf-8")
    for section in sections if args.pictures else ():
        if any(len(curve.steps) > 1 for curve in section.curves):
            draw_curves(section, out / f"curves_{section.kind}.png")
        if scores := profile_scores(section.groups):
            draw_profile(scores, out / f"profile_{section.kind}.png")
    print(text + f"\nwritten to {out}")
    return 0


def main_of(argv=None):
    return main(tyro.cli(Args, description=__doc__, args=argv))


if __name__ == "__main__":
    sys.exit(main_of())
